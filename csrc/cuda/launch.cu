#include <cuda_runtime.h>

#include <stdexcept>

#include "cuda/launch.h"

namespace ncfast {

static void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

void run(const std::vector<Launch>& plan, int device, void* stream) {
  check(cudaSetDevice(device), "cudaSetDevice");
  for (const Launch& launch : plan) {
    void* arguments[] = {const_cast<char*>(launch.parameters.data())};
    check(cudaLaunchKernel(launch.function, dim3(static_cast<unsigned>(launch.grid)), dim3(launch.block),
                           arguments, 0, static_cast<cudaStream_t>(stream)),
          launch.kernel);
  }
}

}  // namespace ncfast

#include <cuda_runtime.h>

#include <stdexcept>

#include "cuda/launch.h"

namespace ncfast {

// Compiled for the architectures that all kernels are compiled for: whether it can be loaded goes for them.
static __global__ void probe() {}

constexpr int kSharedByDefault = 48 * 1024;

static void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

std::optional<std::string> refuses(int device) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe);
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilationDisabled:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
      cudaGetLastError();  // answered here, not left to the next call
      return std::string("CUDA says: ") + cudaGetErrorString(error);
    default:  // out of memory, say, which will not last
      check(error, "whether the kernels can be loaded");
      return std::nullopt;
  }
}

void run(const std::vector<Launch>& plan, int device, void* stream) {
  check(cudaSetDevice(device), "cudaSetDevice");
  for (const Launch& launch : plan) {
    if (launch.shared > kSharedByDefault) {
      check(cudaFuncSetAttribute(launch.function, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared),
            launch.kernel);
    }
    void* arguments[] = {const_cast<char*>(launch.parameters.data())};
    check(cudaLaunchKernel(launch.function, dim3(static_cast<unsigned>(launch.grid)), dim3(launch.block),
                           arguments, launch.shared, static_cast<cudaStream_t>(stream)),
          launch.kernel);
  }
}

}  // namespace ncfast

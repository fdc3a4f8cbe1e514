// A plan is a list of kernels to launch, made on the host from shapes and addresses alone: tests execute it
// without a GPU.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

namespace ncfast {

struct Launch {
  std::string kernel;    // a part of the kernel's name in PTX that no other kernel's has
  const void* function;  // the kernel's handle for the CUDA runtime
  int64_t grid;
  int block;
  int shared;                    // bytes of dynamic shared memory
  std::vector<char> parameters;  // its one argument, a struct
};

template <class Parameters>
void add(std::vector<Launch>* plan, const std::string& kernel, void (*function)(Parameters), int64_t grid,
         int block, const Parameters& parameters, int shared = 0) {
  static_assert(std::is_trivially_copyable_v<Parameters>);
  if (grid == 0) return;
  const char* bytes = reinterpret_cast<const char*>(&parameters);
  plan->push_back({kernel, reinterpret_cast<const void*>(function), grid, block, shared,
                   std::vector<char>(bytes, bytes + sizeof(Parameters))});
}

// Enqueues on `stream` of `device` and returns; throws std::runtime_error when CUDA refuses a launch.
void run(const std::vector<Launch>& plan, int device, void* stream);

// Why `device` cannot run this build's kernels: no machine code for it, or a driver older than the runtime.
// Launches nothing; throws std::runtime_error for any other error. As `run`, leaves `device` the current one.
std::optional<std::string> refuses(int device);

// Hands out the parts of a workspace, 256 bytes aligned; with a null workspace it only counts.
class Carver {
 public:
  struct Part {
    int64_t start, bytes;
  };

  explicit Carver(void* workspace) : start_(static_cast<char*>(workspace)) {}

  template <class T>
  T* take(int64_t n) {
    parts_.push_back({used_, n * static_cast<int64_t>(sizeof(T))});
    T* part = start_ ? reinterpret_cast<T*>(start_ + used_) : nullptr;
    used_ += (parts_.back().bytes + 255) / 256 * 256;
    return part;
  }
  int64_t used() const { return used_; }
  const std::vector<Part>& parts() const { return parts_; }

 private:
  char* start_;
  int64_t used_ = 0;
  std::vector<Part> parts_;
};

}  // namespace ncfast

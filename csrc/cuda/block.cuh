// What kernels share: blocks of 256 threads.
#pragma once

#include <cstdint>

namespace ncfast {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kFull = 0xffffffffu;
constexpr unsigned kNone = 0xffffffffu;  // no key, no row

__host__ __device__ inline int64_t cover(int64_t n, int64_t step) { return (n + step - 1) / step; }

// The sum of `value` over the threads before this one; *total gets the sum over all. Every thread calls it.
__device__ inline unsigned scan_block(unsigned value, unsigned* total) {
  __shared__ unsigned of_warp[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned up_to = value;
  for (int step = 1; step < 32; step *= 2) {
    const unsigned other = __shfl_up_sync(kFull, up_to, step);
    if (lane >= step) up_to += other;
  }
  __syncthreads();  // a previous call may still be reading
  if (lane == 31) of_warp[warp] = up_to;
  __syncthreads();
  unsigned before = 0;
  *total = 0;
  for (int w = 0; w < kWarps; w++) {
    if (w == warp) before = *total;
    *total += of_warp[w];
  }
  return before + up_to - value;
}

// Replaces values[0 … n) by the sums of those before them, with the whole block; returns the total.
__device__ inline unsigned scan_array(unsigned* values, int64_t n) {
  unsigned carry = 0;
  for (int64_t first = 0; first < n; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    unsigned total;
    const unsigned before = scan_block(i < n ? values[i] : 0, &total);
    if (i < n) values[i] = carry + before;
    carry += total;
  }
  return carry;
}

__device__ inline int64_t read_label(const void* labels, int size, int64_t bytes, int64_t i) {
  const char* at = static_cast<const char*>(labels) + i * bytes;
  return size == 8 ? *reinterpret_cast<const int64_t*>(at) : *reinterpret_cast<const int32_t*>(at);
}

}  // namespace ncfast

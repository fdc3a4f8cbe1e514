#include "cuda/block.cuh"
#include "cuda/certify.h"

namespace ncfast {
namespace {

constexpr int kRows = 4 * kThreads;  // per block
constexpr int kCounts = 4;

struct Task {
  Certify call;
  int64_t blocks;
  unsigned* before;  // [counts, blocks] per block, then for the undecided in the blocks before
};

struct Verdict {
  bool used, first, second, undecided;
};

__device__ Verdict judge(const Certify& c, int64_t i) {
  if (i >= c.N) return {};
  const double radius = c.radius_size == 8 ? static_cast<const double*>(c.radii)[i]
                                           : static_cast<double>(static_cast<const float*>(c.radii)[i]);
  const int64_t y = read_label(c.labels, c.label_size, c.label_bytes, i);
  if (isnan(radius) || y < 0 || y >= c.C) return {};
  // No fused multiply-add: the same decisions as the reference.
  const double reach = __dadd_rn(__dadd_rn(__dmul_rn(radius, c.scale), c.offset), c.gap[y]);
  const bool first = reach < c.first[y], second = c.second != nullptr && reach < c.second[y];
  return {true, first, second, !(first && (second || c.second == nullptr))};
}

__global__ void __launch_bounds__(kThreads) certify_count(const Task t) {
  unsigned n[kCounts] = {};
  for (int k = 0; k < kRows; k += kThreads) {
    const Verdict verdict = judge(t.call, static_cast<int64_t>(blockIdx.x) * kRows + k + threadIdx.x);
    n[0] += __syncthreads_count(verdict.used);
    n[1] += __syncthreads_count(verdict.first);
    n[2] += __syncthreads_count(verdict.second);
    n[3] += __syncthreads_count(verdict.undecided);
  }
  if (threadIdx.x != 0) return;
  for (int k = 0; k < kCounts; k++) t.before[k * t.blocks + blockIdx.x] = n[k];
}

// One block per count.
__global__ void __launch_bounds__(kThreads) certify_scan(const Task t) {
  const unsigned total = scan_array(t.before + blockIdx.x * t.blocks, t.blocks);
  if (threadIdx.x == 0) t.call.counts[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads) certify_write(const Task t) {
  unsigned place = t.before[(kCounts - 1) * t.blocks + blockIdx.x];
  for (int k = 0; k < kRows; k += kThreads) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kRows + k + threadIdx.x;
    const bool undecided = judge(t.call, i).undecided;
    unsigned total;
    const unsigned before = scan_block(undecided, &total);
    if (undecided) t.call.undecided[place + before] = i;
    place += total;
  }
}

Task carve(const Certify& call, Carver* workspace) {
  const int64_t blocks = cover(call.N, kRows);
  return {call, blocks, workspace->take<unsigned>(kCounts * blocks)};
}

}  // namespace

Carver certify_workspace(const Certify& call) {
  Carver nothing(nullptr);
  carve(call, &nothing);
  return nothing;
}

std::vector<Launch> certify_plan(const Certify& call, void* workspace) {
  Carver carver(workspace);
  const Task task = carve(call, &carver);
  std::vector<Launch> plan;
  add(&plan, "certify_count", &certify_count, task.blocks, kThreads, task);
  add(&plan, "certify_scan", &certify_scan, kCounts, kThreads, task);
  add(&plan, "certify_write", &certify_write, task.blocks, kThreads, task);
  return plan;
}

}  // namespace ncfast

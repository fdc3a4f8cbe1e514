// class_scatter on the GPU, multiplied with mma.sync: what class_moments computes, and the scatter
// Σ (h - k_y)(h - k_y)^T.
//
//   (class_moments)   counts, sums, sumsq, radii, and the rows in the order of their labels
//   scatter_pairs     one 128 × 128 tile I >= J of the scatter over one split of the rows
//   scatter_reduce    adds the splits in their order, the diagonal from squares of the residuals before they
//                     were rounded, and mirrors
//
// A block walks through its rows 32 at a time. While these are worked on, cp.async brings columns I and J of
// the next 32 into shared memory. Threads take the rows from there, subtract the shift in float32, and put
// the residuals back as one, two or three bfloat16 planes; ldmatrix transposes those into the operands of
// mma.sync. In the order of the labels a row of the shift stays in registers while its class lasts.
//
// The features are read twice: by class_moments, and here, where the tiles of a split run side by side and
// find them in L2 after the first, as long as all tiles fit the GPU at once: up to p = 2800 or so with the
// 264 blocks of an H100, 1800 with the 108 of an A100. float32 sums are at most 2048 rows long; then they are
// added to float64 in the block's own part of the workspace, which is laid out by thread. There are no float
// atomics, and boundaries depend on the shapes alone: results are bitwise the same from call to call.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/class_moments.h"
#include "cuda/launch.h"

namespace ncfast {

struct ClassScatter {
  ClassMoments moments;  // not of float64 features
  int planes;            // bfloat16 for a float32: 3 is "highest", 2 "high", 1 "medium"
  double* scatter;       // [p, p], overwritten
};

// Bytes of shared memory that a block takes.
int class_scatter_shared(Dtype dtype, int planes);

Carver class_scatter_workspace(const ClassScatter& call);

// Reads no device memory.
std::vector<Launch> class_scatter_plan(const ClassScatter& call, void* workspace);

}  // namespace ncfast

// class_moments on the GPU: class_scatter without the scatter. Counts, sums and sums of squares of (h - k_y)
// and the radii |h - k_y|, from one read of the features in the order of their labels.
//
//   encode         key = label, or C for a row left out
//   digit_*        stable radix sort of the keys, eight bits a pass: the order of the rows
//   bounds         where each class starts in that order
//   moments_rows   a team of threads walks a run of rows, a thread holding 16 bytes' worth of columns; what a
//                  run sees whole it writes, what continues beyond it becomes a partial result
//   moments_join   the same for 32 runs at a time, which are one run of the next level; once per level, until
//                  there is one run
//
// A run has a fixed number of rows whatever their classes, and so have those of every level: one class with
// half of the rows, or a hundred thousand with a few, load every processor alike. Every boundary depends on
// the shapes alone and no result on the order in which blocks run: results are bitwise the same from call to
// call.
//
// Differences are rounded once, to float32 (float64 for float64 features); their squares and all sums are
// float64.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/dtype.h"
#include "cuda/launch.h"

namespace ncfast {

struct ClassMoments {
  int64_t N, p, C;  // N < 2^31, p < 2^30, C < 2^32 - 1
  Dtype dtype;
  const void* features;  // [N, p], columns contiguous, aligned to their elements
  int64_t row_bytes;     // from one row to the next, a multiple of the element; may be 0 or negative
  const void* labels;    // [N] int64 or int32; rows whose label is outside [0, C) are never read
  int label_size;        // 8 or 4
  int64_t label_bytes;   // from one label to the next
  int64_t ignore_index;  // left out even if in [0, C)
  const void* shift;     // [C, p] contiguous; float64 when the features are, else float32

  // All are overwritten; a class without rows gets zeros.
  int64_t* counts;  // [C]
  double* sums;     // [C, p] sum of h - k_y
  double* sumsq;    // [C] sum of |h - k_y|^2
  void* radii;  // [N] |h - k_y|, NaN for a row left out; float64 when the features are, else float32; or null
};

// Whether rows can be read 16 bytes at a time.
inline bool aligned(const ClassMoments& call) {
  return reinterpret_cast<uintptr_t>(call.features) % 16 == 0 && call.row_bytes % 16 == 0;
}

// What the plan needs beside its outputs: device memory aligned to 256.
Carver class_moments_workspace(const ClassMoments& call);

// Reads no device memory.
std::vector<Launch> class_moments_plan(const ClassMoments& call, void* workspace);

// What the plan leaves in its workspace for plans after it.
struct ClassOrder {
  const unsigned* keys;    // [N] labels in ascending order, C for the rows left out
  const unsigned* rows;    // [N] the rows in that order, those of a class in their own
  const unsigned* starts;  // [C + 1] the first place of each class, and of the rows left out
};
ClassOrder class_moments_order(const ClassMoments& call, void* workspace);

}  // namespace ncfast

// certify on the GPU: a row nearer to its class's mean than a rule's decision radius needs no scores.
//
//   certify_count   decided or not, counted per block
//   certify_scan    what the blocks before hold
//   certify_write   the undecided rows' indices, in their order
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/launch.h"

namespace ncfast {

struct Certify {
  int64_t N, C;          // N < 2^31
  const void* radii;     // [N] float32 or float64; NaN: the row is not in use
  int radius_size;       // 4 or 8
  const void* labels;    // [N] int64 or int32; a row with a label outside [0, C) is not in use
  int label_size;        // 8 or 4
  int64_t label_bytes;   // from one label to the next
  const double* gap;     // [C] added to the radii of the class
  const double* first;   // [C] decision radii of a rule
  const double* second;  // [C] and of another one, or null
  double scale, offset;  // decided: (radius * scale + offset) + gap < decision radius, rounded at each step
  int64_t* undecided;    // [N] rows in use that not every rule decides; the first counts[3] are written
  int64_t* counts;       // [4] rows in use; decided by the first rule; by the second, 0 when null; undecided
};

Carver certify_workspace(const Certify& call);

// Reads no device memory.
std::vector<Launch> certify_plan(const Certify& call, void* workspace);

}  // namespace ncfast

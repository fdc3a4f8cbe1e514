// affine_argmax in plain C++, with the vectors of the compiler's baseline.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/affine_argmax.h"

namespace ncfast {
namespace {

struct BFloat16 {};
struct Float16 {};

#include "cpu/affine_argmax_vector.h"

}  // namespace

const ArgmaxBody* argmax_body_portable(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return FloatArgmax<float, 4, 2, 4>::body();
    case Dtype::bfloat16:
      return FloatArgmax<BFloat16, 4, 2, 4>::body();
    case Dtype::float16:
      return FloatArgmax<Float16, 4, 2, 4>::body();
    case Dtype::float64:
      return FloatArgmax<double, 4, 2, 4>::body();
  }
  return nullptr;
}

}  // namespace ncfast

// affine_argmax on AVX2: 8 floats, 6 x 2 register tiles.
#if defined(__x86_64__)

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/affine_argmax.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace ncfast {
namespace {

struct BFloat16 {};
struct Float16 {};

#include "cpu/affine_argmax_vector.h"

}  // namespace

const ArgmaxBody* argmax_body_avx2(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return FloatArgmax<float, 8, 2, 6>::body();
    case Dtype::bfloat16:
      return FloatArgmax<BFloat16, 8, 2, 6>::body();
    case Dtype::float16:
      return FloatArgmax<Float16, 8, 2, 6>::body();
    case Dtype::float64:
      return FloatArgmax<double, 8, 2, 6>::body();
  }
  return nullptr;
}

}  // namespace ncfast

#pragma GCC pop_options

#endif

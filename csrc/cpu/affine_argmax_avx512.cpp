// affine_argmax on AVX-512: 16 floats, 8 x 3 register tiles.
#if defined(__x86_64__)

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/affine_argmax.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")

namespace ncfast {
namespace {

struct BFloat16 {};
struct Float16 {};

#include "cpu/affine_argmax_vector.h"

}  // namespace

const ArgmaxBody* argmax_body_avx512(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return FloatArgmax<float, 16, 3, 8>::body();
    case Dtype::bfloat16:
      return FloatArgmax<BFloat16, 16, 3, 8>::body();
    case Dtype::float16:
      return FloatArgmax<Float16, 16, 3, 8>::body();
    case Dtype::float64:
      return FloatArgmax<double, 16, 3, 8>::body();
  }
  return nullptr;
}

}  // namespace ncfast

#pragma GCC pop_options

#endif

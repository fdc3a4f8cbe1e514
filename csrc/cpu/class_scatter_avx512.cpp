// class_scatter on AVX-512: 16 floats or 8 doubles, 3 x 8 register tiles.
#if defined(__x86_64__)

#include <cstdint>
#include <cstring>

#include "cpu/class_scatter.h"
#include "cpu/intrinsics.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")

namespace ncfast {
namespace {

#include "cpu/class_scatter_vector.h"
// After the vectors.
#include "cpu/float16_avx512.h"

}  // namespace

const ScatterBody* scatter_body_avx512(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return VectorBody<float, float, 16>::body<3, 8, 192>(1024);
    case Dtype::bfloat16:
      return VectorBody<BFloat16, float, 16>::body<3, 8, 192>(1024);
    case Dtype::float16:
      return VectorBody<Float16, float, 16>::body<3, 8, 192>(1024);
    case Dtype::float64:
      return VectorBody<double, double, 8>::body<3, 8, 192>(512);
  }
  return nullptr;
}

}  // namespace ncfast

#pragma GCC pop_options

#endif

// affine_argmax on AVX-512: 16 floats, 8 x 3 register tiles.
#if defined(__x86_64__)

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/affine_argmax.h"
#include "cpu/intrinsics.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")

namespace ncfast {
namespace {

#include "cpu/affine_argmax_vector.h"
// After the vectors.
#include "cpu/float16_avx512.h"

}  // namespace

const ArgmaxBody* argmax_body_avx512(Dtype dtype) { return float_argmax<16, 3, 8>(dtype); }

}  // namespace ncfast

#pragma GCC pop_options

#endif

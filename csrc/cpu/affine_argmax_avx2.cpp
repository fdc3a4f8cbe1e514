// affine_argmax on AVX2: 8 floats, 6 x 2 register tiles.
#if defined(__x86_64__)

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/affine_argmax.h"
#include "cpu/intrinsics.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace ncfast {
namespace {

#include "cpu/affine_argmax_vector.h"
// After the vectors.
#include "cpu/float16_avx2.h"

}  // namespace

const ArgmaxBody* argmax_body_avx2(Dtype dtype) { return float_argmax<8, 2, 6>(dtype); }

}  // namespace ncfast

#pragma GCC pop_options

#endif

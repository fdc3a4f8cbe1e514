// pair_geometry on AVX-512: 8 doubles, 3 x 8 register tiles.
#if defined(__x86_64__)

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/pair_geometry.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")

namespace ncfast {
namespace {

#include "cpu/pair_geometry_vector.h"

}  // namespace

const PairBody* pair_body_avx512() { return PairVectors<8>::body<3, 8>(); }
const PairScreen* pair_screen_avx512() { return FloatScreen<16>::screen<3, 8>(); }

}  // namespace ncfast

#pragma GCC pop_options

#endif

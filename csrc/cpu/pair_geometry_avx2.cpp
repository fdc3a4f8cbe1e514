// pair_geometry on AVX2 and FMA: 4 doubles, 3 x 4 register tiles.
#if defined(__x86_64__)

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/pair_geometry.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace ncfast {
namespace {

#include "cpu/pair_geometry_vector.h"

}  // namespace

const PairBody* pair_body_avx2() { return PairVectors<4>::body<3, 4>(); }
const PairScreen* pair_screen_avx2() { return FloatScreen<8>::screen<3, 4>(); }

}  // namespace ncfast

#pragma GCC pop_options

#endif

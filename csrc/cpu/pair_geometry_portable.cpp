// pair_geometry in plain C++, with the vectors of the compiler's baseline.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/pair_geometry.h"

namespace ncfast {
namespace {

#include "cpu/pair_geometry_vector.h"

}  // namespace

const PairBody* pair_body_portable() { return PairVectors<2>::body<2, 4>(); }
const PairScreen* pair_screen_portable() { return FloatScreen<4>::screen<2, 4>(); }

}  // namespace ncfast

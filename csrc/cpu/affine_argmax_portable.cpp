// affine_argmax in plain C++, with the vectors of the compiler's baseline.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/affine_argmax.h"

namespace ncfast {
namespace {

#include "cpu/affine_argmax_vector.h"

}  // namespace

const ArgmaxBody* argmax_body_portable(Dtype dtype) { return float_argmax<4, 2, 4>(dtype); }

}  // namespace ncfast

// class_scatter in plain C++, with the vectors of the compiler's baseline.
#include <cstdint>
#include <cstring>

#include "cpu/class_scatter.h"

namespace ncfast {
namespace {

#include "cpu/class_scatter_vector.h"

}  // namespace

const ScatterBody* scatter_body_portable(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return VectorBody<float, float, 4>::body<2, 4, 96>(512);
    case Dtype::bfloat16:
      return VectorBody<BFloat16, float, 4>::body<2, 4, 96>(512);
    case Dtype::float16:
      return VectorBody<Float16, float, 4>::body<2, 4, 96>(512);
    case Dtype::float64:
      return VectorBody<double, double, 2>::body<2, 2, 96>(512);
  }
  return nullptr;
}

}  // namespace ncfast

#pragma once

namespace ncfast {

enum class Dtype { float32, float64, bfloat16, float16 };

constexpr int element_bytes(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

}  // namespace ncfast

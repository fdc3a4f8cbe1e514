// How features are stored, and what they are computed in.
#pragma once

#include <cstdint>

#include "cuda/dtype.h"

namespace ncfast {

template <Dtype>
struct Element;

template <>
struct Element<Dtype::float32> {
  using Stored = float;
  using Real = float;
  __device__ static float real(float x) { return x; }
};

template <>
struct Element<Dtype::float64> {
  using Stored = double;
  using Real = double;
  __device__ static double real(double x) { return x; }
};

template <>
struct Element<Dtype::bfloat16> {
  using Stored = uint16_t;
  using Real = float;
  __device__ static float real(uint16_t x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }
};

template <>
struct Element<Dtype::float16> {
  using Stored = uint16_t;
  using Real = float;
  __device__ static float real(uint16_t x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
    return wide;
  }
};

}  // namespace ncfast

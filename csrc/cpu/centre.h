// out = h - m in float32. Included like class_scatter_vector.h, and after it.

// |(h - m) - out| <= kRounded |out|: a float32 difference is rounded once, by 2^-24 relative; a float64
// feature first loses as much again.
constexpr double kRounded = 0x1p-23;

// Returns |out|, rounded up.
template <class Feature, int W>
inline double centre(const char* features, const float* middle, int64_t p, float* out) {
  using Wide = Vec<double, W>;
  Wide squares = {};
  for (int64_t j = 0; j < p; j += W) {
    const int count = static_cast<int>(p - j < W ? p - j : W);
    Vec<float, W> d;
    if constexpr (std::is_same_v<Feature, double>) {
      const Wide wide = load<double, double, W>(features, j, count) -
                        __builtin_convertvector((load<float, float, W>(reinterpret_cast<const char*>(middle), j, count)), Wide);
      d = __builtin_convertvector(wide, Vec<float, W>);
    } else {
      d = load<Feature, float, W>(features, j, count) -
          load<float, float, W>(reinterpret_cast<const char*>(middle), j, count);
    }
    const Wide exact = __builtin_convertvector(d, Wide);
    squares += exact * exact;
    std::memcpy(out + j, &d, count * sizeof(float));
  }
  return std::sqrt(sum<double, W>(squares)) * (1 + 1e-9);
}

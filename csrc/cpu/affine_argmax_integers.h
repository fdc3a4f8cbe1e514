// Rows and classes as 8- or 16-bit integers times a scale each, for the bodies of affine_argmax that multiply
// those. Included like affine_argmax_vector.h, after it; needs AVX-512, <algorithm>, <cmath> and <limits>.

// Of up to p / 16 + 8 float32 additions each.
struct Squares {
  __m512 all, residual, low;

  static double norm(__m512 squares, int64_t p) {
    const double lost = static_cast<double>(p) * 0x1p-124;  // squares that underflowed
    return std::sqrt(_mm512_reduce_add_ps(squares) + lost) * (1 + (p + 256) * 0x1p-27);
  }

  Norms norms(int64_t p, bool has_low) const {
    const double d = norm(all, p), r = norm(residual, p);
    return {d + r, r + kRounded * d, has_low ? norm(low, p) : 0};
  }
};

// Columns [j, j + 16) of h - m, zeros from p on.
template <class Feature>
inline __m512 sixteen(const char* features, const float* middle, int64_t j, int64_t p) {
  const int64_t count = p - j < 16 ? p - j : 16;
  if (count <= 0) return _mm512_setzero_ps();
  return (__m512)centred<Feature, 16>(features, middle, j, static_cast<int>(count));
}

// As many products of 8-bit numbers, 128² or less each, as surely fit an int32.
constexpr int64_t kMostOf8Bits = 131'071;

// What 1 stands for. 8-bit numbers end at 127: the sum of their products fits for so many columns. 16-bit
// ones end at 32767 or have norm 46330, whichever is less, after a rounding of up to 1/2 each: 46340^2 <
// 2^31, so by Cauchy and Schwarz any two of them have a product that fits.
template <class Integer, class Norm>
inline float scale_of(double largest, const Norm& norm, int64_t p) {
  double scale = largest / std::numeric_limits<Integer>::max();
  if constexpr (sizeof(Integer) == 2) {
    const double room = 46330 - std::sqrt(static_cast<double>(p)) / 2;
    scale = std::max(scale, norm() / std::max(room, 0.0));
  }
  // The scale and its inverse are to be finite: what has no such scale is all residual.
  return scale < 0x1p-126 || scale > 0x1p126 ? 0 : static_cast<float>(scale);
}

// A sum of integers is exact; it is rounded, multiplied by two scales, and the bias is added.
constexpr double kDepthOfIntegers = 8;

// Both scales at once: with one of them alone a score may leave the range that was bounded.
inline Vec<float, 16> scaled(const Vec<int32_t, 16>& sum, const Vec<float, 16>& class_scale, float row_scale,
                             const Vec<float, 16>& bias) {
  return __builtin_convertvector(sum, Vec<float, 16>) * (class_scale * row_scale) + bias;
}

// `store` gets the columns 16 at a time, in pieces that begin before `end`, with zeros from p on. Reads the
// row twice, the second time from the first-level cache. A row of null is one of zeros.
template <class Integer, class Feature, class Store>
inline Squares pack_integers(const char* features, const float* middle, int64_t p, int64_t end, float* scale,
                             const Store& store) {
  const __m512 zero = _mm512_setzero_ps();
  Squares squares = {zero, zero, zero};
  __m512 largest = zero;
  for (int64_t j = 0; features && j < p; j += 16) {
    const __m512 d = sixteen<Feature>(features, middle, j, p);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(d));
    squares.all = _mm512_fmadd_ps(d, d, squares.all);
  }
  const auto norm = [&] { return Squares::norm(squares.all, p); };
  *scale = scale_of<Integer>(_mm512_reduce_max_ps(largest), norm, p);
  const __m512 unit = _mm512_set1_ps(*scale), inverse = _mm512_set1_ps(*scale > 0 ? 1 / *scale : 0);
  for (int64_t j = 0; j < end; j += 16) {
    const __m512 d = features ? sixteen<Feature>(features, middle, j, p) : zero;
    __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(d, inverse));
    if constexpr (sizeof(Integer) == 1) {
      const __m128i numbers = _mm512_cvtsepi32_epi8(whole);
      store(j, numbers);
      whole = _mm512_cvtepi8_epi32(numbers);
    } else {
      const __m256i numbers = _mm512_cvtsepi32_epi16(whole);
      store(j, numbers);
      whole = _mm512_cvtepi16_epi32(numbers);
    }
    const __m512 lost = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(whole), unit, d);
    squares.residual = _mm512_fmadd_ps(lost, lost, squares.residual);
  }
  return squares;
}

// The same of a class, 8 columns at a time; a NaN passes into the norms.
template <class Integer, class Store>
inline Norms pack_integers(const double* row, int64_t p, int64_t end, float* scale, const Store& store) {
  const __m512d zero = _mm512_setzero_pd();
  __m512d largest = zero, squares = zero, seen = zero, residual = zero;
  const auto read = [&](int64_t j) {
    if (!row || j >= p) return zero;
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>(p - j < 8 ? (1 << (p - j)) - 1 : 0xff), row + j);
  };
  for (int64_t j = 0; j < p; j += 8) {
    const __m512d exact = read(j);
    largest = _mm512_max_pd(largest, _mm512_abs_pd(exact));
    squares = _mm512_fmadd_pd(exact, exact, squares);
  }
  const auto norm = [&] { return std::sqrt(_mm512_reduce_add_pd(squares)); };
  *scale = scale_of<Integer>(_mm512_reduce_max_pd(largest), norm, p);
  const __m512d unit = _mm512_set1_pd(*scale), inverse = _mm512_set1_pd(*scale > 0 ? 1.0 / *scale : 0);
  for (int64_t j = 0; j < end; j += 8) {
    const __m512d exact = read(j);
    __m256i whole = _mm512_cvtpd_epi32(_mm512_mul_pd(exact, inverse));
    if constexpr (sizeof(Integer) == 1) {
      const __m128i numbers = _mm256_cvtsepi32_epi8(whole);
      store(j, numbers);
      whole = _mm256_cvtepi8_epi32(numbers);
    } else {
      const __m128i numbers = _mm256_cvtsepi32_epi16(whole);
      store(j, numbers);
      whole = _mm256_cvtepi16_epi32(numbers);
    }
    const __m512d value = _mm512_mul_pd(_mm512_cvtepi32_pd(whole), unit);
    const __m512d lost = _mm512_sub_pd(exact, value);
    seen = _mm512_fmadd_pd(value, value, seen);
    residual = _mm512_fmadd_pd(lost, lost, residual);
  }
  return {std::sqrt(_mm512_reduce_add_pd(seen)), std::sqrt(_mm512_reduce_add_pd(residual)), 0};
}

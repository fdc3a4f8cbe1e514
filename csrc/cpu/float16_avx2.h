// float16 by the processor's own instruction. Included after class_scatter_vector.h, as that is; needs
// "cpu/intrinsics.h".

template <>
inline Vec<float, 8> widen<8>(const Vec<uint16_t, 8>& half, Float16) {
  return same_bits<Vec<float, 8>>(_mm256_cvtph_ps(same_bits<__m128i>(half)));
}

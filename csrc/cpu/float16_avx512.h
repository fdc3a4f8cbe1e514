// float16 by the processor's own instruction. Included after class_scatter_vector.h, as that is; needs
// "cpu/intrinsics.h".

template <>
inline Vec<float, 16> widen<16>(const Vec<uint16_t, 16>& half, Float16) {
  return same_bits<Vec<float, 16>>(_mm512_cvtph_ps(same_bits<__m256i>(half)));
}

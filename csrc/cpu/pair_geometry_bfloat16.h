// What the screens of pair_geometry in bfloat16 share: how rows are packed, as one bfloat16 per number or as
// two. Included like class_scatter_vector.h.
//
// A block holds its 48 rows 16 by 16, every 32 columns of those a tile of 1 KiB: on the right row by row, on
// the left 16 pairs of columns by 16 rows, as 32-bit words the transpose.

constexpr int64_t kTile = 1024;
constexpr int kRows = 16;  // of a tile

int64_t steps(int64_t p) { return (p + 31) / 32; }

// Of 16 rows.
template <int Level>
int64_t bytes(int64_t p) {
  return steps(p) * (Level + 1) * kTile;
}

template <int Level>
int64_t offset(int64_t p, int r) {
  return r / kRows * bytes<Level>(p) + r % kRows * 64;
}

__m512d load(const double* row, int64_t j, int64_t p, double scale) {
  const int64_t rest = p - j;
  const __mmask8 mask = rest >= 8 ? 0xff : rest <= 0 ? 0 : (1 << rest) - 1;
  return _mm512_mul_pd(_mm512_maskz_loadu_pd(mask, row + j), _mm512_set1_pd(scale));
}

template <int Level>
Packed pack(const double* row, double scale, int64_t p, char* out) {
  __m512d lost = _mm512_setzero_pd(), low = lost;
  for (int64_t step = 0; step < steps(p); step++) {
    __m512d rest[4];
    for (int q = 0; q < 4; q++) rest[q] = load(row, step * 32 + q * 8, p, scale);
    for (int part = 0; part <= Level; part++, out += kTile) {
      __m512 single[2];
      for (int q = 0; q < 2; q++) {
        single[q] = _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(rest[2 * q])),
                                       _mm512_cvtpd_ps(rest[2 * q + 1]), 1);
      }
      const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(single[1], single[0]);
      _mm512_store_si512(out, halves);
      alignas(64) uint16_t bits[32];
      _mm512_store_si512(bits, halves);
      for (int q = 0; q < 4; q++) {
        const __m128i eight = _mm_load_si128(reinterpret_cast<const __m128i*>(bits + 8 * q));
        const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16);
        const __m512d packed = _mm512_cvtps_pd(_mm256_castsi256_ps(wide));
        rest[q] = _mm512_sub_pd(rest[q], packed);
        if (part) low = _mm512_fmadd_pd(packed, packed, low);
      }
    }
    for (const __m512d& value : rest) lost = _mm512_fmadd_pd(value, value, lost);
  }
  constexpr double kUp = 1 + 0x1p-30;  // the rounding of these
  return {std::sqrt(_mm512_reduce_add_pd(lost)) * kUp, std::sqrt(_mm512_reduce_add_pd(low)) * kUp};
}

// As 32-bit words, a tile of a left block is that of a right one transposed.
template <int Level>
void transpose(const char* const rows[kSide], int64_t p, char* left) {
  for (int first = 0; first < kSide; first += kRows) {
    for (int64_t at = 0; at < bytes<Level>(p); at += kTile, left += kTile) {
      __m512i lines[kRows];
      for (int r = 0; r < kRows; r++) lines[r] = _mm512_load_si512(rows[first + r] + at);
      store_transposed(lines, left);
    }
  }
}

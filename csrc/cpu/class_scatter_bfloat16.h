// What the bodies that multiply bfloat16 share: the pack stage. Included like class_scatter_vector.h.

constexpr int kSide = 16;  // columns of a piece
constexpr int64_t kTileBytes = kGroup * kSide * 2;

struct BFloat16 {};
struct Float16 {};

// Of the first `count` of a piece's columns, count >= 1.
__mmask16 mask_of(int64_t count) { return count >= kSide ? 0xffff : (1 << count) - 1; }

__m512 load(const char* row, int64_t column, __mmask16 mask, float) {
  return _mm512_maskz_loadu_ps(mask, row + column * 4);
}

__m512 load(const char* row, int64_t column, __mmask16 mask, BFloat16) {
  const __m256i half = _mm256_maskz_loadu_epi16(mask, row + column * 2);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

__m512 load(const char* row, int64_t column, __mmask16 mask, Float16) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, row + column * 2));
}

void add_to(double* sums, __m512 values, __mmask16 mask) {
  const __mmask8 low = mask, high = mask >> 8;
  const __m512d first = _mm512_cvtps_pd(_mm512_castps512_ps256(values));
  const __m512d second = _mm512_cvtps_pd(_mm512_extractf32x8_ps(values, 1));
  _mm512_mask_storeu_pd(sums, low, _mm512_add_pd(_mm512_maskz_loadu_pd(low, sums), first));
  _mm512_mask_storeu_pd(sums + 8, high, _mm512_add_pd(_mm512_maskz_loadu_pd(high, sums + 8), second));
}

// The residuals of rows [first, first + Rows) of a group, read side by side; of those that it lacks, zeros.
// From `out` on, the words of a pair of rows lie 64 bytes after those of the pair before.
template <class Feature, bool Split, int Rows, bool Ask>
void pack_rows(const Group& group, int first, int64_t p, char* out, double* column_squares, float* squares) {
  constexpr int64_t kBytes = kTileBytes * (Split ? 2 : 1), kSize = std::is_same_v<Feature, float> ? 4 : 2;
  // Of two vectors packed to bfloat16, the first into the lower half.
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const int rows = group.rows - first < Rows ? group.rows - first : Rows;
  __m512 square[Rows];
  for (__m512& s : square) s = _mm512_setzero_ps();
  for (int64_t j = 0; j < p; j += kSide, out += kBytes) {
    const __mmask16 mask = mask_of(p - j);
    __m512 total = _mm512_setzero_ps(), columns = _mm512_setzero_ps();
    const auto residual = [&](int r) [[gnu::always_inline]] {
      if (r >= rows) return _mm512_setzero_ps();
      const int i = first + r;
      if (Ask) _mm_prefetch(group.next[i] + j * kSize, _MM_HINT_T1);
      const __m512 k = _mm512_maskz_loadu_ps(mask, group.shift[i] + j * 4);
      const __m512 d = _mm512_sub_ps(load(group.features[i], j, mask, Feature{}), k);
      const __m512 dd = _mm512_mul_ps(d, d);
      columns = _mm512_add_ps(columns, dd);
      square[r] = _mm512_add_ps(square[r], dd);
      total = _mm512_add_ps(total, d);
      if (group.last[i] || r + 1 == rows) {
        add_to(group.sums[i] + j, total, mask);
        total = _mm512_setzero_ps();
      }
      return d;
    };
#pragma GCC unroll 4
    for (int q = 0; q < Rows / 2; q++) {
      const __m512 d0 = residual(2 * q), d1 = residual(2 * q + 1);
      const __m512i high = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(d1, d0));
      _mm512_store_si512(out + q * 64, high);
      if (Split) {
        const __m512 h0 = _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
        const __m512 h1 = _mm512_castsi512_ps(_mm512_and_si512(high, _mm512_set1_epi32(0xffff0000)));
        const __m512bh rest = _mm512_cvtne2ps_pbh(_mm512_sub_ps(d1, h1), _mm512_sub_ps(d0, h0));
        _mm512_store_si512(out + kTileBytes + q * 64, _mm512_permutexvar_epi16(interleave, (__m512i)rest));
      }
    }
    add_to(column_squares + j, columns, mask);
  }
  for (int r = 0; r < rows; r++) squares[first + r] = _mm512_reduce_add_ps(square[r]);
}

// The residuals of a group, each as one bfloat16 or, if Split, as two. A panel is [stride / 32][padded / 16]
// [1 or 2: high, low] tiles of [16 pairs of rows][16 columns] words of two bfloat16, so that the columns of a
// tile of the scatter do not compete for the same sets of a cache. Rows that the group lacks are zeros.
// Of long rows only a few are read side by side, as the processor's own prefetchers follow no more. Whether
// to ask for those by software, too, is for the body.
template <class Feature, bool Split, bool AskForLong>
void pack_as(const Group& group, int64_t row, const Panel& panel, double* column_squares, float* squares) {
  constexpr int64_t kLong = 2048, kSize = std::is_same_v<Feature, float> ? 4 : 2;
  constexpr int kFew = 8;
  const int64_t p = panel.p;
  char* out = panel.data + row / kGroup * (panel.padded / kSide) * kTileBytes * (Split ? 2 : 1);
  if (p * kSize < kLong)
    return pack_rows<Feature, Split, kGroup, true>(group, 0, p, out, column_squares, squares);
  for (int first = 0; first < kGroup; first += kFew, out += kFew / 2 * 64)
    pack_rows<Feature, Split, kFew, AskForLong>(group, first, p, out, column_squares, squares);
}

// Screening for pair_geometry on AMX: one bfloat16 per number, or two (hi hi + hi lo + lo hi).
//
// A block holds its 48 rows 16 by 16, every 32 columns of those a tile of 1 KiB: on the right row by row, on
// the left as TDPBF16PS wants its second factor, 16 pairs of columns by 16 rows.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/amx.h"
#include "cpu/pair_geometry.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")

namespace ncfast {
namespace {

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

// As affine_argmax_amx.cpp has it.
template <int Level>
double depth(int64_t p) {
  return 2 * (18 + static_cast<double>(steps(p)) * (Level ? 3 : 1));
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

// 48 rows j by the 16 rows i of one left block, or of two, accumulated in tile registers 0 to 2 and 3 to 5.
// The second meets the right rows while they are in the first-level cache.
template <bool Both>
[[gnu::always_inline]] inline void add_products(const char* left, const char* other, const char* right,
                                                int64_t next) {
  _tile_loadd(6, left, 64);
  _tile_loadd(7, right, 64);
  _tile_dpbf16ps(0, 7, 6);
  _tile_loadd(7, right + next, 64);
  _tile_dpbf16ps(1, 7, 6);
  _tile_loadd(7, right + 2 * next, 64);
  _tile_dpbf16ps(2, 7, 6);
  if (!Both) return;
  _tile_loadd(6, other, 64);
  _tile_dpbf16ps(5, 7, 6);
  _tile_loadd(7, right + next, 64);
  _tile_dpbf16ps(4, 7, 6);
  _tile_loadd(7, right, 64);
  _tile_dpbf16ps(3, 7, 6);
}

// tile[j][i] of 16 rows i, and where there is a second left block those of its rows.
template <int Level, bool Both>
void multiply(const char* left, const char* other, const char* right, int64_t next, float* tile,
              float* other_tile) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t at = 0; at < next; at += (Level + 1) * kTile) {
    add_products<Both>(left + at, other + at, right + at, next);
    if (Level) {
      add_products<Both>(left + at + kTile, other + at + kTile, right + at, next);
      add_products<Both>(left + at, other + at, right + at + kTile, next);
    }
  }
  constexpr size_t kStride = kSide * sizeof(float);
  _tile_stored(0, tile, kStride);
  _tile_stored(1, tile + kRows * kSide, kStride);
  _tile_stored(2, tile + 2 * kRows * kSide, kStride);
  if (!Both) return;
  _tile_stored(3, other_tile, kStride);
  _tile_stored(4, other_tile + kRows * kSide, kStride);
  _tile_stored(5, other_tile + 2 * kRows * kSide, kStride);
}

template <int Level>
void products(const char* left, const char* other, const char* right, int64_t p, float* tile,
              float* other_tile) {
  static_assert(kSide == 3 * kRows);
  const TileConfiguration config;
  _tile_loadconfig(&config);
  const int64_t next = bytes<Level>(p);  // from 16 rows to the following ones
  if (other) {
    for (int i = 0; i < kSide; i += kRows, left += next, other += next)
      multiply<Level, true>(left, other, right, next, tile + i, other_tile + i);
  } else {
    multiply<Level, true>(left, left + next, right, next, tile, tile + kRows);
    multiply<Level, false>(left + 2 * next, left, right, next, tile + 2 * kRows, nullptr);
  }
  _tile_release();
}

template <int Level>
const PairScreen* screen() {
  static const PairScreen table = {offset<Level>, pack<Level>, transpose<Level>, depth<Level>,
                                   products<Level>};
  return &table;
}

}  // namespace

const PairScreen* pair_screen_amx(int level) { return level ? screen<1>() : screen<0>(); }

}  // namespace ncfast

#pragma GCC pop_options

#endif

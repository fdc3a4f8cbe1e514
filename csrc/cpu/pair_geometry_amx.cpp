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

template <int Level>
size_t block(int64_t p) {
  return kSide / kRows * steps(p) * (Level + 1) * kTile;
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

void store(__m512i halves, bool left, char* out) {
  if (!left) {
    _mm512_store_si512(out, halves);
    return;
  }
  alignas(64) uint32_t pairs[kRows];
  _mm512_store_si512(pairs, halves);
  for (int pair = 0; pair < kRows; pair++) std::memcpy(out + pair * 64, &pairs[pair], 4);
}

template <int Level, bool Left>
Packed pack(const double* row, double scale, int64_t p, int r, char* block) {
  char* out = block + r / kRows * steps(p) * (Level + 1) * kTile + r % kRows * (Left ? 4 : 64);
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
      store(halves, Left, out);
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

// 48 rows j by 16 rows i, accumulated in tile registers 0 to 2.
[[gnu::always_inline]] inline void add_products(const char* left, const char* right, int64_t next) {
  _tile_loadd(6, left, 64);
  _tile_loadd(3, right, 64);
  _tile_dpbf16ps(0, 3, 6);
  _tile_loadd(4, right + next, 64);
  _tile_dpbf16ps(1, 4, 6);
  _tile_loadd(5, right + 2 * next, 64);
  _tile_dpbf16ps(2, 5, 6);
}

// tile[j][i].
template <int Level>
void products(const char* left, const char* right, int64_t p, float* tile) {
  static_assert(kSide == 3 * kRows);
  const TileConfiguration config;
  _tile_loadconfig(&config);
  const int64_t next = steps(p) * (Level + 1) * kTile;  // from 16 rows to the following ones
  for (int i = 0; i < kSide; i += kRows, left += next) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    for (int64_t at = 0; at < next; at += (Level + 1) * kTile) {
      add_products(left + at, right + at, next);
      if (Level) {
        add_products(left + at + kTile, right + at, next);
        add_products(left + at, right + at + kTile, next);
      }
    }
    _tile_stored(0, tile + i, kSide * sizeof(float));
    _tile_stored(1, tile + kRows * kSide + i, kSide * sizeof(float));
    _tile_stored(2, tile + 2 * kRows * kSide + i, kSide * sizeof(float));
  }
  _tile_release();
}

template <int Level>
const PairScreen* screen() {
  static const PairScreen table = {block<Level>, pack<Level, true>, pack<Level, false>, depth<Level>,
                                   products<Level>};
  return &table;
}

}  // namespace

const PairScreen* pair_screen_amx(int level) { return level ? screen<1>() : screen<0>(); }

}  // namespace ncfast

#pragma GCC pop_options

#endif

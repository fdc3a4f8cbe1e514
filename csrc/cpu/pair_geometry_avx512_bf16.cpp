// Screening for pair_geometry with AVX-512's products of bfloat16, one per number: four times as fast as
// float64. Blocks as in pair_geometry_bfloat16.h.
#if defined(__x86_64__)

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/amx.h"
#include "cpu/pair_geometry.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16")

namespace ncfast {
namespace {

#include "cpu/pair_geometry_bfloat16.h"

constexpr int64_t kSteps = 4;  // tiles of 32 columns whose products are added before they meet others
constexpr int kGroups = kSide / kRows, kLines = 8;  // of a register tile: 48 rows i by 8 rows j

// Each product of two pairs is added in two steps. Twice that, as affine_argmax_amx.cpp has it.
double depth(int64_t p) {
  return 2 * (32 * static_cast<double>(kSteps) + static_cast<double>((steps(p) + kSteps - 1) / kSteps));
}

// tile[j][i] += over `columns`, in tiles; `next` bytes on are the following 16 rows.
void register_tile(const char* left, const char* right, int64_t next, int64_t columns, float* tile) {
  __m512 total[kLines][kGroups];
#pragma GCC unroll 8
  for (int j = 0; j < kLines; j++) {
#pragma GCC unroll 3
    for (int i = 0; i < kGroups; i++) total[j][i] = _mm512_setzero_ps();
  }
  for (int64_t at = 0; at < columns * kTile; at += kTile) {
    for (int pair = 0; pair < kRows; pair++) {
      __m512bh u[kGroups];
#pragma GCC unroll 3
      for (int i = 0; i < kGroups; i++) u[i] = (__m512bh)_mm512_load_si512(left + i * next + at + pair * 64);
#pragma GCC unroll 8
      for (int j = 0; j < kLines; j++) {
        int32_t word;
        std::memcpy(&word, right + at + j * 64 + pair * 4, sizeof word);
        const __m512bh factor = (__m512bh)_mm512_set1_epi32(word);
#pragma GCC unroll 3
        for (int i = 0; i < kGroups; i++) total[j][i] = _mm512_dpbf16_ps(total[j][i], u[i], factor);
      }
    }
  }
  for (int j = 0; j < kLines; j++) {
    for (int i = 0; i < kGroups; i++) {
      float* sum = tile + j * kSide + i * kRows;
      _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), total[j][i]));
    }
  }
}

void products(const char* left, const char* other, const char* right, int64_t p, float* tile,
              float* other_tile) {
  std::memset(tile, 0, kSide * kSide * sizeof(float));
  if (other) std::memset(other_tile, 0, kSide * kSide * sizeof(float));
  const int64_t next = bytes<0>(p);
  for (int64_t step = 0; step < steps(p); step += kSteps) {
    const int64_t columns = steps(p) - step < kSteps ? steps(p) - step : kSteps, at = step * kTile;
    for (int j = 0; j < kSide; j += kLines) {
      const char* rows = right + offset<0>(p, j) + at;
      register_tile(left + at, rows, next, columns, tile + j * kSide);
      if (other) register_tile(other + at, rows, next, columns, other_tile + j * kSide);
    }
  }
}

}  // namespace

const PairScreen* pair_screen_avx512_bf16() {
  static const PairScreen table = {offset<0>, pack<0>, transpose<0>, depth, products};
  return &table;
}

}  // namespace ncfast

#pragma GCC pop_options

#endif

// Screening for pair_geometry on AMX: one bfloat16 per number, or two (hi hi + hi lo + lo hi). Blocks as in
// pair_geometry_bfloat16.h: on the right TDPBF16PS's first factor, on the left its second.
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

#include "cpu/pair_geometry_bfloat16.h"

// As affine_argmax_amx.cpp has it.
template <int Level>
double depth(int64_t p) {
  return 2 * (18 + static_cast<double>(steps(p)) * (Level ? 3 : 1));
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
  _tile_loadconfig(&kTileConfiguration);
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

// affine_argmax on AMX: level 0 scores one bfloat16 per number, level 1 two (hi hi + hi lo + lo hi).
//
// Block and panel are made of 1 KiB tiles: 16 rows x 32 columns of a block, 32 columns x 16 classes of a
// panel with the columns in pairs, as TDPBF16PS wants them; at level 1 every tile of high parts is followed
// by that of the low ones. 32 rows x 32 classes are accumulated in four tile registers over all columns,
// beginning with the bias.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/affine_argmax.h"
#include "cpu/amx.h"

#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")

namespace ncfast {
namespace {

#include "cpu/affine_argmax_vector.h"

constexpr int kTile = 1024, kSide = 32;

// Round to nearest even; what would be a denormal becomes zero, as the tile unit would take it anyway: its
// whole value then counts as residual.
uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7f800000) == 0) return static_cast<uint16_t>(bits >> 16 & 0x8000);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // stay a NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

__m512 widened(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

template <class Feature>
struct TileArgmax {
  using Float = FloatArgmax<Feature, 16, 2, 1>;
  using Lanes = typename Float::Lanes;

  static int64_t columns(int64_t p) { return (p + 31) / 32 * 32; }

  // A product passes the 16 FMAs of its half of a tile, the addition of the two halves, and that to the
  // accumulator once per tile. Twice that, in case a processor orders them otherwise.
  static double depth(int64_t p, int level) {
    return 2 * (18 + static_cast<double>(columns(p)) / 32 * (level ? 3 : 1));
  }

  static void pack_rule(const double* weight, int64_t C, int64_t p, int level, int64_t first, char* panel,
                        Norms* norms) {
    const int64_t steps = columns(p) / 32;
    *norms = {0, 0, 0};
    for (int64_t c = 0; c < kSide; c++) {
      double seen = 0, residual = 0, low = 0;
      for (int64_t j = 0; j < 32 * steps; j++) {
        const double exact = first + c < C && j < p ? weight[(first + c) * p + j] : 0;
        char* at = panel + ((c / 16 * steps + j / 32) * (level + 1)) * kTile + j % 32 / 2 * 64 + c % 16 * 4 +
                   j % 2 * 2;
        const uint16_t hi = to_bfloat16(static_cast<float>(exact));
        std::memcpy(at, &hi, sizeof hi);
        double value = from_bfloat16(hi);
        if (level) {
          const uint16_t lo = to_bfloat16(static_cast<float>(exact - value));
          std::memcpy(at + kTile, &lo, sizeof lo);
          value += from_bfloat16(lo);
          low += static_cast<double>(from_bfloat16(lo)) * from_bfloat16(lo);
        }
        seen += value * value;
        residual += (exact - value) * (exact - value);
      }
      const double found[] = {std::sqrt(seen), std::sqrt(residual), std::sqrt(low)};
      norms->seen = found[0] <= norms->seen ? norms->seen : found[0];
      norms->residual = found[1] <= norms->residual ? norms->residual : found[1];
      norms->low = found[2] <= norms->low ? norms->low : found[2];
    }
  }

  // Columns [j, j + 16) of h - m.
  static __m512 centred(const char* features, const float* middle, int64_t j, int64_t p) {
    const int count = static_cast<int>(p - j < 16 ? p - j : 16);
    if (count <= 0) return _mm512_setzero_ps();
    const auto m = load<float, float, 16>(reinterpret_cast<const char*>(middle), j, count);
    if constexpr (std::is_same_v<Feature, double>) {
      const auto wide =
          load<double, double, 16>(features, j, count) - __builtin_convertvector(m, Vec<double, 16>);
      return (__m512) __builtin_convertvector(wide, Vec<float, 16>);
    } else {
      return (__m512)(load<Feature, float, 16>(features, j, count) - m);
    }
  }

  static void pack_row(const char* features, const float* middle, int64_t p, int level, int64_t row,
                       char* block, Norms* norms) {
    const int64_t steps = columns(p) / 32;
    char* out = block + row / 16 * steps * (level + 1) * kTile + row % 16 * 64;
    __m512 size = _mm512_setzero_ps(), residual = size, low = size;
    for (int64_t step = 0; step < steps; step++, out += (level + 1) * kTile) {
      __m512 d0 = _mm512_setzero_ps(), d1 = d0;
      if (features) {
        d0 = centred(features, middle, step * 32, p);
        d1 = centred(features, middle, step * 32 + 16, p);
      }
      size = _mm512_fmadd_ps(d0, d0, _mm512_fmadd_ps(d1, d1, size));
      for (int part = 0; part <= level; part++) {
        const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(d1, d0);
        _mm512_store_si512(out + part * kTile, halves);
        const __m512 x0 = widened(_mm512_castsi512_si256(halves));
        const __m512 x1 = widened(_mm512_extracti64x4_epi64(halves, 1));
        d0 = _mm512_sub_ps(d0, x0);
        d1 = _mm512_sub_ps(d1, x1);
        if (part) low = _mm512_fmadd_ps(x0, x0, _mm512_fmadd_ps(x1, x1, low));
      }
      residual = _mm512_fmadd_ps(d0, d0, _mm512_fmadd_ps(d1, d1, residual));
    }
    const double lost = std::sqrt(static_cast<double>(p)) * 0x1p-62;  // in squares that underflowed
    const double d = norm(size, p) + lost, r = norm(residual, p) + lost;
    *norms = {d + r, r + kRounded * d, level ? norm(low, p) + lost : 0};
  }

  // Of sums of squares: up to p / 16 + 8 float32 additions each.
  static double norm(__m512 squares, int64_t p) {
    return std::sqrt(static_cast<double>(_mm512_reduce_add_ps(squares))) * (1 + (p + 256) * 0x1p-27);
  }

  static size_t scratch(int64_t rows) { return rows * sizeof(Lanes) + 2 * kSide * kSide * sizeof(float); }

  // Scores of 32 rows x 32 classes, and the rows' best so far. They are reduced while the next ones are
  // multiplied: that keeps the tile unit busy and leaves the vector units idle.
  struct Scores {
    const float* scores;
    Lanes* lanes;
    Vec<int32_t, 16> index;

    void reduce(int64_t first, int64_t end) const {
      for (int64_t r = first; r < end; r++) {
        Lanes row = lanes[r];
        for (int half = 0; half < 2; half++) {
          Vec<float, 16> score;
          std::memcpy(&score, scores + r * kSide + half * 16, sizeof score);
          Float::update(row, score, index + 16 * half);
        }
        lanes[r] = row;
      }
    }
  };

  template <int Level>
  static void accumulate(const char* a, const char* b, int64_t steps, const Scores* before) {
    const int64_t next = steps * (Level + 1) * kTile;  // the tile 16 rows, or classes, further on
    for (int64_t step = 0; step < steps; step++, a += (Level + 1) * kTile, b += (Level + 1) * kTile) {
      if (before) before->reduce(step * kSide / steps, (step + 1) * kSide / steps);
      _tile_loadd(4, a, 64);
      _tile_loadd(5, a + next, 64);
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + next, 64);
      products();
      if constexpr (Level == 1) {
        _tile_loadd(6, b + kTile, 64);
        _tile_loadd(7, b + next + kTile, 64);
        products();
        _tile_loadd(4, a + kTile, 64);
        _tile_loadd(5, a + next + kTile, 64);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + next, 64);
        products();
      }
    }
  }

  [[gnu::always_inline]] static void products() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  static void score(const char* block, int64_t rows, const char* panel, const float* bias, int64_t classes,
                    int64_t p, int level, char* scratch, TopTwo* top) {
    Lanes* lanes = reinterpret_cast<Lanes*>(scratch);
    float *const both = reinterpret_cast<float*>(scratch + rows * sizeof(Lanes)), *scores = both;
    const Vec<float, 16> nothing = Vec<float, 16>{} - __builtin_inff();
    for (int64_t i = 0; i < rows; i++) lanes[i] = {nothing, nothing, Vec<int32_t, 16>{}};
    const int64_t steps = columns(p) / 32, bytes = steps * (level + 1) * kTile;
    Vec<int32_t, 16> lane;
    for (int i = 0; i < 16; i++) lane[i] = i;
    const TileConfiguration config;
    _tile_loadconfig(&config);
    Scores before = {nullptr, nullptr, lane};
    for (int64_t c = 0; c < classes; c += kSide) {
      for (int64_t i = 0; i < rows; i += kSide) {
        // A stride of 0 fills all 16 rows of a tile with the biases of its classes.
        _tile_loadd(0, bias + c, 0);
        _tile_loadd(1, bias + c + 16, 0);
        _tile_loadd(2, bias + c, 0);
        _tile_loadd(3, bias + c + 16, 0);
        const char *a = block + i / 16 * bytes, *b = panel + c / 16 * bytes;
        const Scores* pending = before.scores ? &before : nullptr;
        if (level) {
          accumulate<1>(a, b, steps, pending);
        } else {
          accumulate<0>(a, b, steps, pending);
        }
        _tile_stored(0, scores, kSide * sizeof(float));
        _tile_stored(1, scores + 16, kSide * sizeof(float));
        _tile_stored(2, scores + 16 * kSide, kSide * sizeof(float));
        _tile_stored(3, scores + 16 * kSide + 16, kSide * sizeof(float));
        before = {scores, lanes + i, lane + static_cast<int32_t>(c)};
        scores = scores == both ? both + kSide * kSide : both;
      }
    }
    before.reduce(0, kSide);
    _tile_release();
    for (int64_t i = 0; i < rows; i++) top[i] = Float::reduce(lanes[i]);
  }

  static const ArgmaxBody* body() {
    static const ArgmaxBody table = {2,     kSide,     kSide,    columns, sizeof(uint16_t),
                                     depth, pack_rule, pack_row, score,   scratch};
    return &table;
  }
};

}  // namespace

const ArgmaxBody* argmax_body_amx(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return TileArgmax<float>::body();
    case Dtype::bfloat16:
      return TileArgmax<BFloat16>::body();
    case Dtype::float16:
      return TileArgmax<Float16>::body();
    case Dtype::float64:
      return TileArgmax<double>::body();
  }
  return nullptr;
}

}  // namespace ncfast

#pragma GCC pop_options

#endif

// affine_argmax on AMX: level 0 scores 8-bit integers, at twice the rate, level 1 one bfloat16 per number,
// level 2 two (hi hi + hi lo + lo hi).
//
// Block and panel are made of 1 KiB tiles. Of bfloat16: 16 rows x 32 columns of a block, 32 columns x 16
// classes of a panel with the columns in pairs, as TDPBF16PS wants them; at level 2 every tile of high parts
// is followed by that of the low ones. Of integers: 64 columns, in fours for TDPBSSD; a row or class is
// scaled to end at 127. 32 rows x 32 classes are accumulated in four tile registers over all columns:
// beginning with the bias, or in integers exactly, to be scaled and to get their bias while the next ones are
// multiplied.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/affine_argmax.h"
#include "cpu/amx.h"

#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16,amx-int8,prefer-vector-width=512")

namespace ncfast {
namespace {

#include "cpu/affine_argmax_vector.h"
// After the vectors.
#include "cpu/affine_argmax_integers.h"
#include "cpu/float16_avx512.h"

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

  // Tiles from one end of a row to the other; those of a level with two parts twice.
  static int64_t steps(int64_t p, int level) { return level ? (p + 31) / 32 : (p + 63) / 64; }
  static int64_t parts(int level) { return level < 2 ? 1 : 2; }
  static size_t bytes(int64_t p, int level) { return steps(p, level) * parts(level) * 64; }

  // A product passes the 16 FMAs of its half of a tile, the addition of the two halves, and that to the
  // accumulator once per tile. Twice that, in case a processor orders them otherwise.
  static double depth(int64_t p, int level) {
    return level ? 2 * (18 + static_cast<double>(steps(p, level)) * (level == 2 ? 3 : 1)) : kDepthOfIntegers;
  }

  static void pack_rule(const double* weight, int64_t C, int64_t p, int level, int64_t first, int64_t count,
                        Operand panel, Norms* norms) {
    *norms = {0, 0, 0};
    for (int64_t c = 0; c < count; c++) {
      const double* row = first + c < C ? weight + (first + c) * p : nullptr;
      char* out = panel.numbers + c / 16 * 16 * bytes(p, level) + c % 16 * 4;
      if (level) {
        keep_larger(norms, pack_class(row, p, level, out));
      } else {
        const auto store = [&](int64_t j, __m128i numbers) {
          char* at = out + j / 64 * kTile + j % 64 / 4 * 64;
          const int64_t both = _mm_cvtsi128_si64(numbers);
          std::memcpy(at, &both, 4);
          std::memcpy(at + 64, reinterpret_cast<const char*>(&both) + 4, 4);
        };
        keep_larger(norms, pack_integers<int8_t>(row, p, 64 * steps(p, 0), panel.scale + c, store));
      }
    }
  }

  static Norms pack_class(const double* row, int64_t p, int level, char* out) {
    double seen = 0, residual = 0, low = 0;
    for (int64_t j = 0; j < 32 * steps(p, level); j++) {
      const double exact = row && j < p ? row[j] : 0;
      char* at = out + j / 32 * parts(level) * kTile + j % 32 / 2 * 64 + j % 2 * 2;
      const uint16_t hi = to_bfloat16(static_cast<float>(exact));
      std::memcpy(at, &hi, sizeof hi);
      double value = from_bfloat16(hi);
      if (level == 2) {
        const uint16_t lo = to_bfloat16(static_cast<float>(exact - value));
        std::memcpy(at + kTile, &lo, sizeof lo);
        value += from_bfloat16(lo);
        low += static_cast<double>(from_bfloat16(lo)) * from_bfloat16(lo);
      }
      seen += value * value;
      residual += (exact - value) * (exact - value);
    }
    return {std::sqrt(seen), std::sqrt(residual), std::sqrt(low)};
  }

  static void pack_row(const char* features, const float* middle, int64_t p, int level, int64_t row,
                       Operand block, Norms* norms) {
    char* out = block.numbers + row / 16 * 16 * bytes(p, level) + row % 16 * 64;
    const auto store = [&](int64_t j, __m128i numbers) {
      _mm_store_si128(reinterpret_cast<__m128i*>(out + j / 64 * kTile + j % 64), numbers);
    };
    const Squares squares = level ? pack_halves(features, middle, p, static_cast<int>(parts(level)), out)
                                  : pack_integers<int8_t, Feature>(features, middle, p, 64 * steps(p, 0),
                                                                   block.scale + row, store);
    *norms = squares.norms(p, level == 2);
  }

  static Squares pack_halves(const char* features, const float* middle, int64_t p, int parts, char* out) {
    const __m512 zero = _mm512_setzero_ps();
    Squares squares = {zero, zero, zero};
    for (int64_t j = 0; j < p; j += 32, out += parts * kTile) {
      __m512 d0 = zero, d1 = zero;
      if (features) {
        d0 = sixteen<Feature>(features, middle, j, p);
        d1 = sixteen<Feature>(features, middle, j + 16, p);
      }
      squares.all = _mm512_fmadd_ps(d0, d0, _mm512_fmadd_ps(d1, d1, squares.all));
      for (int part = 0; part < parts; part++) {
        const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(d1, d0);
        _mm512_store_si512(out + part * kTile, halves);
        const __m512 x0 = widened(_mm512_castsi512_si256(halves));
        const __m512 x1 = widened(_mm512_extracti64x4_epi64(halves, 1));
        d0 = _mm512_sub_ps(d0, x0);
        d1 = _mm512_sub_ps(d1, x1);
        if (part) squares.low = _mm512_fmadd_ps(x0, x0, _mm512_fmadd_ps(x1, x1, squares.low));
      }
      squares.residual = _mm512_fmadd_ps(d0, d0, _mm512_fmadd_ps(d1, d1, squares.residual));
    }
    return squares;
  }

  static size_t scratch(int64_t rows) { return rows * sizeof(Lanes) + 2 * kSide * kSide * sizeof(float); }

  // Scores of 32 rows x 32 classes, and the rows' best so far. They are reduced while the next ones are
  // multiplied: that keeps the tile unit busy and leaves the vector units idle.
  struct Scores {
    const float* scores;  // at level 0 integers
    Lanes* lanes;
    Vec<int32_t, 16> index;
    const float *row_scale, *class_scale, *bias;  // at level 0

    template <int Level>
    void reduce(int64_t first, int64_t end) const {
      Vec<float, 16> scale[2], added[2];
      if constexpr (Level == 0) {
        std::memcpy(scale, class_scale, sizeof scale);
        std::memcpy(added, bias, sizeof added);
      }
      for (int64_t r = first; r < end; r++) {
        Lanes row = lanes[r];
        for (int half = 0; half < 2; half++) {
          Vec<float, 16> score;
          if constexpr (Level == 0) {
            Vec<int32_t, 16> whole;
            std::memcpy(&whole, scores + r * kSide + half * 16, sizeof whole);
            score = scaled(whole, scale[half], row_scale[r], added[half]);
          } else {
            std::memcpy(&score, scores + r * kSide + half * 16, sizeof score);
          }
          Float::update(row, score, index + 16 * half);
        }
        lanes[r] = row;
      }
    }
  };

  template <int Level>
  static void accumulate(const char* a, const char* b, int64_t steps, const Scores* before) {
    constexpr int64_t kStep = (Level == 2 ? 2 : 1) * kTile;
    const int64_t next = steps * kStep;  // the tile 16 rows, or classes, further on
    for (int64_t step = 0; step < steps; step++, a += kStep, b += kStep) {
      if (before) before->template reduce<Level>(step * kSide / steps, (step + 1) * kSide / steps);
      _tile_loadd(4, a, 64);
      _tile_loadd(5, a + next, 64);
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + next, 64);
      products<Level>();
      if constexpr (Level == 2) {
        _tile_loadd(6, b + kTile, 64);
        _tile_loadd(7, b + next + kTile, 64);
        products<Level>();
        _tile_loadd(4, a + kTile, 64);
        _tile_loadd(5, a + next + kTile, 64);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + next, 64);
        products<Level>();
      }
    }
  }

  template <int Level>
  [[gnu::always_inline]] static void products() {
    if constexpr (Level == 0) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  static void score(Operand block, int64_t rows, Operand panel, const float* bias, int64_t classes, int64_t p,
                    int level, char* scratch, TopTwo* top) {
    const auto run = level == 0 ? score_at<0> : level == 1 ? score_at<1> : score_at<2>;
    run(block, rows, panel, bias, classes, p, scratch, top);
  }

  template <int Level>
  static void score_at(Operand block, int64_t rows, Operand panel, const float* bias, int64_t classes,
                       int64_t p, char* scratch, TopTwo* top) {
    Lanes* lanes = reinterpret_cast<Lanes*>(scratch);
    float *const both = reinterpret_cast<float*>(scratch + rows * sizeof(Lanes)), *scores = both;
    const Vec<float, 16> nothing = Vec<float, 16>{} - __builtin_inff();
    for (int64_t i = 0; i < rows; i++) lanes[i] = {nothing, nothing, Vec<int32_t, 16>{}};
    Vec<int32_t, 16> lane;
    for (int i = 0; i < 16; i++) lane[i] = i;
    _tile_loadconfig(&kTileConfiguration);
    Scores before = {};
    for (int64_t c = 0; c < classes; c += kSide) {
      for (int64_t i = 0; i < rows; i += kSide) {
        if constexpr (Level == 0) {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        } else {
          // A stride of 0 fills all 16 rows of a tile with the biases of its classes.
          _tile_loadd(0, bias + c, 0);
          _tile_loadd(1, bias + c + 16, 0);
          _tile_loadd(2, bias + c, 0);
          _tile_loadd(3, bias + c + 16, 0);
        }
        accumulate<Level>(block.numbers + i * bytes(p, Level), panel.numbers + c * bytes(p, Level),
                          steps(p, Level), before.scores ? &before : nullptr);
        _tile_stored(0, scores, kSide * sizeof(float));
        _tile_stored(1, scores + 16, kSide * sizeof(float));
        _tile_stored(2, scores + 16 * kSide, kSide * sizeof(float));
        _tile_stored(3, scores + 16 * kSide + 16, kSide * sizeof(float));
        before = {scores,          lanes + i,       lane + static_cast<int32_t>(c),
                  block.scale + i, panel.scale + c, bias + c};
        scores = scores == both ? both + kSide * kSide : both;
      }
    }
    before.template reduce<Level>(0, kSide);
    _tile_release();
    for (int64_t i = 0; i < rows; i++) top[i] = Float::reduce(lanes[i]);
  }

  static const ArgmaxBody* body() {
    // Up to 256 classes 8-bit integers gain nothing.
    static const ArgmaxBody table = {
        3,             // levels
        kMostOf8Bits,  // coarse_columns
        257,           // coarse_classes
        kSide,         // rows
        kSide,         // classes
        kSide,         // group
        bytes,
        depth,
        pack_rule,
        pack_row,
        score,
        scratch,
        Float::candidates,
        Float::product,
    };
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

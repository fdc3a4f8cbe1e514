// affine_argmax on AVX-512 with its products of integers: level 0 scores 8-bit numbers, four products a lane,
// level 1 16-bit ones, two a lane, level 2 float32 as without them.
//
// Block: rows of integers, row-major. Panel: per group of 48 or fewer classes what their sums begin with,
// then their columns in words of 4 or 2. VPDPBUSD multiplies unsigned numbers with signed ones: rows have 128
// added, and a sum begins with -128 times the sum of its class. Additions are modulo 2^32, so that only what
// comes out must fit. 8 rows x 48 classes are accumulated in registers over all columns, exactly; then they
// are scaled and get their bias.
#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/affine_argmax.h"
#include "cpu/intrinsics.h"
#include "cpu/memory.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,prefer-vector-width=512")

namespace ncfast {
namespace {

#include "cpu/affine_argmax_vector.h"
// After the vectors.
#include "cpu/affine_argmax_integers.h"
#include "cpu/float16_avx512.h"

using Sums = Vec<int32_t, 16>;

// Not by intrinsics, around which GCC 12 copies the accumulators of a register tile; by value, so that it
// keeps those in registers.
template <class Integer>
inline Sums add_products(Sums sums, Sums row, Sums classes) {
  if constexpr (sizeof(Integer) == 1) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(row), "v"(classes));
  } else {
    asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(row), "v"(classes));
  }
  return sums;
}

template <class Feature>
struct IntegerArgmax {
  static constexpr int kVectors = 3, kRows = 8;
  using Float = FloatArgmax<Feature, 16, kVectors, kRows>;
  using Lanes = typename Float::Lanes;
  static constexpr int64_t kWord = sizeof(int32_t);

  template <class Integer>
  static int64_t words(int64_t columns) {
    return round_up(columns * sizeof(Integer), kWord) / kWord;
  }

  // Rows are written 16 columns at a time; one more word for what a class's sums begin with.
  static size_t bytes(int64_t p, int level) {
    const size_t columns = round_up(p, 16);
    return level == 0 ? columns + kWord : level == 1 ? 2 * columns + kWord : Float::bytes(p, level);
  }

  static double depth(int64_t p, int level) { return level < 2 ? kDepthOfIntegers : Float::depth(p, level); }

  static void pack_rule(const double* weight, int64_t C, int64_t p, int level, int64_t first, int64_t count,
                        Operand panel, Norms* norms) {
    if (level == 2) return Float::pack_rule(weight, C, p, level, first, count, panel, norms);
    *norms = {0, 0, 0};
    for (int64_t c = 0; c < count; c++) {
      const double* row = first + c < C ? weight + (first + c) * p : nullptr;
      char* out = panel.numbers + c * kWord;
      keep_larger(norms, level ? pack_class<int16_t>(row, p, count * kWord, out, panel.scale + c)
                               : pack_class<int8_t>(row, p, count * kWord, out, panel.scale + c));
    }
  }

  // Into the words `step` bytes apart from `out` on.
  template <class Integer>
  static Norms pack_class(const double* row, int64_t p, int64_t step, char* out, float* scale) {
    __m128i shift = _mm_setzero_si128();  // products with 128
    const auto store = [&](int64_t j, __m128i numbers) {
      char* at = out + (1 + words<Integer>(j)) * step;
      char eight[16];
      _mm_storeu_si128(reinterpret_cast<__m128i*>(eight), numbers);
      for (int64_t w = 0; w < words<Integer>(8); w++) {
        std::memcpy(at + w * step, eight + w * kWord, kWord);
      }
      if constexpr (sizeof(Integer) == 1) shift = _mm_dpbusd_epi32(shift, _mm_set1_epi8(-128), numbers);
    };
    const Norms norms = pack_integers<Integer>(row, p, p, scale, store);
    shift = _mm_hadd_epi32(shift, shift);
    shift = _mm_hadd_epi32(shift, shift);
    const int32_t start = _mm_cvtsi128_si32(_mm_sub_epi32(_mm_setzero_si128(), shift));
    std::memcpy(out, &start, sizeof start);
    return norms;
  }

  static void pack_row(const char* features, const float* middle, int64_t p, int level, int64_t row,
                       Operand block, Norms* norms) {
    if (level == 2) return Float::pack_row(features, middle, p, level, row, block, norms);
    char* out = block.numbers + row * bytes(p, level);
    const auto store_bytes = [&](int64_t j, __m128i numbers) {
      const __m128i shifted = _mm_xor_si128(numbers, _mm_set1_epi8(-128));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j), shifted);
    };
    const auto store_halves = [&](int64_t j, __m256i numbers) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 2 * j), numbers);
    };
    float* scale = block.scale + row;
    const Squares squares = level
                                ? pack_integers<int16_t, Feature>(features, middle, p, p, scale, store_halves)
                                : pack_integers<int8_t, Feature>(features, middle, p, p, scale, store_bytes);
    *norms = squares.norms(p, false);
  }

  // Scores of kRows rows and some vectors of classes, into the rows' best two.
  template <class Integer, int Vectors>
  [[gnu::noinline]] static void tile(const char* block, const float* row_scale, int64_t stride,
                                     const char* panel, const float* class_scale, const float* bias,
                                     int64_t steps, int32_t first, Lanes* lanes) {
    using V = Vec<float, 16>;
    Sums total[kRows][Vectors];
    for (int a = 0; a < Vectors; a++) {
      Sums start;
      std::memcpy(&start, panel + a * sizeof start, sizeof start);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) total[r][a] = start;
    }
    for (int64_t w = 0; w < steps; w++) {
      panel += sizeof(Sums[Vectors]);
      Sums classes[Vectors];
#pragma GCC unroll 3
      for (int a = 0; a < Vectors; a++) std::memcpy(&classes[a], panel + a * sizeof(Sums), sizeof(Sums));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
        int32_t word;
        std::memcpy(&word, block + r * stride + w * kWord, sizeof word);
        const Sums row = Sums{} + word;
#pragma GCC unroll 3
        for (int a = 0; a < Vectors; a++) {
          total[r][a] = add_products<Integer>(total[r][a], row, classes[a]);
        }
      }
    }
    V scale[Vectors], added[Vectors];
    std::memcpy(scale, class_scale, sizeof scale);
    std::memcpy(added, bias, sizeof added);
    const Sums index = Float::indices(first);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      Lanes best = lanes[r];
#pragma GCC unroll 3
      for (int a = 0; a < Vectors; a++) {
        Float::update(best, scaled(total[r][a], scale[a], row_scale[r], added[a]), index + a * 16);
      }
      lanes[r] = best;
    }
  }

  static void score(Operand block, int64_t rows, Operand panel, const float* bias, int64_t classes, int64_t p,
                    int level, char* scratch, TopTwo* top) {
    if (level == 2) return Float::score(block, rows, panel, bias, classes, p, level, scratch, top);
    const auto run = level ? score_integers<int16_t> : score_integers<int8_t>;
    run(block, rows, panel, bias, classes, p, bytes(p, level), scratch, top);
  }

  template <class Integer>
  static void score_integers(Operand block, int64_t rows, Operand panel, const float* bias, int64_t classes,
                             int64_t p, int64_t stride, char* scratch, TopTwo* top) {
    Float::for_tiles(rows, classes, scratch, top, [&](auto vectors, int64_t i, int64_t c, Lanes* lanes) {
      tile<Integer, vectors>(block.numbers + i * stride, block.scale + i, stride, panel.numbers + c * stride,
                             panel.scale + c, bias + c, words<Integer>(p), static_cast<int32_t>(c), lanes);
    });
  }

  static const ArgmaxBody* body() {
    static const ArgmaxBody table = {
        3,                // levels
        kMostOf8Bits,     // coarse_columns
        2,                // coarse_classes
        kRows,            // rows
        16,               // classes
        Float::kClasses,  // group
        bytes,
        depth,
        pack_rule,
        pack_row,
        score,
        Float::scratch,
        Float::candidates,
        Float::product,
    };
    return &table;
  }
};

}  // namespace

const ArgmaxBody* argmax_body_avx512_vnni(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return IntegerArgmax<float>::body();
    case Dtype::bfloat16:
      return IntegerArgmax<BFloat16>::body();
    case Dtype::float16:
      return IntegerArgmax<Float16>::body();
    case Dtype::float64:
      return IntegerArgmax<double>::body();
  }
  return nullptr;
}

}  // namespace ncfast

#pragma GCC pop_options

#endif

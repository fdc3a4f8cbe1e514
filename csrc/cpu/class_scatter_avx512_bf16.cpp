// class_scatter on AVX-512 with its products of bfloat16, twice as fast as FMAs: "medium", a residual being
// one bfloat16. (Of the two of "high" it would make three products, which FMAs do faster.)
//
// VDPBF16PS adds both products of a word of the panel, so a register tile is that of class_scatter_vector.h
// with pairs of rows for rows.
#if defined(__x86_64__)

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/class_scatter.h"
#include "cpu/intrinsics.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16")

namespace ncfast {
namespace {

#include "cpu/class_scatter_bfloat16.h"

constexpr int kColumns = 3, kLines = 8;  // of a register tile: pieces, and lines of the scatter

size_t element(Precision) { return sizeof(uint16_t); }

template <class Feature>
void pack(const Group& group, int64_t row, const Panel& panel, double* column_squares, void* squares) {
  pack_as<Feature, false, true>(group, row, panel, column_squares, static_cast<float*>(squares));
}

// scatter[j + b][i + a] += over the rows of the panel, for A pieces from column i and kLines columns from j.
template <int A>
void register_tile(const Panel& panel, int64_t i, int64_t j, double* scatter) {
  for (int64_t b = j; b < j + kLines && b < panel.p; b++) {
    for (int64_t a = i; a < i + A * kSide && a < panel.p; a += 8)
      _mm_prefetch(scatter + b * panel.p + a, _MM_HINT_T1);
  }
  __m512 total[kLines][A];
#pragma GCC unroll 8
  for (int b = 0; b < kLines; b++) {
#pragma GCC unroll 3
    for (int a = 0; a < A; a++) total[b][a] = _mm512_setzero_ps();
  }
  const int64_t stride = panel.padded / kSide * kTileBytes;
  const char* of_columns = panel.data + i / kSide * kTileBytes;
  const char* of_lines = panel.data + j / kSide * kTileBytes + j % kSide * 4;
  for (int64_t row = 0; row < panel.rows; row += kGroup, of_columns += stride, of_lines += stride) {
    for (int64_t pair = 0; pair < kTileBytes; pair += 64) {
      __m512bh columns[A];
#pragma GCC unroll 3
      for (int a = 0; a < A; a++)
        columns[a] = (__m512bh)_mm512_load_si512(of_columns + a * kTileBytes + pair);
#pragma GCC unroll 8
      for (int b = 0; b < kLines; b++) {
        int32_t word;
        std::memcpy(&word, of_lines + pair + b * 4, sizeof word);
        const __m512bh factor = (__m512bh)_mm512_set1_epi32(word);
#pragma GCC unroll 3
        for (int a = 0; a < A; a++) total[b][a] = _mm512_dpbf16_ps(total[b][a], columns[a], factor);
      }
    }
  }
  for (int b = 0; b < kLines && j + b < panel.p; b++) {
    for (int a = 0; a < A; a++) {
      const int64_t column = i + a * kSide;
      const int64_t count = panel.p - column;
      if (count > 0) add_to(scatter + (j + b) * panel.p + column, total[b][a], mask_of(count));
    }
  }
}

void multiply(const Panel& panel, int64_t I, int64_t J, bool, double* scatter, char*) {
  const int64_t rows_end = end_of_tile(panel, I), columns_end = end_of_tile(panel, J);
  for (int64_t j = I; j < rows_end && j < panel.p; j += kLines) {
    int64_t i = I == J ? j / kSide * kSide : J;
    for (; i + kColumns * kSide <= columns_end; i += kColumns * kSide)
      register_tile<kColumns>(panel, i, j, scatter);
    if (i + 2 * kSide <= columns_end) register_tile<2>(panel, i, j, scatter), i += 2 * kSide;
    if (i < columns_end) register_tile<1>(panel, i, j, scatter);
  }
}

template <class Feature>
const ScatterBody* body(Dtype dtype) {
  static const ScatterBody table = [dtype] {
    ScatterBody body = *scatter_body_avx512(dtype);  // what makes no products, and the sizes
    body.pad = kSide;
    body.element = element;
    body.least_tile = kColumns * kSide;
    body.pack = pack<Feature>;
    body.add_residuals = nullptr;
    body.multiply = multiply;
    return body;
  }();
  return &table;
}

}  // namespace

const ScatterBody* scatter_body_avx512_bf16(Dtype dtype, Precision precision) {
  if (precision != Precision::medium) return scatter_body_avx512(dtype);
  switch (dtype) {
    case Dtype::float32:
      return body<float>(dtype);
    case Dtype::bfloat16:
      return body<BFloat16>(dtype);
    case Dtype::float16:
      return body<Float16>(dtype);
    case Dtype::float64:
      return scatter_body_avx512(dtype);
  }
  return nullptr;
}

}  // namespace ncfast

#pragma GCC pop_options

#endif

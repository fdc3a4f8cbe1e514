// class_scatter on AMX: residuals as one or two bfloat16, multiplied by 16 x 16 tiles into float32.
//
// "high" writes d = hi + lo and adds hi hi' + hi lo' + lo hi'; "medium" adds hi hi' alone. A tile product
// takes 32 rows of the block, its left factor with the rows along each line, its right factor with the rows
// in interleaved pairs: as 32-bit words, one is the other transposed. The panel holds both, [stride / 32][2:
// left, right][padded / 16][1 or 2: hi, lo] tiles of 1 KiB: it is written in one stream, and the columns of a
// tile of the scatter do not compete for the same sets of a cache.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/amx.h"
#include "cpu/class_scatter.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")

namespace ncfast {
namespace {

constexpr int64_t kTileBytes = 1024;
constexpr int kSide = 16;         // columns of a tile
constexpr int kPair = 2 * kSide;  // columns of a register tile

struct BFloat16 {};
struct Float16 {};

int parts(Precision precision) { return precision == Precision::high ? 2 : 1; }

size_t element(Precision precision) { return 2 * sizeof(uint16_t) * parts(precision); }

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

// Fetches the rows of the following group into the second-level cache, one whole row after the other: pages
// and the processor's own prefetchers prefer that to a line of each row in turn. Long rows are better left to
// those alone: they need no fill buffer of the first-level cache. The pack stage needs as much time for
// kGroup lines as for one call of advance().
class Prefetcher {
 public:
  Prefetcher(const Group& group, int64_t row_bytes)
      : next_(group.next), row_bytes_(row_bytes), rows_(row_bytes < kLong ? group.rows : 0) {}

  void advance() {
    for (int lines = kGroup; lines > 0 && row_ < rows_;) {
      for (; lines > 0 && byte_ < row_bytes_; lines--, byte_ += 64)
        _mm_prefetch(next_[row_] + byte_, _MM_HINT_T1);
      if (byte_ < row_bytes_) return;
      byte_ = 0;
      row_++;
    }
  }

 private:
  static constexpr int64_t kLong = 2048;

  const char* const* next_;
  int64_t row_bytes_, byte_ = 0;
  int rows_, row_ = 0;
};

template <class Feature, bool Split>
void pack_as(const Group& group, int64_t row, const Panel& panel, double* column_squares, float* squares) {
  constexpr int64_t kBytes = kTileBytes * (Split ? 2 : 1);
  const int64_t pieces = panel.padded / kSide;
  char* left = panel.data + row / kGroup * 2 * pieces * kBytes;
  char* right = left + pieces * kBytes;
  // Of two vectors packed to bfloat16, the first into the lower half: a0 b0 a1 b1 ...
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  __m512 square[kGroup];
  for (__m512& s : square) s = _mm512_setzero_ps();
  Prefetcher prefetcher(group, panel.p * (std::is_same_v<Feature, float> ? 4 : 2));
  for (int64_t j = 0; j < panel.padded; j += kSide, left += kBytes, right += kBytes) {
    const int64_t remaining = panel.p - j;
    const __mmask16 mask = remaining >= kSide ? 0xffff : remaining <= 0 ? 0 : (1 << remaining) - 1;
    if (!mask) {
      std::memset(left, 0, kBytes);
      std::memset(right, 0, kBytes);
      continue;
    }
    prefetcher.advance();
    __m512 total = _mm512_setzero_ps(), columns = _mm512_setzero_ps();
    const auto residual = [&](int i) {
      const __m512 k = _mm512_maskz_loadu_ps(mask, group.shift[i] + j * 4);
      const __m512 d = _mm512_sub_ps(load(group.features[i], j, mask, Feature{}), k);
      const __m512 dd = _mm512_mul_ps(d, d);
      columns = _mm512_add_ps(columns, dd);
      square[i] = _mm512_add_ps(square[i], dd);
      total = _mm512_add_ps(total, d);
      if (group.last[i]) {
        add_to(group.sums[i] + j, total, mask);
        total = _mm512_setzero_ps();
      }
      return d;
    };
    __m512i high[kSide], low[kSide];
    for (int q = 0; q < kSide; q++) {
      const __m512 d0 = 2 * q < group.rows ? residual(2 * q) : _mm512_setzero_ps();
      const __m512 d1 = 2 * q + 1 < group.rows ? residual(2 * q + 1) : _mm512_setzero_ps();
      high[q] = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(d1, d0));
      if (Split) {
        const __m512 h0 = _mm512_castsi512_ps(_mm512_slli_epi32(high[q], 16));
        const __m512 h1 = _mm512_castsi512_ps(_mm512_and_si512(high[q], _mm512_set1_epi32(0xffff0000)));
        const __m512bh rest = _mm512_cvtne2ps_pbh(_mm512_sub_ps(d1, h1), _mm512_sub_ps(d0, h0));
        low[q] = _mm512_permutexvar_epi16(interleave, (__m512i)rest);
      }
    }
    add_to(column_squares + j, columns, mask);
    for (int q = 0; q < kSide; q++) _mm512_store_si512(right + q * 64, high[q]);
    store_transposed(high, left);
    if (Split) {
      for (int q = 0; q < kSide; q++) _mm512_store_si512(right + kTileBytes + q * 64, low[q]);
      store_transposed(low, left + kTileBytes);
    }
  }
  for (int i = 0; i < group.rows; i++) squares[i] = _mm512_reduce_add_ps(square[i]);
}

template <class Feature>
void pack(const Group& group, int64_t row, const Panel& panel, double* column_squares, void* squares) {
  const auto pack = panel.precision == Precision::high ? pack_as<Feature, true> : pack_as<Feature, false>;
  pack(group, row, panel, column_squares, static_cast<float*>(squares));
}

// The lines of the 32 x 32 float64 that a register tile is added to are asked for while it is multiplied.
class Destination {
 public:
  Destination(const Panel& panel, int64_t i, int64_t j, double* scatter)
      : at_(scatter + j * panel.p + i),
        p_(panel.p),
        lines_(panel.p - j < kPair ? panel.p - j : kPair),
        columns_(panel.p - i < kPair ? panel.p - i : kPair) {}

  void prefetch(int64_t line) const {
    if (line >= lines_) return;
    const char* from = reinterpret_cast<const char*>(at_ + line * p_);
    for (int64_t byte = 0; byte < columns_ * 8; byte += 64) __builtin_prefetch(from + byte, 1, 2);
  }

  void add(const char* floats) const {
    const __mmask16 first = columns_ < kSide ? (1 << columns_) - 1 : 0xffff;
    const __mmask16 second = columns_ <= kSide ? 0 : (1 << (columns_ - kSide)) - 1;
    for (int64_t line = 0; line < lines_; line++, floats += kPair * 4) {
      double* at = at_ + line * p_;
      add_to(at, _mm512_load_ps(floats), first);
      if (second) add_to(at + kSide, _mm512_load_ps(floats + kSide * 4), second);
    }
  }

 private:
  double* at_;
  int64_t p_, lines_, columns_;
};

constexpr int64_t kLine = kPair * 4;  // bytes of a line of 32 floats

void load_accumulators(const char* floats) {
  _tile_loadd(0, floats, kLine);
  _tile_loadd(1, floats + kLine / 2, kLine);
  _tile_loadd(2, floats + kSide * kLine, kLine);
  _tile_loadd(3, floats + kSide * kLine + kLine / 2, kLine);
}

void store_accumulators(char* floats) {
  _tile_stored(0, floats, kLine);
  _tile_stored(1, floats + kLine / 2, kLine);
  _tile_stored(2, floats + kSide * kLine, kLine);
  _tile_stored(3, floats + kSide * kLine + kLine / 2, kLine);
}

// Eight tile registers: four accumulators, two left and two right factors. The order lo-right, hi-right,
// lo-left needs eight loads for twelve products.
template <bool Split>
void register_tile(const char* left, const char* right, int64_t stride, int64_t steps,
                   const Destination* destination) {
  constexpr int64_t kBytes = kTileBytes * (Split ? 2 : 1);
  for (int64_t k = 0; k < steps; k++, left += stride, right += stride) {
    if (destination) {
      for (int64_t line = k * kPair / steps; line < (k + 1) * kPair / steps; line++)
        destination->prefetch(line);
    }
    _tile_loadd(4, left, 64);
    _tile_loadd(5, left + kBytes, 64);
    if (Split) {
      _tile_loadd(6, right + kTileBytes, 64);
      _tile_loadd(7, right + kBytes + kTileBytes, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_loadd(6, right, 64);
    _tile_loadd(7, right + kBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    if (Split) {
      _tile_loadd(4, left + kTileBytes, 64);
      _tile_loadd(5, left + kBytes + kTileBytes, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

constexpr int64_t kMostTile = 512;
constexpr int64_t kSteps = 4;
constexpr int64_t kFusedRows = 128;

// The larger the tile the less of the panel is read again, and the fewer tasks there are for the threads.
int64_t tile(int64_t padded) { return padded >= 4 * kMostTile ? kMostTile : kMostTile / 2; }

// visit(j, i, floats) for the register tiles of a tile, and where in scratch their sums are.
template <class Visit>
void for_register_tiles(const Panel& panel, int64_t I, int64_t J, char* scratch, const Visit& visit) {
  const int64_t rows_end = I + panel.tile < panel.padded ? I + panel.tile : panel.padded;
  const int64_t columns_end = J + panel.tile < panel.padded ? J + panel.tile : panel.padded;
  for (int64_t j = I; j < rows_end; j += kPair) {
    for (int64_t i = I == J ? j : J; i < columns_end; i += kPair, scratch += kPair * kLine)
      visit(j, i, scratch);
  }
}

// scratch += the products of `count` times 32 rows from step `step`; with a scatter, scratch is added to that
// in the end.
void add_products(const Panel& panel, int64_t I, int64_t J, int64_t step, int64_t count, bool anew,
                  double* scatter, char* scratch) {
  const auto register_tile_of =
      panel.precision == Precision::high ? register_tile<true> : register_tile<false>;
  const int64_t bytes = kTileBytes * parts(panel.precision);
  const int64_t side = panel.padded / kSide * bytes;
  const char* row = panel.data + step * 2 * side;
  for_register_tiles(panel, I, J, scratch, [&](int64_t j, int64_t i, char* floats) {
    const Destination destination(panel, i, j, scatter);
    if (anew) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      load_accumulators(floats);
    }
    register_tile_of(row + j / kSide * bytes, row + side + i / kSide * bytes, 2 * side, count,
                     scatter ? &destination : nullptr);
    store_accumulators(floats);
    if (scatter) destination.add(floats);
  });
}

int64_t steps_of(const Panel& panel) { return (panel.rows + kGroup - 1) / kGroup; }

// The rows are taken kSteps tile products at a time, so that the panel's columns of one tile of the scatter,
// both factors, stay in the second-level cache beside its float32 sums (scratch). Those go to the float64
// scatter once a block.
void multiply(const Panel& panel, int64_t I, int64_t J, double* scatter, char* scratch) {
  const TileConfiguration configuration;
  _tile_loadconfig(&configuration);
  const int64_t steps = steps_of(panel);
  for (int64_t step = 0; step < steps; step += kSteps) {
    const bool last = step + kSteps >= steps;
    add_products(panel, I, J, step, last ? steps - step : kSteps, step == 0, last ? scatter : nullptr,
                 scratch);
  }
  _tile_release();
}

void accumulate(const Panel& panel, bool anew, char* scratch) {
  const TileConfiguration configuration;
  _tile_loadconfig(&configuration);
  add_products(panel, 0, 0, 0, steps_of(panel), anew, nullptr, scratch);
  _tile_release();
}

void flush(const Panel& panel, double* scatter, char* scratch) {
  for_register_tiles(panel, 0, 0, scratch, [&](int64_t j, int64_t i, char* floats) {
    Destination(panel, i, j, scatter).add(floats);
  });
}

template <class Feature>
const ScatterBody* body(Dtype dtype) {
  static const ScatterBody table = {
      kPair,         2048,      sizeof(float), element,
      tile,          kMostTile, kFusedRows,    scatter_body_avx512(dtype)->stream,
      pack<Feature>, multiply,  accumulate,    flush};
  return &table;
}

}  // namespace

const ScatterBody* scatter_body_amx(Dtype dtype, Precision precision) {
  if (precision == Precision::highest) return scatter_body_avx512(dtype);
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

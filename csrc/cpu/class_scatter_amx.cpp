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
#include "cpu/memory.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")

namespace ncfast {
namespace {

#include "cpu/class_scatter_bfloat16.h"

constexpr int64_t kTileBytes = 1024;
constexpr int kPair = 2 * kSide;  // columns of a register tile

int parts(Precision precision) { return precision == Precision::high ? 2 : 1; }

size_t element(Precision precision) { return 2 * sizeof(uint16_t) * parts(precision); }

template <class Feature, bool Split>
void pack_as(const Group& group, int64_t row, const Panel& panel, double* column_squares, float* squares) {
  constexpr int64_t kBytes = kTileBytes * (Split ? 2 : 1);
  const int64_t pieces = panel.padded / kSide;
  char* left = panel.data + row / kGroup * 2 * pieces * kBytes;
  char* right = left + pieces * kBytes;
  const int64_t filled = round_up(panel.p, kSide) / kSide * kBytes;
  std::memset(left + filled, 0, pieces * kBytes - filled);
  std::memset(right + filled, 0, pieces * kBytes - filled);
  pack_pairs<Feature, Split>(
      group, panel.p, column_squares, squares, [&](int64_t j, const __m512i* high, const __m512i* low) {
        char *to_left = left + j / kSide * kBytes, *to_right = right + j / kSide * kBytes;
        for (int q = 0; q < kSide; q++) _mm512_store_si512(to_right + q * 64, high[q]);
        store_transposed(high, to_left);
        if (Split) {
          for (int q = 0; q < kSide; q++) _mm512_store_si512(to_right + kTileBytes + q * 64, low[q]);
          store_transposed(low, to_left + kTileBytes);
        }
      });
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
    const __mmask16 first = mask_of(columns_);
    const __mmask16 second = columns_ <= kSide ? 0 : mask_of(columns_ - kSide);
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
  const ScatterBody& vectors = *scatter_body_avx512(dtype);
  static const ScatterBody table = {kPair,
                                    2048,
                                    sizeof(float),
                                    element,
                                    tile,
                                    kMostTile,
                                    kFusedRows,
                                    vectors.add_rows,
                                    vectors.add_window,
                                    vectors.move_row,
                                    vectors.take_row,
                                    pack<Feature>,
                                    nullptr,
                                    multiply,
                                    accumulate,
                                    flush};
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

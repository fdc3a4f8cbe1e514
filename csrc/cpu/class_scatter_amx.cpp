// class_scatter on AMX: residuals as one or two bfloat16, multiplied by 16 x 16 tiles into float32.
//
// "high" writes d = hi + lo and adds hi hi' + hi lo' + lo hi'; "medium" adds hi hi' alone. A tile product
// takes 32 rows of the panel, its right factor with the rows in interleaved pairs, its left factor with the
// rows along each line: as 32-bit words, one is the other transposed. The panel holds right factors. Left
// factors are made from them by whoever multiplies, in the first level of the cache.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "cpu/amx.h"
#include "cpu/class_scatter.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")

namespace ncfast {
namespace {

#include "cpu/class_scatter_bfloat16.h"

constexpr int kPair = 2 * kSide;  // columns of a register tile
constexpr int64_t kSteps = 4;     // times 32 rows, for which a register tile is loaded and stored once

size_t element(Precision precision) { return sizeof(uint16_t) * (precision == Precision::high ? 2 : 1); }

template <class Feature>
void pack(const Group& group, int64_t row, const Panel& panel, double* column_squares, void* squares) {
  const auto pack =
      panel.precision == Precision::high ? pack_as<Feature, true, false> : pack_as<Feature, false, false>;
  pack(group, row, panel, column_squares, static_cast<float*>(squares));
}

// The lines of the 32 x 32 float64 that a register tile is added to are asked for while it is multiplied.
class Destination {
 public:
  Destination(const Panel& panel, int64_t i, int64_t j, double* scatter)
      : at_(scatter ? scatter + j * panel.p + i : nullptr),
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

// The left factors of lines of register tiles, [steps][2 pieces][1 or 2: hi, lo] tiles each. While those of
// one line are multiplied, those of the next one are made.
template <bool Split>
class LeftFactors {
 public:
  // Of the lines of columns j to `end`. `right` are the tiles of the piece that begins with column j,
  // `stride` bytes from those of one step to those of the next.
  LeftFactors(const char* right, int64_t stride, int64_t steps, int64_t j, int64_t end)
      : right_(right), stride_(stride), tiles_(steps * kTiles), lines_((end - j) / kPair) {}

  // Those of the next line, until they are asked for again.
  const char* next() {
    while (made_ < tiles_) make_one();
    settle_stores();
    const char* made = buffers_[lines_ % 2];
    right_ += kTiles * kTileBytes;
    made_ = --lines_ > 0 ? 0 : tiles_;
    return made;
  }

  // One tile further.
  void advance() {
    if (made_ < tiles_) make_one();
  }

 private:
  static constexpr int64_t kTiles = Split ? 4 : 2;  // of a step

  void make_one() {
    const char* from = right_ + made_ / kTiles * stride_ + made_ % kTiles * kTileBytes;
    __m512i words[kSide];
#pragma GCC unroll 16
    for (int q = 0; q < kSide; q++) words[q] = _mm512_load_si512(from + q * 64);
    store_transposed(words, buffers_[lines_ % 2] + made_++ * kTileBytes);
  }

  alignas(64) char buffers_[2][kSteps * kTiles * kTileBytes];
  const char* right_;  // of the line that is being made
  int64_t stride_, tiles_, lines_, made_ = 0;
};

// Eight tile registers: four accumulators, two left and two right factors. The order lo-right, hi-right,
// lo-left needs eight loads for twelve products.
template <bool Split>
void register_tile(const char* left, const char* right, int64_t stride, int64_t steps,
                   const Destination* destination, LeftFactors<Split>& following) {
  constexpr int64_t kBytes = kTileBytes * (Split ? 2 : 1);
  for (int64_t k = 0; k < steps; k++, left += 2 * kBytes, right += stride) {
    if (destination) {
      for (int64_t line = k * kPair / steps; line < (k + 1) * kPair / steps; line++)
        destination->prefetch(line);
    }
    following.advance();
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
constexpr int64_t kFusedRows = kSteps * kGroup;

// The larger the tile the less of the panel is read again, and the fewer tasks there are for the threads.
int64_t tile(int64_t padded) { return padded >= 4 * kMostTile ? kMostTile : kMostTile / 2; }

// visit(j, i, floats) for the register tiles of a tile, and where in scratch their sums are.
template <class Visit>
void for_register_tiles(const Panel& panel, int64_t I, int64_t J, char* scratch, const Visit& visit) {
  const int64_t rows_end = end_of_tile(panel, I), columns_end = end_of_tile(panel, J);
  for (int64_t j = I; j < rows_end; j += kPair) {
    for (int64_t i = I == J ? j : J; i < columns_end; i += kPair, scratch += kPair * kLine)
      visit(j, i, scratch);
  }
}

// scratch += the products of `count` times 32 rows from step `step`; with a scatter, scratch is added to that
// in the end.
template <bool Split>
void add_products(const Panel& panel, int64_t I, int64_t J, int64_t step, int64_t count, bool anew,
                  double* scatter, char* scratch) {
  constexpr int64_t kBytes = kTileBytes * (Split ? 2 : 1);
  const int64_t stride = panel.padded / kSide * kBytes;
  const char* right = panel.data + step * stride;
  LeftFactors<Split> factors(right + I / kSide * kBytes, stride, count, I, end_of_tile(panel, I));
  const char* left = nullptr;
  int64_t line = -1;
  for_register_tiles(panel, I, J, scratch, [&](int64_t j, int64_t i, char* floats) {
    if (j != line) left = factors.next();
    line = j;
    const Destination destination(panel, i, j, scatter);
    if (anew) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      load_accumulators(floats);
    }
    register_tile<Split>(left, right + i / kSide * kBytes, stride, count, scatter ? &destination : nullptr,
                         factors);
    store_accumulators(floats);
    if (scatter) destination.add(floats);
  });
}

// The rows are taken kSteps tile products at a time, so that the panel's columns of one tile of the scatter
// stay in the second-level cache beside its float32 sums (scratch). Those go to the float64 scatter with the
// last of them.
void multiply(const Panel& panel, int64_t I, int64_t J, bool anew, double* scatter, char* scratch) {
  _tile_loadconfig(&kTileConfiguration);
  const auto add = panel.precision == Precision::high ? add_products<true> : add_products<false>;
  const int64_t steps = (panel.rows + kGroup - 1) / kGroup;
  for (int64_t step = 0; step < steps; step += kSteps) {
    const bool last = step + kSteps >= steps;
    add(panel, I, J, step, last ? steps - step : kSteps, anew && step == 0, last ? scatter : nullptr,
        scratch);
  }
  _tile_release();
}

template <class Feature>
const ScatterBody* body(Dtype dtype) {
  static const ScatterBody table = [dtype] {
    ScatterBody body = *scatter_body_avx512(dtype);  // what makes no products stays as it is
    body.pad = kPair;
    body.panel_rows = body.least_rows = 2048;
    body.scratch = sizeof(float);
    body.element = element;
    body.tile = tile;
    body.least_tile = body.fused_columns = kMostTile;
    body.fused_rows = kFusedRows;
    body.pack = pack<Feature>;
    body.add_residuals = nullptr;
    body.multiply = multiply;
    return body;
  }();
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

// class_scatter on the CPU: counts, sums, sums of squares and the scatter of (h - k_y), from one read of h.
//
// class_scatter.cpp orders the rows by class; a body, one per instruction set, packs their residuals into a
// panel and multiplies the panel with itself:
//
//   rows of one chunk, counting-sorted by class
//     block     rows whose strips are tasks at the same time
//       strip   one task of the pack stage
//         group   up to 32 rows, one call of a body
//     tile      a square of the upper triangle of the scatter
//
// With rows enough a strip is what a panel holds, and the two stages are one task: a thread packs the strip
// into a panel of its own, multiplies that, and adds to each tile of the scatter when it is the strip's turn.
// Where the whole scatter is no more than a tile, the panel may hold fewer rows, so that it stays in the
// cache from packing to multiplying, and is filled again. With few rows a block is what one panel holds: all
// threads pack it, in short strips, and then multiply it, each tile being a task.
//
// Every boundary depends on shapes and labels alone, and what two tasks contribute to the same number is
// added in the order of the tasks: results are bitwise the same for any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "cpu/isa.h"

namespace ncfast {

enum class Dtype { float32, float64, bfloat16, float16 };
enum class Precision { highest, high, medium };

struct ClassScatter {
  int64_t N, p, C;
  Dtype dtype;
  const void* features;  // [N, p], columns contiguous
  int64_t row_bytes;     // from one row to the next; may be 0 or negative
  const void* labels;    // [N] int64 or int32; rows whose label is outside [0, C) are never read
  int label_size;        // 8 or 4
  int64_t label_bytes;   // from one label to the next
  int64_t ignore_index;  // left out even if in [0, C)
  const void* shift;     // [C, p] contiguous; float64 when the features are, else float32. Null: these are
                         // rows that wait, up to kMostWaiting; there is a scatter, and there are no radii
  Precision precision;

  // The results are added to what these hold unless `fresh`. Below its diagonal the scatter is without
  // meaning unless `symmetric`.
  int64_t* counts;  // [C]
  double* sums;     // [C, p] sum of h - k_y
  double* sumsq;    // [C] sum of |h - k_y|^2; infinite or NaN when a residual is, or when squares overflow
  double* scatter;  // [p, p] or null
  void* radii;  // [N] |h - k_y|, NaN for a row left out; float64 when the features are, else float32; or null
  bool symmetric;
  bool fresh;  // what these hold has no meaning yet
};

enum class Refusal { none, label, nonfinite, room };

// Refuses a label outside [0, C) that is not ignore_index, with the outputs half written, as they are when
// `poll` throws: it is called now and then on the calling thread. Says so, with complete outputs, if a sumsq
// is not finite.
Refusal class_scatter(const ClassScatter& call, Isa isa, int threads, const std::function<void()>& poll);

// class_scatter for a small batch that must be added as a whole or not at all. Classes whose shift begins
// with a NaN get their first feature as shift. Refuses, with every output and the shift bit for bit as they
// were, such a label, and residuals that are not finite or whose squares overflow. May read the features
// twice: they should fit the cache.
Refusal class_scatter_update(const ClassScatter& call, void* shift, Isa isa, int threads);

constexpr int kCacheLine = 64;      // bytes
constexpr int kMostWaiting = 2048;  // rows: no float32 sum of theirs is longer

// Rows that wait to be added by one class_scatter later, as residuals: its features, without a shift.
struct WaitingRows {
  char* residuals;    // [.., p], of the shift's dtype
  int64_t row_bytes;  // from one row to the next: whole cache lines, the rest of the last one without meaning
  int64_t* labels;    // [..]
  int64_t* filled;    // how many wait
  int64_t room;       // how many can
};

// The part of class_scatter_update that can refuse: chooses shifts, and appends the rows in use to those that
// wait. Refuses rows that find no room as well. Needs no outputs. The shifts of waiting rows must stay until
// they are added.
Refusal class_scatter_admit(const ClassScatter& call, void* shift, Isa isa, int threads,
                            const WaitingRows& waiting);

// Rows as they lie, of many classes.
struct Window {
  static constexpr int kMost = 64;  // rows
  struct Row {
    uint32_t place;                 // counted from `features`, rows left out included
    uint32_t label : 31, move : 1;  // whether the sums of its class are moved to the totals first
  };

  int count;
  const Row* rows;
  const char* features;  // of place 0
  int64_t row_bytes;
  int64_t ahead;  // bytes from a row to the one that is asked for meanwhile; 0 asks for nothing new
  int64_t p;
  const char* shift;  // [C, p] float64 for float64 features, else float32; as the sums
  char* sums;         // [C, p]
  int64_t stride;     // bytes from one class's shift, and one class's sums, to the next one's
  double* totals;     // [C, p], contiguous
};

constexpr int kGroup = 32;

// Rows of a strip in class order, and where their residuals go.
struct Group {
  int rows;
  const char* features[kGroup];
  const char* next[kGroup];  // rows worth prefetching meanwhile
  const char* shift[kGroup];
  double* sums[kGroup];
  bool last[kGroup];  // whether the row is the last one with its sums
};

struct Panel {
  int64_t p;       // columns
  int64_t padded;  // columns, rounded up to ScatterBody::pad; those from p on do not matter
  int64_t rows;    // rows filled
  int64_t stride;  // rows it has room for, a multiple of kGroup
  int64_t tile;    // side of the tiles
  Precision precision;
  char* data;  // aligned to a page, but for rows that wait
  // Of panels of numbers: how many from one `pad` columns to the next ones, and from one row to the next.
  int64_t piece, step;
};

// Where the tile ends that begins with column I.
inline int64_t end_of_tile(const Panel& panel, int64_t I) {
  return I + panel.tile < panel.padded ? I + panel.tile : panel.padded;
}

// What an instruction set contributes. `squares` is float64 [kGroup] for float64 features, else float32.
struct ScatterBody {
  int64_t pad;
  int64_t panel_rows;               // that a panel holds at most, a multiple of kGroup
  int64_t least_rows;               // of a strip, for threads to have panels of their own
  size_t scratch;                   // bytes per thread and number of a tile
  size_t (*element)(Precision);     // bytes of panel per residual
  int64_t (*tile)(int64_t padded);  // at most, multiple of pad
  int64_t least_tile;               // multiple of pad: where threads have panels of their own, tiles are
                                    // multiples of it, and an eighth of the columns if that is less
  int64_t fused_columns;            // up to so many, padded, a thread's own panel holds
  int64_t fused_rows;               // so many rows instead, a multiple of kGroup, and a tile is all columns

  // Without the scatter: sums [p], float64 for float64 features, else float32, += the residuals of `count`
  // rows of one class, one after the other; squares[i] = |residual i|^2 in that precision. Asks for the rows
  // `next`, which come later.
  void (*add_rows)(const char* const* features, const char* const* next, int count, const char* shift,
                   void* sums, int64_t p, void* squares);
  // The same, bit for bit, for rows of many classes: a few columns of all rows at a time, so that the shifts
  // and sums of those stay in the first level of the cache. Moves sums first where a row says so.
  void (*add_window)(const Window&, void* squares);
  // totals [p] += sums, and sums = 0.
  void (*move_row)(void* sums, double* totals, int64_t p);
  // Returns |residual|^2 of a row, in that precision, and puts its residuals, whole vectors of them, where
  // they will wait; null for nowhere.
  double (*take_row)(const char* row, const char* shift, int64_t p, char* residuals);
  // Sums and squares of the rows of a group, column_squares[p] += the squares of their residuals, and the
  // residuals go into the panel, from its row `row` on.
  void (*pack)(const Group&, int64_t row, const Panel&, double* column_squares, void* squares);
  // The same for rows that wait, which are a panel themselves; null where panels are not made of numbers.
  void (*add_residuals)(const Group&, int64_t p, double* column_squares, void* squares);
  // scatter [p, p] += the products of panel columns [I, I + tile) and [J, J + tile), I <= J, and what
  // calls without a scatter have left in scratch, unless that is `anew`. May write below the diagonal within
  // the tile. Only bodies with `fused_columns` are called without a scatter.
  void (*multiply)(const Panel&, int64_t I, int64_t J, bool anew, double* scatter, char* scratch);
};

// To be called only where the instruction set is available. AMX multiplies one or two bfloat16, AVX512-BF16
// one: what asks for more, and float64, is left to AVX-512's FMAs.
const ScatterBody* scatter_body_portable(Dtype dtype);
const ScatterBody* scatter_body_avx2(Dtype dtype);
const ScatterBody* scatter_body_avx512(Dtype dtype);
const ScatterBody* scatter_body_avx512_bf16(Dtype dtype, Precision precision);
const ScatterBody* scatter_body_amx(Dtype dtype, Precision precision);

}  // namespace ncfast

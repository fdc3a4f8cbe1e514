// pair_geometry on the CPU: what all pairs of rows say, from tiles of their Gram matrix. Four sweeps over
// such tiles: `pair_geometry`, `etf_error`, `decision_radius` and `decision_bound`. No more than O(C (p +
// threads)) is held.
//
// In float64 a product <u, v> is off by at most p 2^-53 |u| |v|, so a Gram matrix loses the distance of rows
// that are close beside their norms, and cannot tell which of two nearly equal distances is the smaller. Such
// pairs are evaluated once more from the difference of the rows: those too close for the Gram matrix, and
// those whose bounds leave open which is the smallest. `decision_radius` asks no more of a Gram matrix than
// which pairs those are, so it looks at tiles of bfloat16 or float32 first.
//
//   task   kSide rows i, against every row j of its triangle or rectangle
//     tile   kSide rows j at a time: products[j][i], then one of the reductions below
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "cpu/isa.h"

namespace ncfast {

// Doubles in the order in which ncfast/ops/pair_geometry/cpu.py unpacks them.
struct PairStatistics {
  double cosine_mean, cosine_std, cosine_min, cosine_max, max_angle_deviation, log_kernel_mean,
      log_kernel_std, etf_error, cdnv;
};

struct PairGeometry {
  int64_t C, p;
  const double* vectors;    // [C, p] contiguous
  const double* variances;  // [C] or null, which leaves cdnv 0
  PairStatistics* statistics;
  double* nearest_distance;  // [C] NaN for a row with a NaN, or with a norm beyond 1e150
  int64_t* nearest_index;    // [C]
};

struct EtfError {
  int64_t C, p;
  const double *left, *right;  // [C, p] contiguous; the same address for a symmetric Gram matrix
};

struct DecisionRadius {
  int64_t C, p, A;
  const double* weight;    // [C, p] contiguous
  const double* bias;      // [C]
  const double* anchors;   // [A, p] contiguous
  const int64_t* classes;  // [A] in [0, C)
  double* radii;           // [A]
};

// `poll` as in class_scatter.h. Results are bitwise the same for any number of threads.
void pair_geometry(const PairGeometry& call, Isa isa, int threads, const std::function<void()>& poll);
double etf_error(const EtfError& call, Isa isa, int threads, const std::function<void()>& poll);
void decision_radius(const DecisionRadius& call, Isa isa, int threads, const std::function<void()>& poll);
// Lower bounds of the same radii, from |v_a - v_c| <= |v_a| + |v_c|; -inf where that shows no positive one.
void decision_bound(const DecisionRadius& call, Isa isa, int threads, const std::function<void()>& poll);

constexpr int kSide = 48;      // rows of a tile; a multiple of every body's register tile
constexpr int kPanelRows = 8;  // a panel is [rows / 8][p][8], padded with rows of zeros

// A product <u, v> made in float64 is off by at most this times |u| |v|, norms rounded likewise included.
inline double product_error(int64_t p) { return 2 * (static_cast<double>(p) + 8) * 0x1p-53; }

// The sums over the pairs of a task, or of a tile. Squares are about the mean: one-pass formulas cancel where
// all cosines agree, which is where training leads.
struct PairSums {
  double pairs = 0;
  double deviation = 0, deviation_squares = 0, absolute = 0;  // of cos + 1 / (C - 1)
  double kernel = 0, kernel_squares = 0;
  double low = __builtin_inf(), high = -__builtin_inf();  // the extreme cosines
  double cdnv = 0;
};

// The smallest squared distance evaluated from differences, and the lowest row that has it.
struct Nearest {
  double square;
  int64_t index;
};

// One thread's search for the nearest row of each row. Pairs that may be it wait until the bounds have come
// down: for rows in random order about log C per row wait and one is evaluated.
struct Candidate {
  int64_t i, j;
  double least;  // bounds the squared distance from below
};
struct Search {
  Nearest* nearest;    // [C]
  double* most;        // [C] bounds the smallest squared distance of the pairs met from above
  Candidate* waiting;  // [room]
  int64_t count, room;
};

struct PairRows {
  int64_t C, p;
  const double* vectors;
  const double* squares;    // [C padded to kSide] |u|^2
  const double* norms;      // [C] |u|
  const double* inverse;    // [C padded] 1 / |u|; NaN for a row of zeros, or where |u|^2 overflows
  const double* variances;  // [C padded]
};

// What the sum of (scale <l_i, r_j> - ideal)^2 is about, the ideal having these two entries.
struct Residual {
  EtfError call;
  double scale, diagonal, off_diagonal;
};

struct RadiusRows {
  DecisionRadius call;
  const double* squares;  // [C padded to kSide] |v_c|^2
  const double* norms;    // [C padded] |v_c|, where that is tiny at least as large
  // Of each anchor, [A padded]: <v_a, m_a> + b_a, |v_a|^2, |v_a| and |m_a| (as `norms`), |v_a| |m_a|.
  const double *own, *own_square, *own_norm, *anchor_norm, *own_norms;
  double unit;  // a product <u, v> of the tiles is off by at most unit |u| |v|
};

// One task's search for the nearest walls of its anchors. Walls that may be it wait, as in Search; `most`
// bounds the square of the smallest distance, with the distance's sign.
struct RadiusSearch {
  double most[kSide];
  Candidate* waiting;  // [room]
  int64_t count, room;
};

// Adds the sums of other pairs.
void merge(PairSums* sums, const PairSums& other);

// What an instruction set contributes. Tiles are [kSide j][kSide i]; the first rows are I and J.
struct PairBody {
  double (*dot)(const double* u, const double* v, int64_t p);
  void (*products)(const double* left, const double* right, int64_t p, double* tile);
  // Pairs i < j < C.
  void (*reduce_pairs)(const PairRows&, int64_t I, int64_t J, const double* tile, Search*, PairSums*);
  void (*settle)(const PairRows&, Search*);  // evaluates who waits, if still in question
  double (*reduce_residual)(const Residual&, int64_t I, int64_t J, const double* tile);
  // `gram` holds <v_{classes[i]}, v_j>, `scores` <m_i, v_j>. There must be room for kSide^2 more to wait.
  void (*reduce_radius)(const RadiusRows&, int64_t I, int64_t J, const double* gram, const double* scores,
                        RadiusSearch*);
  // least[i] is lowered to the bounds of anchor i's distances to the walls of the tile.
  void (*reduce_bound)(const RadiusRows&, int64_t I, int64_t J, const double* scores, double* least);
  // radii[i] is lowered to the distance of who waits, if still in question.
  void (*settle_radius)(const RadiusRows&, RadiusSearch*);
};

// How a scaled row was packed: what is missing, and the part that meets its like in no product, in norm.
struct Packed {
  double lost, low;
};

// Low-precision tiles of products of rows scaled to norm 1. A left and a right block of kSide rows differ in
// layout, and are as large.
struct PairScreen {
  int64_t (*offset)(int64_t p, int r);  // in bytes, of row r in a right block; of row kSide: its size
  Packed (*pack)(const double* row, double scale, int64_t p, char* out);  // a row times `scale`
  void (*transpose)(const char* const rows[kSide], int64_t p, char* left);
  double (*depth)(int64_t p);  // of float32 additions that a product may pass through
  // tile[j][i]; of one left block, or of two, the other being null or not.
  void (*products)(const char* left, const char* other, const char* right, int64_t p, float* tile,
                   float* other_tile);
};

const PairBody* pair_body_portable();
const PairBody* pair_body_avx2();
const PairBody* pair_body_avx512();
const PairScreen* pair_screen_portable();
const PairScreen* pair_screen_avx2();
const PairScreen* pair_screen_avx512();
const PairScreen* pair_screen_avx512_bf16();
constexpr int kScreenLevels = 2;
const PairScreen* pair_screen_amx(int level);  // one bfloat16 per number, or two

}  // namespace ncfast

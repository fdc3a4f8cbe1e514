// affine_argmax on the CPU: argmax_c <v_c, h> + b_c for one or several rules, in one read of h, without ever
// holding N x C scores; exact wherever it says so.
//
// A body scores blocks of rows in low precision and keeps each row's best two scores. With d = h - m the
// centred features, x^ what the multiplication really saw of x, and E the bound below, |score - score^| <= E
// for every class; so when best - second > 2 E the best class is the exact argmax, and the row is decided. Of
// the others most have a few classes within 2 E of the best: these alone are scored in float64. A body keeps
// the best two of every vector lane with the index of the first, so it knows them unless two share a lane.
// Rows that are still open are scored again at the body's next level, and what is left is for the caller. A
// level 0 that decides wide margins only is tried on a sample of the rows, and left out where it would decide
// too few.
//
//   E = |d - d^| max|v| + |d^| max|v - v^| + |d_lo| max|v_lo| + depth u (|d^| max|v^| + max|b|) + u max|b|
//       + slack of b + underflow
//
// The norms are the actual ones, measured while packing: half of what the formats guarantee; |v - v^| has the
// slack of the weight in it. The third term is the product that the last level leaves out, the next to last
// the rounding of the bias; `depth` is the longest chain of additions a product goes through.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "cpu/class_scatter.h"

namespace ncfast {

struct AffineRule {
  int64_t C;
  const double* weight;  // [C, p] contiguous, rows centred by the caller
  const double* bias;    // [C]: <v_c, m> included
  double weight_slack;   // how far a row of `weight` may be from the exact one, in norm
  double bias_slack;     // the same for an entry of `bias`

  int64_t* index;  // [N] the decision, or for an undecided row some class in [0, C)
  bool* decided;   // [N]
};

struct AffineArgmax {
  int64_t N, p;
  Dtype dtype;
  const void* features;  // [N, p], columns contiguous
  int64_t row_bytes;
  const float* middle;  // [p] m
  int rules;
  const AffineRule* rule;
};

void affine_argmax(const AffineArgmax& call, Isa isa, int threads, const std::function<void()>& poll);

// What the bound needs to know of a packed row, or the largest of it over the rows of a rule.
struct Norms {
  double seen;      // |x^|
  double residual;  // |x - x^|
  double low;       // |x_lo|: the part that meets its like in no product; 0 where every product is made
};

// A NaN stays: it makes every bound NaN, and no row decided.
inline double larger(double most, double value) { return value <= most || most != most ? most : value; }

inline void keep_larger(Norms* most, const Norms& norms) {
  *most = {larger(most->seen, norms.seen), larger(most->residual, norms.residual),
           larger(most->low, norms.low)};
}

// The best two scores of one row over the classes of a rule.
struct TopTwo {
  float best, second;
  int32_t index;
};

// Packed rows of a block, or classes of a rule.
struct Operand {
  char* numbers;
  float* scale;  // where they are integers, what 1 stands for in each row or class
};

// What an instruction set contributes. Classes are padded to a multiple of `classes`, with weight 0 and bias
// -infinity, and packed in groups of `group`, the last of which may have fewer; rows of a block are padded to
// a multiple of `rows`, with zeros.
struct ArgmaxBody {
  int levels;
  int64_t coarse_columns;  // up to which level 0 is one for wide margins; 0: it never is
  int64_t coarse_classes;  // of all rules, from which on it pays
  int rows, classes, group;
  size_t (*bytes)(int64_t p, int level);  // of a packed row or class
  double (*depth)(int64_t p, int level);
  void (*pack_rule)(const double* weight, int64_t C, int64_t p, int level, int64_t first, int64_t count,
                    Operand panel, Norms* norms);  // the group of `count` classes from `first`
  void (*pack_row)(const char* features, const float* middle, int64_t p, int level, int64_t row,
                   Operand block, Norms* norms);  // features null: a row of zeros
  void (*score)(Operand block, int64_t rows, Operand panel, const float* bias, int64_t classes, int64_t p,
                int level, char* scratch, TopTwo* top);
  size_t (*scratch)(int64_t rows);
  // After `score`: the classes of a row whose scores are not below the threshold, at most kCandidates; 0
  // where others may be hidden behind them.
  int (*candidates)(const char* scratch, int64_t row, float threshold, int32_t* classes);
  double (*product)(const char* features, const float* middle, const double* weight,
                    int64_t p);  // <v, h - m>
};

constexpr int kCandidates = 16;

// Null when this build has no such body.
const ArgmaxBody* argmax_body(Isa isa, Dtype dtype);
const ArgmaxBody* argmax_body_portable(Dtype dtype);
const ArgmaxBody* argmax_body_avx2(Dtype dtype);
const ArgmaxBody* argmax_body_avx512(Dtype dtype);
const ArgmaxBody* argmax_body_avx512_vnni(Dtype dtype);
const ArgmaxBody* argmax_body_amx(Dtype dtype);

}  // namespace ncfast

// The bodies of affine_argmax that score in float32 with vector FMAs, once for every vector width. Included
// like class_scatter_vector.h, which it brings along for its vectors and loads.
//
// Block: rows of float32, row-major. Panel: per group of A or fewer vectors of classes, [p][vectors * W].

#include "cpu/class_scatter_vector.h"

// |(h - m) - out| <= kRounded |out|: a float32 difference is rounded once, by 2^-24 relative; a float64
// feature first loses as much again.
constexpr double kRounded = 0x1p-23;

// The type in which a feature is exact.
template <class Feature>
using Number = std::conditional_t<std::is_same_v<Feature, double>, double, float>;

// Columns [j, j + count) of h - m, count <= W, and zeros after them.
template <class Feature, int W>
inline Vec<float, W> centred(const char* features, const float* middle, int64_t j, int count) {
  using Exact = Vec<Number<Feature>, W>;
  const auto m = load<float, float, W>(reinterpret_cast<const char*>(middle), j, count);
  const Exact d = load<Feature, Number<Feature>, W>(features, j, count) - __builtin_convertvector(m, Exact);
  return __builtin_convertvector(d, Vec<float, W>);
}

// Returns |out|, rounded up.
template <class Feature, int W>
inline double centre(const char* features, const float* middle, int64_t p, float* out) {
  Vec<float, W> squares = {};
  for (int64_t j = 0; j < p; j += W) {
    const int count = static_cast<int>(p - j < W ? p - j : W);
    const Vec<float, W> d = centred<Feature, W>(features, middle, j, count);
    squares += d * d;
    std::memcpy(out + j, &d, count * sizeof(float));
  }
  // Of p / W + W additions; and of squares that underflowed.
  const double rounded = 1 + (static_cast<double>(p) / W + W + 2) * 0x1p-24;
  const double lost = static_cast<double>(p) * 0x1p-124;
  return std::sqrt(sum<float, W>(squares) + lost) * rounded;
}

template <class Feature, int W, int A, int R>
struct FloatArgmax {
  using V = Vec<float, W>;
  using I = Vec<int32_t, W>;
  static constexpr int kClasses = A * W;

  static size_t bytes(int64_t p, int) { return p * sizeof(float); }

  // A score is one chain of p FMAs that begins with the bias.
  static double depth(int64_t p, int) { return static_cast<double>(p) + 2; }

  static void pack_rule(const double* weight, int64_t C, int64_t p, int, int64_t first, int64_t count,
                        Operand panel, Norms* norms) {
    float* out = reinterpret_cast<float*>(panel.numbers);
    *norms = {0, 0, 0};
    for (int64_t c = 0; c < count; c++) {
      double seen = 0, residual = 0;
      for (int64_t j = 0; j < p; j++) {
        const double exact = first + c < C ? weight[(first + c) * p + j] : 0;
        const float rounded = static_cast<float>(exact);
        out[j * count + c] = rounded;
        seen += static_cast<double>(rounded) * rounded;
        residual += (exact - rounded) * (exact - rounded);
      }
      keep_larger(norms, {std::sqrt(seen), std::sqrt(residual), 0});
    }
  }

  static void pack_row(const char* features, const float* middle, int64_t p, int, int64_t row, Operand block,
                       Norms* norms) {
    float* out = reinterpret_cast<float*>(block.numbers) + row * p;
    if (!features) {
      std::memset(out, 0, p * sizeof(float));
      return;
    }
    const double norm = centre<Feature, W>(features, middle, p, out);
    // A denormal is rounded absolutely.
    *norms = {norm, kRounded * norm + static_cast<double>(p) * 0x1p-126, 0};
  }

  static size_t scratch(int64_t rows) { return static_cast<size_t>(rows) * 3 * sizeof(V); }

  // Running best two per lane.
  struct Lanes {
    V best, second;
    I index;
  };

  // A function of its own: inlined, GCC 12 keeps the sums in memory, and AVX2 takes twice as long.
  template <int Vectors>
  [[gnu::noinline]] static void tile(const float* block, int64_t p, const float* panel, const float* bias,
                                     int32_t first, Lanes* lanes) {
    V total[R][Vectors];
    for (int a = 0; a < Vectors; a++) {
      V start;
      std::memcpy(&start, bias + a * W, sizeof start);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) total[r][a] = start;
    }
    for (int64_t j = 0; j < p; j++) {
      V v[Vectors];
#pragma GCC unroll 4
      for (int a = 0; a < Vectors; a++) std::memcpy(&v[a], panel + (j * Vectors + a) * W, sizeof(V));
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const float factor = block[r * p + j];
#pragma GCC unroll 4
        for (int a = 0; a < Vectors; a++) total[r][a] += v[a] * factor;
      }
    }
    for (int a = 0; a < Vectors; a++) {
      const I index = indices(first + a * W);
      for (int r = 0; r < R; r++) update(lanes[r], total[r][a], index);
    }
  }

  static I indices(int32_t first) {
    I lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    return lane + first;
  }

  static void update(Lanes& lanes, const V& score, const I& index) {
    const I better = score > lanes.best;
    const V loser = better ? lanes.best : score;
    lanes.second = loser > lanes.second ? loser : lanes.second;
    lanes.best = better ? score : lanes.best;
    lanes.index = better ? index : lanes.index;
  }

  static void score(Operand block, int64_t rows, Operand panel, const float* bias, int64_t classes, int64_t p,
                    int, char* scratch, TopTwo* top) {
    const float* data = reinterpret_cast<const float*>(block.numbers);
    const float* rule = reinterpret_cast<const float*>(panel.numbers);
    for_tiles(rows, classes, scratch, top, [&](auto vectors, int64_t i, int64_t c, Lanes* lanes) {
      tile<vectors>(data + i * p, p, rule + c * p, bias + c, static_cast<int32_t>(c), lanes);
    });
  }

  // run(vectors, i, c, lanes) for R rows from i on and as many vectors of classes from c on, and then the
  // best two of each row.
  template <class Run>
  static void for_tiles(int64_t rows, int64_t classes, char* scratch, TopTwo* top, const Run& run) {
    Lanes* lanes = reinterpret_cast<Lanes*>(scratch);
    const V nothing = V{} - __builtin_inff();
    for (int64_t i = 0; i < rows; i++) lanes[i] = {nothing, nothing, I{}};
    const auto for_rows = [&](auto vectors, int64_t c) {
      for (int64_t i = 0; i < rows; i += R) run(vectors, i, c, lanes + i);
    };
    int64_t c = 0;
    for (; c + kClasses <= classes; c += kClasses) for_rows(std::integral_constant<int, A>(), c);
    static_assert(A <= 3);
    if constexpr (A > 2) {
      if (c + 2 * W <= classes) for_rows(std::integral_constant<int, 2>(), c), c += 2 * W;
    }
    if (c < classes) for_rows(std::integral_constant<int, 1>(), c);
    for (int64_t i = 0; i < rows; i++) top[i] = reduce(lanes[i]);
  }

  static TopTwo reduce(const Lanes& lanes) { return reduce<W>(lanes.best, lanes.second, lanes.index); }

  // Halves are merged until one lane is left.
  template <int N>
  [[gnu::always_inline]] static TopTwo reduce(const Vec<float, N>& best, const Vec<float, N>& second,
                                              const Vec<int32_t, N>& index) {
    if constexpr (N == 1) {
      return {best[0], second[0], index[0]};
    } else {
      using Half = Vec<float, N / 2>;
      Half b[2], s[2];
      Vec<int32_t, N / 2> k[2];
      std::memcpy(b, &best, sizeof b);
      std::memcpy(s, &second, sizeof s);
      std::memcpy(k, &index, sizeof k);
      const Vec<int32_t, N / 2> better = b[1] > b[0];
      const Half loser = better ? b[0] : b[1], larger = s[1] > s[0] ? s[1] : s[0];
      return reduce<N / 2>(better ? b[1] : b[0], loser > larger ? loser : larger, better ? k[1] : k[0]);
    }
  }

  static int candidates(const char* scratch, int64_t row, float threshold, int32_t* classes) {
    static_assert(W <= kCandidates);
    const Lanes& lanes = reinterpret_cast<const Lanes*>(scratch)[row];
    int count = 0;
    for (int i = 0; i < W; i++) {
      if (!(lanes.second[i] < threshold)) return 0;
      if (!(lanes.best[i] < threshold)) classes[count++] = lanes.index[i];
    }
    return count;
  }

  static double product(const char* features, const float* middle, const double* weight, int64_t p) {
    using Wide = Vec<double, W>;
    Wide total = {};
    for (int64_t j = 0; j < p; j += W) {
      const int count = static_cast<int>(p - j < W ? p - j : W);
      const auto h = load<Feature, Number<Feature>, W>(features, j, count);
      const auto m = load<float, float, W>(reinterpret_cast<const char*>(middle), j, count);
      const auto v = load<double, double, W>(reinterpret_cast<const char*>(weight), j, count);
      total += (__builtin_convertvector(h, Wide) - __builtin_convertvector(m, Wide)) * v;
    }
    return sum<double, W>(total);
  }

  static const ArgmaxBody* body() {
    static const ArgmaxBody table = {
        1,         // levels
        0,         // coarse_columns
        0,         // coarse_classes
        R,         // rows
        W,         // classes
        kClasses,  // group
        bytes,    depth, pack_rule, pack_row, score, scratch, candidates, product,
    };
    return &table;
  }
};

template <int W, int A, int R>
const ArgmaxBody* float_argmax(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return FloatArgmax<float, W, A, R>::body();
    case Dtype::bfloat16:
      return FloatArgmax<BFloat16, W, A, R>::body();
    case Dtype::float16:
      return FloatArgmax<Float16, W, A, R>::body();
    case Dtype::float64:
      return FloatArgmax<double, W, A, R>::body();
  }
  return nullptr;
}

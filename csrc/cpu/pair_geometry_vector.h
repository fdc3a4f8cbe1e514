// The bodies of pair_geometry, once for every vector width. Included like class_scatter_vector.h.

template <int W>
using Doubles [[gnu::vector_size(W * sizeof(double))]] = double;
template <int W>
using Words [[gnu::vector_size(W * sizeof(int64_t))]] = int64_t;

// Below this share of what was subtracted a Gram matrix's square of a distance is not trusted. It bounds what
// is lost where it is: at most a factor of 16.
constexpr double kClose = 1.0 / 16;

template <int W>
struct PairVectors {
  using V = Doubles<W>;
  using M = Words<W>;
  static constexpr int kVectors = kSide / W;

  static V load(const double* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }

  static void store(double* to, const V& value) { std::memcpy(to, &value, sizeof value); }

  static double sum(const V& values) {
    double total = 0;
    for (int i = 0; i < W; i++) total += values[i];
    return total;
  }

  static bool any(const M& mask) {
    int64_t seen = 0;
    for (int i = 0; i < W; i++) seen |= mask[i];
    return seen != 0;
  }

  static V magnitude(const V& values) { return values < 0 ? -values : values; }

  // The natural logarithm of positive normal numbers to 2 units in the last place: x = m 2^e with m in
  // [0.71, 1.42), log m = 2 artanh s, s = (m - 1) / (m + 1), whose series ends below 2^-54 at s^21.
  static V log(const V& x) {
    M bits;
    std::memcpy(&bits, &x, sizeof bits);
    M exponent = (bits >> 52) | 0x4330000000000000;  // 2^52 + e + 1023
    bits = (bits & 0xfffffffffffff) | 0x3ff0000000000000;
    V m, e;
    std::memcpy(&m, &bits, sizeof m);
    std::memcpy(&e, &exponent, sizeof e);
    const M large = m > 1.4142135623730951;
    e = e - (0x1p52 + 1023) + (large ? V{} + 1.0 : V{});
    m = large ? m * 0.5 : m;
    const V s = (m - 1.0) / (m + 1.0), z = s * s;
    V series = V{} + 1.0 / 19;
    for (int k = 17; k >= 3; k -= 2) series = series * z + 1.0 / k;
    constexpr double kHigh = 0x1.62e42fefa38p-1, kLow = 0x1.ef35793c7673p-45;  // of log 2
    return e * kHigh + (2.0 * s + (2.0 * s * z * series + e * kLow));
  }

  static double dot(const double* u, const double* v, int64_t p) {
    V total = {};
    int64_t k = 0;
    for (; k + W <= p; k += W) total += load(u + k) * load(v + k);
    double rest = 0;
    for (; k < p; k++) rest += u[k] * v[k];
    return sum(total) + rest;
  }

  // Where row r of a panel has its column k.
  static const double* at(const double* panel, int64_t p, int r, int64_t k) {
    return panel + (r / kPanelRows * p + k) * kPanelRows + r % kPanelRows;
  }

  // `steps` columns from k of A vectors of rows from i by B rows from j.
  template <int A, int B>
  static void register_tile(const double* left, const double* right, int64_t p, int i, int j, int64_t k,
                            int64_t steps, double* tile) {
    const double* column[A];
    for (int a = 0; a < A; a++) column[a] = at(left, p, i + a * W, k);
    right = at(right, p, j, k);
    tile += j * kSide + i;
    V total[B][A];
    for (int b = 0; b < B; b++) {
      for (int a = 0; a < A; a++) total[b][a] = load(tile + b * kSide + a * W);
    }
    for (int64_t step = 0; step < steps; step++) {
      V u[A];
#pragma GCC unroll 4
      for (int a = 0; a < A; a++) u[a] = load(column[a] + step * kPanelRows);
#pragma GCC unroll 8
      for (int b = 0; b < B; b++) {
        const double factor = right[step * kPanelRows + b];
#pragma GCC unroll 4
        for (int a = 0; a < A; a++) total[b][a] += u[a] * factor;
      }
    }
    for (int b = 0; b < B; b++) {
      for (int a = 0; a < A; a++) store(tile + b * kSide + a * W, total[b][a]);
    }
  }

  // kSteps columns of A * W rows stay in the first-level cache while all rows j meet them.
  template <int A, int B>
  static void products(const double* left, const double* right, int64_t p, double* tile) {
    static_assert(kSide % (A * W) == 0 && kPanelRows % B == 0 && kPanelRows % W == 0);
    constexpr int64_t kSteps = 128;
    std::memset(tile, 0, kSide * kSide * sizeof(double));
    for (int64_t k = 0; k < p; k += kSteps) {
      const int64_t steps = p - k < kSteps ? p - k : kSteps;
      for (int i = 0; i < kSide; i += A * W) {
        for (int j = 0; j < kSide; j += B) register_tile<A, B>(left, right, p, i, j, k, steps, tile);
      }
    }
  }

  // |u - v|^2 and |u / |u| - v / |v||^2. Divided, not multiplied: nothing is contracted then, and rows that
  // are equal, or of equal direction in one dimension, have exactly no distance.
  static void differences(const PairRows& rows, int64_t i, int64_t j, double* square, double* unit_square) {
    const double *u = rows.vectors + i * rows.p, *v = rows.vectors + j * rows.p;
    const double a = rows.norms[i], b = rows.norms[j];
    V total = {}, unit_total = {};
    int64_t k = 0;
    for (; k + W <= rows.p; k += W) {
      const V x = load(u + k), y = load(v + k), d = x - y, e = x / a - y / b;
      total += d * d;
      unit_total += e * e;
    }
    double rest = 0, unit_rest = 0;
    for (; k < rows.p; k++) {
      const double d = u[k] - v[k], e = u[k] / a - v[k] / b;
      rest += d * d;
      unit_rest += e * e;
    }
    *square = sum(total) + rest;
    *unit_square = sum(unit_total) + unit_rest;
  }

  static void lower(Nearest* nearest, double square, int64_t index) {
    if (square < nearest->square || (square == nearest->square && index < nearest->index)) {
      *nearest = {square, index};
    }
  }

  static void evaluate(const PairRows& rows, Search* search, int64_t i, int64_t j, double* square,
                       double* unit_square) {
    differences(rows, i, j, square, unit_square);
    lower(&search->nearest[i], *square, j);
    lower(&search->nearest[j], *square, i);
    if (*square < search->most[i]) search->most[i] = *square;
    if (*square < search->most[j]) search->most[j] = *square;
  }

  static void settle(const PairRows& rows, Search* search) {
    for (int64_t n = 0; n < search->count; n++) {
      const Candidate& pair = search->waiting[n];
      double square, unit_square;
      if (pair.least <= search->most[pair.i] || pair.least <= search->most[pair.j]) {
        evaluate(rows, search, pair.i, pair.j, &square, &unit_square);
      }
    }
    search->count = 0;
  }

  static void reduce_pairs(const PairRows& rows, int64_t I, int64_t J, const double* tile, Search* search,
                           PairSums* sums) {
    const double simplex = 1.0 / static_cast<double>(rows.C - 1);
    // Of |u|^2 + |v|^2 - 2 <u, v>, of the squared difference it is compared with, and of the sum itself.
    const double error = 2 * product_error(rows.p);
    if (search->count + kSide * kSide > search->room) settle(rows, search);
    alignas(64) double deviation[kSide][kSide], kernel[kSide][kSide];
    V sum_deviation = {}, sum_absolute = {}, sum_kernel = {}, sum_cdnv = {};
    const V infinity = V{} + __builtin_inf();
    V low = infinity, high = -infinity;
    double most[kSide];
    for (int i = 0; i < kSide; i++) most[i] = I + i < rows.C ? search->most[I + i] : 0;
    M lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    const int columns = static_cast<int>(rows.C - J < kSide ? rows.C - J : kSide);
    const auto used = [&](int i, int j) { return lane + (I + i) < J + j; };
    for (int j = 0; j < columns; j++) {
      const double square_j = rows.squares[J + j], inverse_j = rows.inverse[J + j];
      const double most_j = search->most[J + j];
      alignas(64) double unit_square[kSide], square[kSide], least[kSide];
      M close[kVectors], doubtful[kVectors], some = {};
      V smallest = infinity;
      for (int i = 0; i < kSide; i += W) {
        const M mask = used(i, j);
        const V g = load(tile + j * kSide + i);
        const V cosine = g * load(rows.inverse + I + i) * inverse_j;
        const V both = load(rows.squares + I + i) + square_j;
        const V d = both - 2.0 * g, e = 2.0 - 2.0 * cosine, slack = error * both;
        const V above = mask ? d + slack : infinity, most_i = load(most + i);
        close[i / W] = ((e < kClose) | (d < kClose * both)) & mask;
        doubtful[i / W] = close[i / W] | (((d - slack <= most_i) | (d - slack <= most_j)) & mask);
        some |= doubtful[i / W];
        store(most + i, above < most_i ? above : most_i);
        smallest = above < smallest ? above : smallest;
        store(deviation[j] + i, cosine + simplex);
        store(unit_square + i, e);
        store(square + i, d);
        store(least + i, d - slack);
      }
      if (any(some)) {
        for (int i = 0; i < W; i++) {
          if (smallest[i] < search->most[J + j]) search->most[J + j] = smallest[i];
        }
        for (int i = 0; i < kSide; i++) {
          if (close[i / W][i % W]) {
            evaluate(rows, search, I + i, J + j, &square[i], &unit_square[i]);
            if (search->most[I + i] < most[i]) most[i] = search->most[I + i];
          } else if (doubtful[i / W][i % W]) {
            search->waiting[search->count++] = {I + i, J + j, least[i]};
          }
        }
      }
      const double variance_j = rows.variances[J + j];
      for (int i = 0; i < kSide; i += W) {
        const M mask = used(i, j);
        const V e = load(unit_square + i), d = load(deviation[j] + i), nothing = {};
        V logarithm = log(e);
        if (any(!(e >= 0x1p-1000))) {
          for (int l = 0; l < W; l++) logarithm[l] = std::log(e[l]);
        }
        const V value = -0.5 * logarithm;
        store(kernel[j] + i, value);
        sum_kernel += mask ? value : nothing;
        sum_deviation += mask ? d : nothing;
        sum_absolute += mask ? magnitude(d) : nothing;
        low = mask & (d < low) ? d : low;
        high = mask & (d > high) ? d : high;
        const V ratio = (load(rows.variances + I + i) + variance_j) / (2.0 * load(square + i));
        sum_cdnv += mask ? ratio : nothing;
      }
    }
    for (int i = 0; i < kSide && I + i < rows.C; i++) {
      if (most[i] < search->most[I + i]) search->most[I + i] = most[i];
    }
    const int64_t pairs = I < J ? int64_t{kSide} * columns : int64_t{columns} * (columns - 1) / 2;
    if (pairs == 0) return;
    PairSums own;
    own.pairs = static_cast<double>(pairs);
    own.deviation = sum(sum_deviation);
    own.absolute = sum(sum_absolute);
    own.kernel = sum(sum_kernel);
    own.cdnv = sum(sum_cdnv);
    for (int i = 0; i < W; i++) {
      own.low = low[i] - simplex < own.low ? low[i] - simplex : own.low;
      own.high = high[i] - simplex > own.high ? high[i] - simplex : own.high;
    }
    const double mean_deviation = own.deviation / own.pairs, mean_kernel = own.kernel / own.pairs;
    V deviation_squares = {}, kernel_squares = {};
    for (int j = 0; j < columns; j++) {
      for (int i = 0; i < kSide; i += W) {
        const M mask = used(i, j);
        const V d = mask ? load(deviation[j] + i) - mean_deviation : V{};
        const V k = mask ? load(kernel[j] + i) - mean_kernel : V{};
        deviation_squares += d * d;
        kernel_squares += k * k;
      }
    }
    own.deviation_squares = sum(deviation_squares);
    own.kernel_squares = sum(kernel_squares);
    merge(sums, own);
  }

  static double reduce_residual(const Residual& ideal, int64_t I, int64_t J, const double* tile) {
    const EtfError& call = ideal.call;
    const bool symmetric = call.left == call.right;
    const int64_t rows = call.C - I < kSide ? call.C - I : kSide;
    const int64_t columns = call.C - J < kSide ? call.C - J : kSide;
    V total = {};
    double rest = 0;
    for (int64_t j = 0; j < columns; j++) {
      const double* products = tile + j * kSide;
      int64_t i = 0;
      if (I != J) {
        for (; i + W <= rows; i += W) {
          const V residual = load(products + i) * ideal.scale - ideal.off_diagonal;
          total += residual * residual;
        }
      }
      for (; i < rows; i++) {
        const double residual =
            products[i] * ideal.scale - (I + i == J + j ? ideal.diagonal : ideal.off_diagonal);
        rest += residual * residual;
      }
    }
    return (sum(total) + rest) * (symmetric && I != J ? 2 : 1);
  }

  // The distance from anchor i to the boundary between its class and class c, from the difference of the two.
  static double wall(const DecisionRadius& call, int64_t i, int64_t c) {
    const int64_t a = call.classes[i], p = call.p;
    const double *u = call.weight + a * p, *v = call.weight + c * p, *anchor = call.anchors + i * p;
    V total = {}, products = {}, largest = {};
    int64_t k = 0;
    for (; k + W <= p; k += W) {
      const V d = load(u + k) - load(v + k), size = magnitude(d);
      total += d * d;
      products += d * load(anchor + k);
      largest = size > largest ? size : largest;
    }
    double square = sum(total), lead = sum(products), most = 0;
    for (; k < p; k++) {
      const double d = u[k] - v[k];
      square += d * d;
      lead += d * anchor[k];
      most = std::fabs(d) > most ? std::fabs(d) : most;
    }
    for (int l = 0; l < W; l++) most = largest[l] > most ? largest[l] : most;
    // Nothing is known of a lead that overflows: it must not pass for an infinite distance, as a bias may.
    if (!std::isfinite(lead)) return __builtin_nan("");
    lead += call.bias[a] - call.bias[c];
    if (most == 0 && square == 0) {  // no boundary: the larger bias wins everywhere, then the lower index
      return lead > 0 || (lead == 0 && c > a) ? __builtin_inf() : -__builtin_inf();
    }
    if (square >= 0x1p-900 && square <= 0x1p900) return lead / std::sqrt(square);
    double scaled = 0;  // a tiny difference must not underflow to none
    for (k = 0; k < p; k++) {
      const double d = (u[k] - v[k]) / most;
      scaled += d * d;
    }
    return lead / (most * std::sqrt(scaled));
  }

  static double signed_square(double distance) { return distance * std::fabs(distance); }

  static void settle_radius(const RadiusRows& rows, RadiusSearch* search) {
    const DecisionRadius& call = rows.call;
    for (int64_t n = 0; n < search->count; n++) {
      const auto& [i, c, least] = search->waiting[n];
      double *radius = &call.radii[i], *most = &search->most[i % kSide];
      if (least > *most) continue;
      const double distance = wall(call, i, c);
      if (distance < *radius || std::isnan(distance)) *radius = distance;
      if (signed_square(distance) < *most) *most = signed_square(distance);
    }
    search->count = 0;
  }

  // Of what is computed in float64 throughout: an anchor's own score, and sums of a few numbers.

  // Of own - score, `norm` being the other row's.
  static V error_of_lead(const RadiusRows& rows, int64_t i, const V& own, const V& score, double norm) {
    return product_error(rows.call.p) * (load(rows.own_norms + i) + magnitude(own) + magnitude(score)) +
           rows.unit * load(rows.anchor_norm + i) * norm;
  }

  static void reduce_bound(const RadiusRows& rows, int64_t I, int64_t J, const double* scores,
                           double* least) {
    const DecisionRadius& call = rows.call;
    const int count = static_cast<int>(call.A - I < kSide ? call.A - I : kSide);
    const int columns = static_cast<int>(call.C - J < kSide ? call.C - J : kSide);
    alignas(64) double own_column[kSide] = {};
    for (int i = 0; i < count; i++) own_column[i] = static_cast<double>(call.classes[I + i] - J);
    for (int j = 0; j < columns; j++) {
      const double bias = call.bias[J + j], norm = rows.norms[J + j];
      for (int i = 0; i < kSide; i += W) {
        const V own = load(rows.own + I + i), score = load(scores + j * kSide + i) + bias;
        const V low = own - score - error_of_lead(rows, I + i, own, score, norm);
        const V bound = low > 0 ? low / (load(rows.own_norm + I + i) + norm) : V{};  // a NaN is no bound
        const V before = load(least + i);
        store(least + i, (load(own_column + i) != j) & (bound < before) ? bound : before);
      }
    }
  }

  static void reduce_radius(const RadiusRows& rows, int64_t I, int64_t J, const double* gram,
                            const double* scores, RadiusSearch* search) {
    const DecisionRadius& call = rows.call;
    const double error = product_error(call.p);
    const int count = static_cast<int>(call.A - I < kSide ? call.A - I : kSide);
    const int columns = static_cast<int>(call.C - J < kSide ? call.C - J : kSide);
    for (int j = 0; j < columns; j++) {
      const double bias = call.bias[J + j], square = rows.squares[J + j], norm = rows.norms[J + j];
      alignas(64) double least[kSide];
      M open[kVectors], some = {};
      for (int i = 0; i < kSide; i += W) {
        const V own = load(rows.own + I + i), score = load(scores + j * kSide + i) + bias;
        const V lead_error = error_of_lead(rows, I + i, own, score, norm);
        const V both = load(rows.own_square + I + i) + square;
        const V d = both - 2.0 * load(gram + j * kSide + i), d_error = (error + rows.unit) * both;
        const V low = own - score - lead_error, high = own - score + lead_error;
        // Divided first: the square of a lead may underflow.
        const V low_square = magnitude(low) / (low < 0 ? d - d_error : d + d_error) * low;
        const V high_square = magnitude(high) / (high < 0 ? d + d_error : d - d_error) * high;
        // What is NaN, and what underflows or overflows, stays open.
        const M known = (d > 2.0 * d_error) & (d > 0x1p-800) & (d < 0x1p900) &
                        (magnitude(low_square) > 0x1p-900) & (magnitude(low_square) < 0x1p900) &
                        (magnitude(high_square) > 0x1p-900) & (magnitude(high_square) < 0x1p900);
        const V most = load(search->most + i);
        store(least + i, known ? low_square : V{} - __builtin_inf());
        store(search->most + i, known & (high_square < most) ? high_square : most);
        open[i / W] = ~(known & (low_square > most));
        some |= open[i / W];
      }
      if (!any(some)) continue;
      for (int i = 0; i < count; i++) {
        if (open[i / W][i % W] && call.classes[I + i] != J + j)
          search->waiting[search->count++] = {I + i, J + j, least[i]};
      }
    }
  }

  template <int A, int B>
  static const PairBody* body() {
    static const PairBody table = {dot,           products<A, B>, reduce_pairs, settle, reduce_residual,
                                   reduce_radius, reduce_bound,   settle_radius};
    return &table;
  }
};

template <int W>
using Floats [[gnu::vector_size(W * sizeof(float))]] = float;

// Screening in float32, twice as fast as float64. A right block holds its rows one after the other, a left
// block [p][kSide].
template <int W>
struct FloatScreen {
  using V = Floats<W>;
  static constexpr int64_t kSteps = 128;  // no float32 sum is longer before it is added to others

  static int64_t offset(int64_t p, int r) { return r * p * static_cast<int64_t>(sizeof(float)); }

  static Packed pack(const double* row, double scale, int64_t p, char* out) {
    float* numbers = reinterpret_cast<float*>(out);
    double lost[8] = {};  // side by side, to be added as vectors
    for (int64_t j = 0; j < p; j++) {
      const double exact = row[j] * scale;
      numbers[j] = static_cast<float>(exact);
      const double rest = exact - numbers[j];
      lost[j % 8] += rest * rest;
    }
    double total = 0;
    for (const double part : lost) total += part;
    return {std::sqrt(total) * (1 + 0x1p-30), 0};
  }

  static void transpose(const char* const rows[kSide], int64_t p, char* left) {
    float* out = reinterpret_cast<float*>(left);
    constexpr int64_t kPiece = 16;
    for (int64_t k = 0; k < p; k += kPiece) {
      const int64_t end = k + kPiece < p ? k + kPiece : p;
      for (int r = 0; r < kSide; r++) {
        const float* row = reinterpret_cast<const float*>(rows[r]);
        for (int64_t j = k; j < end; j++) out[j * kSide + r] = row[j];
      }
    }
  }

  static double depth(int64_t p) {
    return static_cast<double>((p < kSteps ? p : kSteps) + (p + kSteps - 1) / kSteps);
  }

  // tile[j][i] += over `steps` columns from k, for A vectors of rows from i by B rows from j.
  template <int A, int B>
  static void register_tile(const float* left, const float* right, int64_t p, int i, int j, int64_t k,
                            int64_t steps, float* tile) {
    left += k * kSide + i;
    right += j * p + k;
    tile += j * kSide + i;
    V total[B][A] = {};
    for (int64_t step = 0; step < steps; step++) {
      V u[A];
#pragma GCC unroll 4
      for (int a = 0; a < A; a++) std::memcpy(&u[a], left + step * kSide + a * W, sizeof(V));
#pragma GCC unroll 8
      for (int b = 0; b < B; b++) {
        const float factor = right[b * p + step];
#pragma GCC unroll 4
        for (int a = 0; a < A; a++) total[b][a] += u[a] * factor;
      }
    }
    for (int b = 0; b < B; b++) {
      for (int a = 0; a < A; a++) {
        V sum;
        std::memcpy(&sum, tile + b * kSide + a * W, sizeof sum);
        sum += total[b][a];
        std::memcpy(tile + b * kSide + a * W, &sum, sizeof sum);
      }
    }
  }

  template <int A, int B>
  static void products(const char* left, const char* other, const char* right, int64_t p, float* tile,
                       float* other_tile) {
    static_assert(kSide % (A * W) == 0 && kSide % B == 0);
    std::memset(tile, 0, kSide * kSide * sizeof(float));
    if (other) std::memset(other_tile, 0, kSide * kSide * sizeof(float));
    const auto floats = [](const char* from) { return reinterpret_cast<const float*>(from); };
    for (int64_t k = 0; k < p; k += kSteps) {
      const int64_t steps = p - k < kSteps ? p - k : kSteps;
      for (int i = 0; i < kSide; i += A * W) {
        for (int j = 0; j < kSide; j += B) {
          register_tile<A, B>(floats(left), floats(right), p, i, j, k, steps, tile);
          if (other) register_tile<A, B>(floats(other), floats(right), p, i, j, k, steps, other_tile);
        }
      }
    }
  }

  template <int A, int B>
  static const PairScreen* screen() {
    static const PairScreen table = {offset, pack, transpose, depth, products<A, B>};
    return &table;
  }
};

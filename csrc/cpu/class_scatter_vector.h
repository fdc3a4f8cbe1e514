// The bodies of class_scatter that multiply with vector FMAs, once for every vector width. Included inside
// the anonymous namespace of each instruction set's translation unit, after its target pragma: the code is
// compiled anew there, and no copy of it can be linked into another. Hence no includes but of the same kind.
//
// Panel: columns in pieces of W. One that is packed is [padded / W][stride][W]; rows that wait are one as
// they lie, and as fast. The multiply stage holds a register tile of A vectors (columns i of the scatter) x
// B broadcasts (rows j) over all rows of the panel, or all that wait, and then adds it to the float64
// scatter: no float32 sum is longer than that.

struct BFloat16 {};
struct Float16 {};

template <class Real, int W>
using Vec [[gnu::vector_size(W * sizeof(Real))]] = Real;

template <class To, class From>
To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <int W>
Vec<float, W> widen(const Vec<uint16_t, W>& half, BFloat16) {
  return same_bits<Vec<float, W>>(__builtin_convertvector(half, Vec<uint32_t, W>) << 16);
}

// Where the processor has no instruction for it, or nobody says which. Exponents are moved by 127 - 15; those
// of infinities and NaNs once more. A denormal half is an integer multiple of 2^-24: it gets the exponent of
// 2^-14 and loses the implicit one by a subtraction.
template <int W>
Vec<float, W> widen(const Vec<uint16_t, W>& half, Float16) {
  using Bits = Vec<uint32_t, W>;
  const Bits bits = __builtin_convertvector(half, Bits);
  const Bits sign = (bits & 0x8000) << 16, exponent = bits & 0x7c00;
  Bits magnitude = ((bits & 0x7fff) << 13) + (112u << 23);
  magnitude += Bits(exponent == 0x7c00) & (Bits{} + (112u << 23));
  const Bits denormal = Bits(exponent == 0);
  magnitude += denormal & (Bits{} + (1u << 23));
  const Bits correction = denormal & (Bits{} + (113u << 23));
  const auto value = same_bits<Vec<float, W>>(magnitude) - same_bits<Vec<float, W>>(correction);
  return same_bits<Vec<float, W>>(same_bits<Bits>(value) | sign);
}

// Element type in memory and how to load it.
template <class Feature>
struct Stored {
  using type = Feature;
};
template <>
struct Stored<BFloat16> {
  using type = uint16_t;
};
template <>
struct Stored<Float16> {
  using type = uint16_t;
};

// Loads `count` <= W elements from `column` of a row, zeros after them.
template <class Feature, class Real, int W>
inline Vec<Real, W> load(const char* row, int64_t column, int count) {
  using Element = typename Stored<Feature>::type;
  Vec<Element, W> piece;
  const char* at = row + column * sizeof(Element);
  if (count == W) {
    std::memcpy(&piece, at, sizeof piece);
  } else {
    piece = Vec<Element, W>{};
    std::memcpy(&piece, at, count * sizeof(Element));
  }
  if constexpr (sizeof(Element) == 2) {
    return widen<W>(piece, Feature{});
  } else {
    return piece;
  }
}

template <class Real, int W>
inline void add_to(double* sums, const Vec<Real, W>& values, int count) {
  Vec<double, W> total;
  if (count == W) {
    std::memcpy(&total, sums, sizeof total);
    total += __builtin_convertvector(values, Vec<double, W>);
    std::memcpy(sums, &total, sizeof total);
  } else {
    for (int i = 0; i < count; i++) sums[i] += values[i];
  }
}

template <class Real, int W>
inline Real sum(const Vec<Real, W>& values) {
  if constexpr (W == 2) {
    return values[0] + values[1];
  } else {
    struct Halves {
      Vec<Real, W / 2> low, high;
    };
    const auto halves = same_bits<Halves>(values);  // in registers, where two copies would go through memory
    return sum<Real, W / 2>(halves.low + halves.high);
  }
}

template <class Feature, class Real, int W>
struct VectorBody {
  using V = Vec<Real, W>;
  static_assert(kCacheLine % sizeof(V) == 0);  // or it would reach beyond the rows that wait

  // run(column, count) for the columns of a row, W at a time and then the rest. Inlined twice, so that a
  // whole piece is loaded and added without asking how long it is, from and to registers.
  template <class Run>
  static void for_pieces(int64_t p, const Run& run) {
    int64_t j = 0;
    for (; j + W <= p; j += W) run(j, W);
    if (j < p) run(j, static_cast<int>(p - j));
  }

  static constexpr int64_t kSize = sizeof(typename Stored<Feature>::type);

  // run(column, count, count of the next W) for the columns of a row, 2 W at a time and then the rest. The
  // squares of a pair are added to each other before they are added to those of the row, so that fewer
  // additions wait for each other.
  template <class Run>
  static void for_pairs(int64_t p, const Run& run) {
    int64_t j = 0;
    for (; j + 2 * W <= p; j += 2 * W) run(j, W, W);
    const int rest = static_cast<int>(p - j);
    if (rest > 0) run(j, rest < W ? rest : W, rest < W ? 0 : rest - W);
  }

  // Asks for 2 W columns. Into the second level: as many lines into the first wait for each other longer.
  static void ask(const char* at) {
    __builtin_prefetch(at, 0, 2);
    if (W * kSize >= kCacheLine) __builtin_prefetch(at + W * kSize, 0, 2);
  }

  // Adds columns [j, j + count) of R rows of one class to its sums, and their squares to `squares`.
  template <int R>
  [[gnu::always_inline]] static void add_columns(const char* const* row, const char* shift, char* sums,
                                                 int64_t j, int count, V* squares) {
    const V k = load<Real, Real, W>(shift, j, count);
    V total = load<Real, Real, W>(sums, j, count);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const V d = load<Feature, Real, W>(row[r], j, count) - k;
      total += d;
      squares[r] += d * d;
    }
    std::memcpy(sums + j * sizeof(Real), &total, count == W ? sizeof total : count * sizeof(Real));
  }

  // R rows of one class at a time, so that the class's shift and sums are loaded once for all of them. The
  // bits do not depend on R.
  template <int R>
  static void add_side_by_side(const char* const* features, const char* const* next, const char* shift,
                               char* sums, int64_t p, Real* squares) {
    const char *row[R], *later[R];
    for (int r = 0; r < R; r++) {
      row[r] = features[r];
      later[r] = next[r];
    }
    V square[R] = {};
    for_pairs(p, [&](int64_t j, int count, int second) [[gnu::always_inline]] {
      V pair[R] = {};
      add_columns<R>(row, shift, sums, j, count, pair);
      if (second > 0) add_columns<R>(row, shift, sums, j + W, second, pair);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        ask(later[r] + j * kSize);
        square[r] += pair[r];
      }
    });
    for (int r = 0; r < R; r++) squares[r] = sum<Real, W>(square[r]);
  }

  static void add_rows(const char* const* features, const char* const* next, int count, const char* shift,
                       void* sums, int64_t p, void* squares) {
    char* to = static_cast<char*>(sums);
    Real* out = static_cast<Real*>(squares);
    int i = 0;
    for (; i + 8 <= count; i += 8) add_side_by_side<8>(features + i, next + i, shift, to, p, out + i);
    for (; i + 4 <= count; i += 4) add_side_by_side<4>(features + i, next + i, shift, to, p, out + i);
    for (; i < count; i++) add_side_by_side<1>(features + i, next + i, shift, to, p, out + i);
  }

  static void add_window(const Window& window, void* squares) {
    constexpr int kColumns = 2 * kCacheLine / sizeof(Real);
    static_assert(kColumns % (2 * W) == 0);
    V square[Window::kMost];
    for (int i = 0; i < window.count; i++) square[i] = V{};
    int64_t j = 0;
    for (; j + kColumns <= window.p; j += kColumns) {
      add_slice(window, j, square, [](const auto& run) [[gnu::always_inline]] {
#pragma GCC unroll 4
        for (int k = 0; k < kColumns; k += 2 * W) run(k, W, W);
      });
    }
    if (j < window.p) {
      const auto rest = [p = window.p - j](const auto& run) [[gnu::always_inline]] { for_pairs(p, run); };
      add_slice(window, j, square, rest);
    }
    for (int i = 0; i < window.count; i++) static_cast<Real*>(squares)[i] = sum<Real, W>(square[i]);
  }

  // The columns of a window from `first` on; go_through(run) does what for_pairs does, counting from there.
  template <class GoThrough>
  [[gnu::always_inline]] static void add_slice(const Window& window, int64_t first, V* square,
                                               const GoThrough& go_through) {
    const char* features = window.features + first * kSize;
    const char* shift = window.shift + first * sizeof(Real);
    char* sums = window.sums + first * sizeof(Real);
    double* totals = window.totals + first;
    // Copies, as what is stored through a char* might change a Window.
    const int64_t row_bytes = window.row_bytes, ahead = window.ahead, stride = window.stride;
    const Window::Row* rows = window.rows;
    for (int i = 0, count = window.count; i < count; i++) {
      const int64_t label = rows[i].label;
      const bool move = rows[i].move;
      const char *row = features + rows[i].place * row_bytes, *k = shift + label * stride;
      char* to = sums + label * stride;
      V total = square[i];
      go_through([&](int64_t j, int n, int second) [[gnu::always_inline]] {
        V pair = {};
        ask(row + ahead + j * kSize);
        if (__builtin_expect(move, false))
          move_row(to + j * sizeof(Real), totals + label * window.p + j, n + second);
        add_columns<1>(&row, k, to, j, n, &pair);
        if (second > 0) add_columns<1>(&row, k, to, j + W, second, &pair);
        total += pair;
      });
      square[i] = total;
    }
  }

  [[gnu::noinline]] static void move_row(void* sums, double* totals, int64_t p) {
    char* from = static_cast<char*>(sums);
    for_pieces(p, [&](int64_t j, int count) [[gnu::always_inline]] {
      add_to<Real, W>(totals + j, load<Real, Real, W>(from, j, count), count);
      std::memset(from + j * sizeof(Real), 0, count * sizeof(Real));
    });
  }

  static double take_row(const char* row, const char* shift, int64_t p, char* residuals) {
    V squares[2] = {};
    const auto take = [&](int64_t j, int count, V& square) [[gnu::always_inline]] {
      const V d = load<Feature, Real, W>(row, j, count) - load<Real, Real, W>(shift, j, count);
      square += d * d;
      if (residuals) std::memcpy(residuals + j * sizeof(Real), &d, sizeof d);
    };
    for_pairs(p, [&](int64_t j, int count, int second) [[gnu::always_inline]] {
      take(j, count, squares[0]);
      if (second > 0) take(j + W, second, squares[1]);
    });
    return sum<Real, W>(squares[0] + squares[1]);
  }

  static void pack(const Group& group, int64_t row, const Panel& panel, double* column_squares,
                   void* squares) {
    Real* to = reinterpret_cast<Real*>(panel.data) + row * panel.step;
    const int64_t piece = panel.piece, step = panel.step;
    add_group(group, panel.p, column_squares, squares,
              [&](int i, int64_t j, int count) [[gnu::always_inline]] {
                __builtin_prefetch(group.next[i] + j * kSize, 0, 2);
                const V d = load<Feature, Real, W>(group.features[i], j, count) -
                            load<Real, Real, W>(group.shift[i], j, count);
                std::memcpy(to + j / W * piece + i * step, &d, sizeof d);
                return d;
              });
  }

  static void add_residuals(const Group& group, int64_t p, double* column_squares, void* squares) {
    add_group(group, p, column_squares, squares, [&](int i, int64_t j, int count) [[gnu::always_inline]] {
      __builtin_prefetch(group.next[i] + j * sizeof(Real));
      return load<Real, Real, W>(group.features[i], j, count);
    });
  }

  // Sums and squares of a group; residual(i, j, count) are those of its row i from column j on.
  template <class Residual>
  [[gnu::always_inline]] static void add_group(const Group& group, int64_t p, double* column_squares,
                                               void* squares, const Residual& residual) {
    const int rows = group.rows;
    V square[kGroup] = {};
    for_pieces(p, [&](int64_t j, int count) [[gnu::always_inline]] {
      V total = {}, columns = {};
      for (int i = 0; i < rows; i++) {
        const V d = residual(i, j, count);
        const V dd = d * d;
        columns += dd;
        square[i] += dd;
        total += d;
        if (group.last[i]) {
          add_to<Real, W>(group.sums[i] + j, total, count);
          total = V{};
        }
      }
      add_to<Real, W>(column_squares + j, columns, count);
    });
    for (int i = 0; i < rows; i++) static_cast<Real*>(squares)[i] = sum<Real, W>(square[i]);
  }

  static constexpr int kAhead = 32;  // rows

  // scatter[j + b][i + a] += over the rows of the panel, for A vectors from column i and B columns from j.
  template <int A, int B>
  static void register_tile(const Panel& panel, int64_t i, int64_t j, double* scatter) {
    const Real* data = reinterpret_cast<const Real*>(panel.data);
    const Real* left[A];
    for (int a = 0; a < A; a++) left[a] = data + (i / W + a) * panel.piece;
    const Real* right = data + j / W * panel.piece + j % W;
    const int64_t step = panel.step;
    // What the sums are added to comes from afar and is asked for while they are made.
    for (int64_t b = j; b < j + B && b < panel.p; b++) {
      for (int64_t a = i; a < i + A * W && a < panel.p; a += 8)
        __builtin_prefetch(scatter + b * panel.p + a, 1, 2);
    }
    V total[B][A] = {};
    for (int64_t row = 0; row < panel.rows; row++) {
      V column[A];
#pragma GCC unroll 4
      for (int a = 0; a < A; a++) std::memcpy(&column[a], left[a] + row * step, sizeof(V));
      // A line of each: they may be too far apart for the processor to ask for them.
      if constexpr (sizeof(V) == kCacheLine) {
        for (int a = 0; a < A; a++) __builtin_prefetch(left[a] + (row + kAhead) * step);
        __builtin_prefetch(right + (row + kAhead) * step);
      }
#pragma GCC unroll 16
      for (int b = 0; b < B; b++) {
        const Real factor = right[row * step + b];  // broadcast by the multiplication
#pragma GCC unroll 4
        for (int a = 0; a < A; a++) total[b][a] += column[a] * factor;
      }
    }
    for (int b = 0; b < B && j + b < panel.p; b++) {
      for (int a = 0; a < A; a++) {
        const int64_t column = i + a * W;
        const int count = static_cast<int>(panel.p - column < W ? panel.p - column : W);
        if (count > 0) add_to<Real, W>(scatter + (j + b) * panel.p + column, total[b][a], count);
      }
    }
  }

  // Rows j .. j + B of the scatter from the vector on that holds their diagonal.
  template <int A, int B>
  static void multiply(const Panel& panel, int64_t I, int64_t J, bool, double* scatter, char*) {
    static_assert(W % B == 0);
    const int64_t rows_end = end_of_tile(panel, I), columns_end = end_of_tile(panel, J);
    for (int64_t j = I; j < rows_end && j < panel.p; j += B) {
      int64_t i = I == J ? j / W * W : J;
      for (; i + A * W <= columns_end; i += A * W) register_tile<A, B>(panel, i, j, scatter);
      if constexpr (A > 2) {
        if (i + 2 * W <= columns_end) register_tile<2, B>(panel, i, j, scatter), i += 2 * W;
      }
      if (i < columns_end) register_tile<1, B>(panel, i, j, scatter);
    }
  }

  static size_t element(Precision) { return sizeof(Real); }

  template <int Tile>
  static int64_t tile(int64_t) {
    return Tile;
  }

  template <int A, int B, int Tile>
  static const ScatterBody* body(int64_t panel_rows) {
    static const ScatterBody table = {
        W,
        panel_rows,
        panel_rows / 4,  // least_rows
        0,               // scratch
        element,
        tile<Tile>,
        A * W,  // least_tile
        0,      // fused_columns
        0,      // fused_rows
        add_rows,
        add_window,
        move_row,
        take_row,
        pack,
        add_residuals,
        multiply<A, B>,
    };
    return &table;
  }
};

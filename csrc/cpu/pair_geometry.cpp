#include "cpu/pair_geometry.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

#include "cpu/memory.h"
#include "cpu/pool.h"

namespace ncfast {
namespace {

constexpr int64_t kTasksPerPoll = 32;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

const PairBody& body_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return *pair_body_avx2();
    case Isa::avx512:
    case Isa::avx512_bf16:
    case Isa::amx:  // tiles have no float64
      return *pair_body_avx512();
#endif
    default:
      return *pair_body_portable();
  }
}

// The levels below float64, the fastest first; at least one, and null where there are no more.
const PairScreen* screen_of(Isa isa, int level) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return level ? nullptr : pair_screen_avx2();
    case Isa::avx512:
      return level ? nullptr : pair_screen_avx512();
    case Isa::avx512_bf16:
      return level ? pair_screen_avx512() : pair_screen_avx512_bf16();
    case Isa::amx:
      return pair_screen_amx(level);
#endif
    default:
      return level ? nullptr : pair_screen_portable();
  }
}

// tasks(i, slot) for i in [0, count), polling in between.
void run_tasks(int threads, int64_t count, const std::function<void()>& poll,
               const std::function<void(int64_t, int)>& task) {
  for (int64_t first = 0; first < count; first += kTasksPerPoll) {
    parallel_for(threads, std::min(kTasksPerPoll, count - first),
                 [&](int64_t i, int slot) { task(first + i, slot); });
    poll();
  }
}

// Rows, gathered by `chosen` if that is given, in panels.
class Panels {
 public:
  Panels(const double* vectors, int64_t rows, int64_t p, int threads, const int64_t* chosen = nullptr)
      : p_(p), data_(allocate<double>(round_up(rows, kSide) * p)) {
    parallel_for(threads, round_up(rows, kSide) / kPanelRows, [&](int64_t panel, int) {
      double* out = data_.get() + panel * kPanelRows * p;
      const double* from[kPanelRows];
      for (int r = 0; r < kPanelRows; r++) {
        const int64_t row = panel * kPanelRows + r;
        from[r] = row < rows ? vectors + (chosen ? chosen[row] : row) * p : nullptr;
      }
      for (int64_t k = 0; k < p; k++) {
        for (int r = 0; r < kPanelRows; r++) out[k * kPanelRows + r] = from[r] ? from[r][k] : 0;
      }
    });
  }

  const double* from(int64_t row) const { return data_.get() + row * p_; }

 private:
  const int64_t p_;
  const Memory<double> data_;
};

// |row|^2, padded with zeros.
std::vector<double> squares_of(const PairBody& body, const double* vectors, int64_t rows, int64_t p,
                               int threads) {
  std::vector<double> squares(round_up(rows, kSide));
  parallel_for(threads, (rows + kSide - 1) / kSide, [&](int64_t block, int) {
    for (int64_t r = block * kSide; r < std::min(rows, (block + 1) * kSide); r++)
      squares[r] = body.dot(vectors + r * p, vectors + r * p, p);
  });
  return squares;
}

std::vector<double> roots_of(const std::vector<double>& squares) {
  std::vector<double> roots(squares.size());
  std::transform(squares.begin(), squares.end(), roots.begin(),
                 [](double square) { return std::sqrt(square); });
  return roots;
}

// The number of threads worth waking for so many multiplications.
int threads_for(int threads, double work) { return work < 1 << 18 ? 1 : threads; }

// How many blocks of rows meet a tile of others while it is in the cache: many rows come from memory, once
// per task, and few have to do for all threads.
int64_t blocks_per_task(int64_t blocks, int64_t p) {
  constexpr int64_t kBlockBytes = 1 << 20;
  if (blocks < 128) return 1;
  return std::clamp<int64_t>(kBlockBytes / (kSide * p * static_cast<int64_t>(sizeof(double))), 1, 4);
}

// With the ideal E of norm 1, G = s E + R, s = <G, E>: |G / |G| - E|^2 = (s / |G| - 1)^2 + (|R| / |G|)^2 and
// |G|^2 = s^2 + |R|^2, where |G| - s = |R|^2 / (|G| + s) does not cancel. <G, E> needs the trace of G and the
// sum of its entries, which the columns of the rows give, so one sweep for R is enough.
struct Projection {
  Residual ideal;
  double along;  // s

  double error(double across) const {  // from |R|^2
    const double norm = std::hypot(along, std::sqrt(across));
    const double shortfall = along < 0 ? norm - along : across / (norm + along);
    return std::hypot(shortfall, std::sqrt(across)) / norm;
  }
};

Projection project(const EtfError& call, const PairBody& body, int threads) {
  const int64_t C = call.C, p = call.p;
  constexpr int64_t kColumns = 64;
  std::vector<double> total((p + kColumns - 1) / kColumns);  // of the Gram matrix: of products of column sums
  parallel_for(threads, static_cast<int64_t>(total.size()), [&](int64_t task, int) {
    const int64_t first = task * kColumns, count = std::min(kColumns, p - first);
    const auto add_columns = [&](const double* rows, double* sums) {
      for (int64_t c = 0; c < C; c++) {
        for (int64_t k = 0; k < count; k++) sums[k] += rows[c * p + first + k];
      }
    };
    double left[kColumns] = {}, right[kColumns] = {};
    add_columns(call.left, left);
    if (call.right != call.left) add_columns(call.right, right);
    for (int64_t k = 0; k < count; k++) total[task] += left[k] * (call.right != call.left ? right : left)[k];
  });
  const auto largest = [](const std::vector<double>& squares) {
    return std::sqrt(*std::max_element(squares.begin(), squares.end()));
  };
  std::vector<double> trace = squares_of(body, call.left, C, p, threads);
  double scale = 1 / largest(trace);  // no scale matters, and squares might overflow
  if (call.right == call.left) {
    scale *= scale;
  } else {
    scale /= largest(squares_of(body, call.right, C, p, threads));
    for (int64_t c = 0; c < C; c++) trace[c] = body.dot(call.left + c * p, call.right + c * p, p);
  }
  const double root = std::sqrt(static_cast<double>(C - 1));
  const double sum = std::accumulate(total.begin(), total.end(), 0.0);
  const double along = (std::accumulate(trace.begin(), trace.end(), 0.0) - sum / C) * scale / root;
  const double off_diagonal = -along / (C * root);
  return {{call, scale, -off_diagonal * (C - 1), off_diagonal}, along};
}

}  // namespace

// Chan's formula.
void merge(PairSums* sums, const PairSums& other) {
  const double pairs = sums->pairs + other.pairs;
  if (sums->pairs > 0) {
    const double share = sums->pairs * other.pairs / pairs;
    const double deviation = other.deviation / other.pairs - sums->deviation / sums->pairs;
    const double kernel = other.kernel / other.pairs - sums->kernel / sums->pairs;
    sums->deviation_squares += deviation * deviation * share;
    sums->kernel_squares += kernel * kernel * share;
  }
  sums->pairs = pairs;
  sums->deviation += other.deviation;
  sums->deviation_squares += other.deviation_squares;
  sums->absolute += other.absolute;
  sums->kernel += other.kernel;
  sums->kernel_squares += other.kernel_squares;
  sums->low = std::min(sums->low, other.low);
  sums->high = std::max(sums->high, other.high);
  sums->cdnv += other.cdnv;
}

void pair_geometry(const PairGeometry& call, Isa isa, int threads, const std::function<void()>& poll) {
  const PairBody& body = body_of(isa);
  const int64_t C = call.C, p = call.p, blocks = (C + kSide - 1) / kSide;
  threads = threads_for(threads, 0.5 * C * C * p);
  const Panels panels(call.vectors, C, p, threads);
  const std::vector<double> squares = squares_of(body, call.vectors, C, p, threads);
  const std::vector<double> norms = roots_of(squares);
  std::vector<double> inverse(squares.size()), variances(squares.size());
  for (int64_t c = 0; c < C; c++) {
    inverse[c] = squares[c] > 0 && std::isfinite(squares[c]) ? 1 / norms[c] : kNan;
    if (call.variances) variances[c] = call.variances[c];
  }
  const PairRows rows = {C, p, call.vectors, squares.data(), norms.data(), inverse.data(), variances.data()};
  const int64_t room = std::max<int64_t>(4 * kSide * kSide, 8 * C / threads);
  std::vector<Nearest> nearest(threads * C, {kInfinity, std::numeric_limits<int64_t>::max()});
  std::vector<double> most(threads * C, kInfinity);
  const Memory<Candidate> waiting = allocate<Candidate>(threads * room);
  std::vector<Search> search(threads);
  for (int slot = 0; slot < threads; slot++) {
    search[slot] = {&nearest[slot * C], &most[slot * C], waiting.get() + slot * room, 0, room};
  }
  const Projection projection = project({C, p, call.vectors, call.vectors}, body, threads);
  std::vector<PairSums> sums(blocks);
  std::vector<double> residuals(blocks);
  const Memory<double> tiles = allocate<double>(int64_t{threads} * kSide * kSide);
  const int64_t group = blocks_per_task(blocks, p);
  run_tasks(threads, (blocks + group - 1) / group, poll, [&](int64_t task, int slot) {
    double* tile = tiles.get() + slot * kSide * kSide;
    const int64_t first = task * group, end = std::min(blocks, first + group);
    for (int64_t J = first * kSide; J < C; J += kSide) {
      for (int64_t block = first; block < end && block * kSide <= J; block++) {
        const int64_t I = block * kSide;
        body.products(panels.from(I), panels.from(J), p, tile);
        residuals[block] += body.reduce_residual(projection.ideal, I, J, tile);
        body.reduce_pairs(rows, I, J, tile, &search[slot], &sums[block]);
      }
    }
  });
  for (int slot = 1; slot < threads; slot++) {  // each thread learns what the others found
    for (int64_t c = 0; c < C; c++) most[c] = std::min(most[c], most[slot * C + c]);
  }
  for (int slot = 1; slot < threads; slot++) std::copy_n(most.begin(), C, search[slot].most);
  parallel_for(threads, threads, [&](int64_t slot, int) { body.settle(rows, &search[slot]); });
  PairSums all;
  for (const PairSums& own : sums) {
    if (own.pairs > 0) merge(&all, own);
  }
  for (int64_t c = 0; c < C; c++) {
    Nearest best = nearest[c];
    for (int slot = 1; slot < threads; slot++) {
      const Nearest& other = nearest[slot * C + c];
      if (other.square < best.square || (other.square == best.square && other.index < best.index))
        best = other;
    }
    const bool found = best.index < C;
    call.nearest_distance[c] = found ? std::sqrt(best.square) : kNan;
    call.nearest_index[c] = found ? best.index : 0;
  }
  const double deviation = all.deviation / all.pairs, simplex = 1.0 / static_cast<double>(C - 1);
  const bool directed = !std::isnan(deviation);
  *call.statistics = {deviation - simplex,
                      std::sqrt(all.deviation_squares / all.pairs),
                      directed ? std::max(all.low, -1.0) : kNan,  // not by rounding beyond a cosine
                      directed ? std::min(all.high, 1.0) : kNan,
                      all.absolute / all.pairs,
                      all.kernel / all.pairs,
                      std::sqrt(all.kernel_squares / all.pairs),
                      projection.error(std::accumulate(residuals.begin(), residuals.end(), 0.0)),
                      all.cdnv / all.pairs};
}

double etf_error(const EtfError& call, Isa isa, int threads, const std::function<void()>& poll) {
  const PairBody& body = body_of(isa);
  const int64_t C = call.C, p = call.p, blocks = (C + kSide - 1) / kSide;
  const bool symmetric = call.left == call.right;
  threads = threads_for(threads, (symmetric ? 0.5 : 1.0) * C * C * p);
  const Projection projection = project(call, body, threads);
  const Panels left(call.left, C, p, threads);
  const std::unique_ptr<Panels> other =
      symmetric ? nullptr : std::make_unique<Panels>(call.right, C, p, threads);
  const Panels& right = symmetric ? left : *other;
  std::vector<double> sums(blocks);
  const Memory<double> tiles = allocate<double>(int64_t{threads} * kSide * kSide);
  run_tasks(threads, blocks, poll, [&](int64_t block, int slot) {
    double* tile = tiles.get() + slot * kSide * kSide;
    const int64_t I = block * kSide;
    for (int64_t J = symmetric ? I : 0; J < C; J += kSide) {
      body.products(left.from(I), right.from(J), p, tile);
      sums[block] += body.reduce_residual(projection.ideal, I, J, tile);
    }
  });
  const double across = std::accumulate(sums.begin(), sums.end(), 0.0);
  return projection.error(across);
}

namespace {

// Blocks of rows scaled to norm 1, for a PairScreen.
class ScreenBlocks {
 public:
  // Right blocks.
  ScreenBlocks(const PairScreen& screen, const double* vectors, const double* norms, int64_t rows, int64_t p,
               int threads)
      : ScreenBlocks(screen, rows, p) {
    std::vector<Packed> packed(rows);
    parallel_for(threads, blocks_, [&](int64_t block, int) {
      for (int64_t r = block * kSide; r < (block + 1) * kSide; r++) {
        const Packed row =
            screen.pack(vectors + (r < rows ? r : 0) * p, r < rows ? 1 / norms[r] : 0, p, at(r));
        if (r < rows) packed[r] = row;
      }
    });
    for (const Packed& row : packed) {  // a NaN is passed over: the products of that row are NaN, too
      most_.lost = std::max(most_.lost, row.lost);
      most_.low = std::max(most_.low, row.low);
    }
  }

  // Left blocks of the rows in right ones, or of those `chosen`.
  ScreenBlocks(const ScreenBlocks& right, const int64_t* chosen, int64_t rows, int threads)
      : ScreenBlocks(right.screen_, rows, right.p_) {
    most_ = right.most_;
    parallel_for(threads, blocks_, [&](int64_t block, int) {
      const char* row[kSide];
      for (int r = 0; r < kSide; r++) {
        const int64_t own = std::min(block * kSide + r, rows - 1);
        row[r] = right.at(chosen ? chosen[own] : own);
      }
      screen_.transpose(row, p_, at(block * kSide));
    });
  }

  char* at(int64_t row) const { return data_.get() + row / kSide * block_ + screen_.offset(p_, row % kSide); }

  // Bounds the error of a product with a row of `right`, both of norm 1: <u, v> - <u^, v^> = <u - u^, v> +
  // <u^, v - v^>, what level 1 leaves out of <u^, v^>, and its rounding.
  double unit(const ScreenBlocks& right) const {
    const Packed &u = most_, &v = right.most_;
    const double rounding = screen_.depth(p_) * 0x1p-24;
    return u.lost + (1 + u.lost) * (v.lost + (1 + v.lost) * rounding) + u.low * v.low + 0x1p-40;
  }

 private:
  ScreenBlocks(const PairScreen& screen, int64_t rows, int64_t p)
      : screen_(screen),
        p_(p),
        blocks_((rows + kSide - 1) / kSide),
        block_(screen.offset(p, kSide)),
        data_(allocate<char>(blocks_ * block_)) {}

  const PairScreen& screen_;
  const int64_t p_, blocks_;
  const int64_t block_;
  const Memory<char> data_;
  Packed most_ = {0, 0};
};

// The numbers of rows and anchors behind a RadiusRows.
class RadiusNumbers {
 public:
  RadiusNumbers(const DecisionRadius& call, const PairBody& body, bool centres, int threads)
      : call_(call),
        squares_(squares_of(body, call.weight, call.C, call.p, threads)),
        norms_(norms_of(squares_)),
        anchor_norms_(centres ? norms_ : norms_of(squares_of(body, call.anchors, call.A, call.p, threads))),
        own_(anchor_norms_.size()),
        own_square_(own_),
        own_norm_(own_),
        own_norms_(own_) {
    parallel_for(threads, call.A, [&](int64_t i, int) {
      const int64_t a = call.classes[i], p = call.p;
      own_[i] = body.dot(call.weight + a * p, call.anchors + i * p, p) + call.bias[a];
      own_square_[i] = squares_[a];
      own_norm_[i] = norms_[a];
      own_norms_[i] = norms_[a] * anchor_norms_[i];
    });
  }

  // But for `unit`.
  RadiusRows rows() const {
    return {call_,
            squares_.data(),
            norms_.data(),
            own_.data(),
            own_square_.data(),
            own_norm_.data(),
            anchor_norms_.data(),
            own_norms_.data(),
            0};
  }

 private:
  static std::vector<double> norms_of(std::vector<double> squares) {
    constexpr double kTiny = 0x1p-900;  // squares that may have underflowed
    for (double& square : squares) square = std::sqrt(std::max(square, kTiny));
    return squares;
  }

  const DecisionRadius call_;
  const std::vector<double> squares_, norms_, anchor_norms_;
  std::vector<double> own_, own_square_, own_norm_, own_norms_;
};

// Products of rows from those of the same rows scaled to norm 1.
void unscale(const float* cosines, const double* left_norms, const double* right_norms, double* tile) {
  for (int j = 0; j < kSide; j++) {
    for (int i = 0; i < kSide; i++)
      tile[j * kSide + i] = cosines[j * kSide + i] * (left_norms[i] * right_norms[j]);
  }
}

// Who may wait per task: more are settled at once, or, where there is a more precise way, left to that.
constexpr int64_t kRadiusRoom = 4 * kSide * kSide;
constexpr int64_t kPatience = 16 * kSide;

// Tiles of `gram` and `scores` as PairBody::reduce_radius wants them. May leave them the same address.
using RadiusTiles = std::function<void(int64_t I, int64_t J, double* gram, double* scores)>;

}  // namespace

void decision_radius(const DecisionRadius& call, Isa isa, int threads, const std::function<void()>& poll) {
  const PairBody& body = body_of(isa);
  const int64_t C = call.C, p = call.p, A = call.A, blocks = (A + kSide - 1) / kSide;
  bool centres =
      call.anchors == call.weight && A == C;  // the nearest-class-centre rule about its own centres
  for (int64_t i = 0; i < A && centres; i++) centres = call.classes[i] == i;
  threads = threads_for(threads, (centres ? 1.0 : 2.0) * A * C * p);
  const RadiusNumbers numbers(call, body, centres, threads);
  RadiusRows rows = numbers.rows();
  const Memory<Candidate> waiting = allocate<Candidate>(threads * kRadiusRoom);
  const Memory<double> tiles = allocate<double>(int64_t{threads} * 2 * kSide * kSide);
  // Decides the blocks in `todo`; if `impatient` hands those back of which too many walls would be
  // evaluated.
  const auto sweep = [&](const std::vector<int64_t>& todo, bool impatient, const RadiusTiles& tiles_of) {
    std::vector<char> left(blocks);
    run_tasks(threads, static_cast<int64_t>(todo.size()), poll, [&](int64_t task, int slot) {
      double *gram = tiles.get() + slot * 2 * kSide * kSide, *scores = gram + kSide * kSide;
      const int64_t block = todo[task], I = block * kSide;
      RadiusSearch search = {{}, waiting.get() + slot * kRadiusRoom, 0, kRadiusRoom};
      std::fill_n(search.most, kSide, kInfinity);
      std::fill_n(call.radii + I, std::min<int64_t>(kSide, A - I), kInfinity);
      for (int64_t J = 0; J < C; J += kSide) {
        if (search.count + kSide * kSide > search.room) {
          if ((left[block] = impatient)) return;
          body.settle_radius(rows, &search);
        }
        tiles_of(I, J, gram, scores);
        body.reduce_radius(rows, I, J, gram, centres ? gram : scores, &search);
      }
      Candidate* end = std::remove_if(search.waiting, search.waiting + search.count, [&](const auto& wall) {
        return wall.least > search.most[wall.i % kSide];
      });
      search.count = end - search.waiting;
      if ((left[block] = impatient && search.count > kPatience)) return;
      // Each anchor's likely nearest first: what it leaves of the others need not be evaluated.
      std::sort(search.waiting, end, [](const Candidate& one, const Candidate& other) {
        return std::tie(one.i, one.least) < std::tie(other.i, other.least);
      });
      body.settle_radius(rows, &search);
    });
    std::vector<int64_t> rest;
    for (const int64_t block : todo) {
      if (left[block]) rest.push_back(block);
    }
    return rest;
  };
  std::vector<int64_t> todo(blocks);
  std::iota(todo.begin(), todo.end(), 0);
  for (int level = 0; level < kScreenLevels && !todo.empty(); level++) {
    const PairScreen* screen = screen_of(isa, level);
    if (!screen) break;
    const ScreenBlocks weight(*screen, call.weight, rows.norms, C, p, threads);
    const ScreenBlocks own_weight(weight, call.classes, A, threads);
    std::unique_ptr<ScreenBlocks> anchors;
    if (!centres) {
      const ScreenBlocks right(*screen, call.anchors, rows.anchor_norm, A, p, threads);
      anchors = std::make_unique<ScreenBlocks>(right, nullptr, A, threads);
    }
    rows.unit = own_weight.unit(weight);
    if (anchors) rows.unit = std::max(rows.unit, anchors->unit(weight));
    todo = sweep(todo, true, [&](int64_t I, int64_t J, double* gram, double* scores) {
      alignas(64) float cosines[2][kSide * kSide];
      screen->products(own_weight.at(I), anchors ? anchors->at(I) : nullptr, weight.at(J), p, cosines[0],
                       cosines[1]);
      unscale(cosines[0], rows.own_norm + I, rows.norms + J, gram);
      if (anchors) unscale(cosines[1], rows.anchor_norm + I, rows.norms + J, scores);
    });
  }
  if (todo.empty()) return;
  rows.unit = product_error(p);
  const Panels weight(call.weight, C, p, threads);
  const auto gathered = [&](const double* vectors, const int64_t* chosen) {
    return centres ? nullptr : std::make_unique<Panels>(vectors, A, p, threads, chosen);
  };
  const std::unique_ptr<Panels> own_weight = gathered(call.weight, call.classes);
  const std::unique_ptr<Panels> anchors = gathered(call.anchors, nullptr);
  sweep(todo, false, [&](int64_t I, int64_t J, double* gram, double* scores) {
    body.products((centres ? weight : *own_weight).from(I), weight.from(J), p, gram);
    if (!centres) body.products(anchors->from(I), weight.from(J), p, scores);
  });
}

void decision_bound(const DecisionRadius& call, Isa isa, int threads, const std::function<void()>& poll) {
  const PairBody& body = body_of(isa);
  const int64_t C = call.C, p = call.p, A = call.A, blocks = (A + kSide - 1) / kSide;
  threads = threads_for(threads, 1.0 * A * C * p);
  const RadiusNumbers numbers(call, body, false, threads);
  RadiusRows rows = numbers.rows();
  const double down = 1 - 2 * product_error(p);  // the rounding of the norms
  const PairScreen& screen = *screen_of(isa, 0);
  const ScreenBlocks weight(screen, call.weight, rows.norms, C, p, threads);
  const ScreenBlocks right(screen, call.anchors, rows.anchor_norm, A, p, threads);
  const ScreenBlocks anchors(right, nullptr, A, threads);
  rows.unit = anchors.unit(weight);
  run_tasks(threads, blocks, poll, [&](int64_t block, int) {
    alignas(64) float cosines[kSide * kSide];
    alignas(64) double scores[kSide * kSide], least[kSide];
    const int64_t I = block * kSide;
    std::fill_n(least, kSide, kInfinity);
    for (int64_t J = 0; J < C; J += kSide) {
      screen.products(anchors.at(I), nullptr, weight.at(J), p, cosines, nullptr);
      unscale(cosines, rows.anchor_norm + I, rows.norms + J, scores);
      body.reduce_bound(rows, I, J, scores, least);
    }
    for (int64_t i = 0; i < kSide && I + i < A; i++) {
      call.radii[I + i] = least[i] > 0 ? least[i] * down : -kInfinity;
    }
  });
}

}  // namespace ncfast

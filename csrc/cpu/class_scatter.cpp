#include "cpu/class_scatter.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/class_rows.h"
#include "cpu/memory.h"
#include "cpu/pool.h"

namespace ncfast {
namespace {

constexpr int64_t kSharedStrip = 64;      // rows, where threads share a panel
constexpr int64_t kLeastStrips = 8;       // where each thread has a panel: with fewer, some would have none
constexpr int64_t kMostStrips = 64;       // of a block, then
constexpr int64_t kMostPanel = 24 << 20;  // bytes

// What the strips of a block cannot add to the results themselves. A strip adds to the sums of the classes
// that begin in it; rows of a class that began in an earlier strip of the block are carried, and added when
// all strips are done.
struct Carry {
  std::vector<double> sums;            // [strips, p]
  std::vector<double> column_squares;  // [strips, p]
  std::vector<double> sumsq;           // [strips]

  Carry(int64_t strips, int64_t p) : sums(strips * p), column_squares(strips * p), sumsq(strips) {}
};

// Whether rows that wait are multiplied as they lie. Long ones are packed: the processor sees no pattern in
// columns so far apart, and asking for them all by software takes longer than packing.
bool are_panel(const ScatterBody& body, int64_t row_bytes) {
  constexpr int64_t kLongest = 9 << 10;
  return body.add_residuals && row_bytes <= kLongest;
}

template <class Real>
class Pass {
 public:
  Pass(const ClassScatter& call, const ScatterBody& body, int threads, const std::function<void()>& poll)
      : call_(call),
        body_(body),
        threads_(threads),
        poll_(poll),
        order_(call, std::min(call.N, kChunk), threads),
        as_they_lie_(!call.shift && are_panel(body, call.row_bytes)),
        no_shift_(call.shift || as_they_lie_ ? 0 : call.p) {}

  Refusal run() {
    if (!order_.sort(call_, 0, std::min(kChunk, call_.N))) return Refusal::label;
    const int64_t N = call_.N > kChunk ? call_.N : order_.used();
    const int64_t p = call_.p, padded = round_up(p, body_.pad);
    const bool shared = as_they_lie_ || N < kLeastStrips * body_.least_rows;
    const bool fused = !shared && padded <= body_.fused_columns;
    const int64_t most = round_up(std::min(N, kChunk), kGroup);
    const int64_t row_bytes = body_.element(call_.precision) * padded;
    const int64_t panel_rows = std::min({body_.panel_rows, shared ? most : round_up(N / kLeastStrips, kGroup),
                                         std::max<int64_t>(kMostPanel / row_bytes / kGroup, 1) * kGroup});
    strip_ = shared ? kSharedStrip : panel_rows;
    // Blocks of as many strips, as nearly as can be: some threads have nothing to do at the end of each.
    const int64_t blocks = (most - 1) / (kMostStrips * strip_) + 1;
    const int64_t block_rows = shared ? panel_rows : round_up((most - 1) / blocks + 1, strip_);
    Carry carry(as_they_lie_ ? 0 : (block_rows + strip_ - 1) / strip_, p);
    const int64_t stride = fused ? body_.fused_rows : panel_rows;
    // Only one thread at a time adds to a tile of the scatter. Where they share a panel, more tiles are more
    // reading of what another core has written.
    const int64_t most_tile = body_.tile(padded), eighth = round_up((padded + 7) / 8, body_.least_tile);
    const int64_t tile = fused ? padded : shared ? most_tile : std::min(most_tile, eighth);
    const int64_t panels = shared ? 1 : threads_;
    panel_bytes_ = as_they_lie_ ? 0 : round_up(row_bytes * stride, kPage);
    scratch_bytes_ = round_up(body_.scratch * tile * tile, kPage);
    Memory<char> memory = allocate_or_kept(panels * panel_bytes_ + threads_ * scratch_bytes_);
    panel_ = {p, padded, 0, stride, tile, call_.precision, memory.get(), stride * body_.pad, body_.pad};
    scratch_ = memory.get() + panels * panel_bytes_;
    tiles_ = tiles_of(panel_);
    turns_ = std::vector<std::atomic<int64_t>>(tiles_.size());
    if (call_.fresh) clear(call_, threads_);
    std::vector<double> diagonal;
    for (int64_t j = 0; j < p; j++) diagonal.push_back(call_.scatter[j * p + j]);
    for (int64_t first = 0; first < call_.N; first += kChunk) {
      chunk_ = first;
      const int64_t rows = std::min(kChunk, call_.N - first);
      if (first > 0 && !order_.sort(call_, first, rows)) return Refusal::label;
      if (as_they_lie_) {
        multiply_waiting(diagonal);
        break;
      }
      fill_radii<Real>(call_, order_, first, rows);
      const int64_t used = order_.used();
      for (int64_t start = 0; start < used; start += block_rows) {
        poll_();
        const int64_t end = std::min(used, start + block_rows);
        if (shared) {
          pack(start, end, carry);
          multiply_tiles(end - start);
        } else {
          pack_and_multiply(start, end, carry);
        }
        add_carries(start, end, carry, diagonal);
      }
    }
    // The squares as they were added up with the sums: low-precision products would bias the diagonal.
    for (int64_t j = 0; j < p; j++) call_.scatter[j * p + j] = diagonal[j];
    if (call_.symmetric) mirror();
    keep(std::move(memory));
    return Refusal::none;
  }

 private:
  int threads_for(int64_t work) const { return ncfast::threads_for(work, threads_); }

  int32_t label_of(int64_t sorted) const { return order_[sorted].label; }

  const char* feature_row(int64_t sorted) const {
    return ncfast::feature_row(call_, chunk_ + order_[sorted].place);
  }

  void pack(int64_t start, int64_t end, Carry& carry) {
    const int64_t strips = (end - start + strip_ - 1) / strip_;
    panel_.rows = end - start;
    parallel_for(threads_for((end - start) * call_.p), strips, [&](int64_t strip, int) {
      const int64_t from = start + strip * strip_;
      pack_strip(start, from, std::min(end, from + strip_), end, strip, carry,
                 [&](const Group& group, int64_t row, double* column_squares, Real* squares) {
                   body_.pack(group, row - start, panel_, column_squares, squares);
                 });
    });
  }

  // Both stages of a strip by one thread in a panel of its own, which no other core reads: a store would wait
  // for that to let go of the line. Each tile of the scatter is added to in the order of the strips.
  void pack_and_multiply(int64_t start, int64_t end, Carry& carry) {
    for (auto& turn : turns_) turn = 0;
    std::exception_ptr thrown;
    std::atomic<bool> stopped{false};
    const std::thread::id caller = std::this_thread::get_id();
    const int64_t strips = (end - start + strip_ - 1) / strip_;
    parallel_for(threads_for((end - start) * call_.p), strips, [&](int64_t strip, int slot) {
      if (std::this_thread::get_id() == caller && !stopped) {
        try {
          poll_();
        } catch (...) {
          thrown = std::current_exception();
          stopped = true;
        }
      }
      if (stopped) return;
      const int64_t from = start + strip * strip_, to = std::min(end, from + strip_);
      Panel panel = panel_;
      panel.data += slot * panel_bytes_;
      bool anew = true;
      pack_strip(start, from, to, to, strip, carry,
                 [&](const Group& group, int64_t row, double* column_squares, Real* squares) {
                   const int64_t filled = (row - from) % panel.stride;
                   body_.pack(group, filled, panel, column_squares, squares);
                   panel.rows = filled + group.rows;
                   if (panel.rows < panel.stride || row + group.rows == to) return;
                   multiply_tile(0, slot, panel, anew, nullptr);  // there is one tile: it is filled again
                   anew = false;
                 });
      for (size_t i = 0; i < tiles_.size(); i++) {
        // Strips are handed out in order, so whoever is waited for is at work, or has stopped.
        while (turns_[i].load(std::memory_order_acquire) != strip) {
          if (stopped) return;
          std::this_thread::yield();
        }
        multiply_tile(i, slot, panel, anew, call_.scatter);
        turns_[i].store(strip + 1, std::memory_order_release);
      }
    });
    if (thrown) std::rethrow_exception(thrown);
  }

  // Whether the strip's first rows belong to a class that began in an earlier strip of the block.
  bool carried(int64_t start, int64_t from) const {
    return from > start && label_of(from) == label_of(from - 1);
  }

  // The rows of the order from `row` on, those before `to`, from column `first` on; what is read next are
  // rows before `end`. Whose shifts are subtracted, if any, is for the caller.
  Group group_at(int64_t row, int64_t to, int64_t end, int64_t first) const {
    const int64_t skipped = first * element_bytes(call_.dtype);
    Group group;
    group.rows = static_cast<int>(std::min<int64_t>(kGroup, to - row));
    for (int i = 0; i < group.rows; i++) {
      const int32_t c = label_of(row + i);
      group.features[i] = feature_row(row + i) + skipped;
      group.next[i] = feature_row(std::min(row + i + kGroup, end - 1)) + skipped;
      group.sums[i] = call_.sums + c * call_.p + first;
      group.last[i] = i + 1 == group.rows || label_of(row + i + 1) != c;
    }
    return group;
  }

  // run(group, row, column_squares, squares) for the strip's groups.
  template <class Run>
  void pack_strip(int64_t start, int64_t from, int64_t to, int64_t end, int64_t strip, Carry& carry,
                  const Run& run) {
    const int64_t p = call_.p;
    const int32_t carried_class = carried(start, from) ? label_of(from) : -1;
    double* carried_sums = &carry.sums[strip * p];
    double* column_squares = &carry.column_squares[strip * p];
    if (carried_class >= 0) std::fill_n(carried_sums, p, 0.0);
    std::fill_n(column_squares, p, 0.0);
    double carried_sumsq = 0.0;
    const char* shift = static_cast<const char*>(call_.shift ? call_.shift : no_shift_.data());
    const int64_t shift_bytes = call_.shift ? p * sizeof(Real) : 0;
    for (int64_t row = from; row < to; row += kGroup) {
      Group group = group_at(row, to, end, 0);
      for (int i = 0; i < group.rows; i++) {
        const int32_t c = label_of(row + i);
        group.shift[i] = shift + c * shift_bytes;
        if (c == carried_class) group.sums[i] = carried_sums;
      }
      Real squares[kGroup];
      run(group, row, column_squares, squares);
      for (int i = 0; i < group.rows; i++) {
        const int32_t c = label_of(row + i);
        const double square = checked(squares[i]);
        if (c == carried_class) {
          carried_sumsq += square;
        } else {
          call_.sumsq[c] += square;
          call_.counts[c]++;
        }
        if (call_.radii)
          static_cast<Real*>(call_.radii)[chunk_ + order_[row + i].place] = std::sqrt(squares[i]);
      }
    }
    carry.sumsq[strip] = carried_sumsq;
  }

  void add_carries(int64_t start, int64_t end, const Carry& carry, std::vector<double>& diagonal) {
    const int64_t p = call_.p, strips = (end - start + strip_ - 1) / strip_;
    for (int64_t strip = 0; strip < strips; strip++) {
      const int64_t from = start + strip * strip_;
      for (int64_t j = 0; j < p; j++) diagonal[j] += carry.column_squares[strip * p + j];
      if (!carried(start, from)) continue;
      const int32_t c = label_of(from);
      for (int64_t j = 0; j < p; j++) call_.sums[c * p + j] += carry.sums[strip * p + j];
      call_.sumsq[c] += carry.sumsq[strip];
      const int64_t to = std::min(end, from + strip_);
      for (int64_t row = from; row < to && label_of(row) == c; row++) call_.counts[c]++;
    }
  }

  // The tiles of the multiply stage. Those off the diagonal cost most: those on it come last, so that threads
  // finish together.
  static std::vector<std::pair<int64_t, int64_t>> tiles_of(const Panel& panel) {
    const int64_t side = panel.tile, tiles = (panel.padded + side - 1) / side;
    std::vector<std::pair<int64_t, int64_t>> pairs;
    for (int64_t apart = tiles - 1; apart >= 0; apart--) {
      for (int64_t I = 0; I + apart < tiles; I++) pairs.emplace_back(I * side, (I + apart) * side);
    }
    return pairs;
  }

  void multiply_tiles(int64_t rows) {
    parallel_for(threads_for(rows * call_.p), static_cast<int64_t>(tiles_.size()),
                 [&](int64_t i, int slot) { multiply_tile(i, slot, panel_, true, call_.scatter); });
  }

  void multiply_tile(int64_t i, int slot, const Panel& panel, bool anew, double* scatter) {
    body_.multiply(panel, tiles_[i].first, tiles_[i].second, anew, scatter, scratch_ + slot * scratch_bytes_);
  }

  // Rows that wait are a panel as they lie. Whoever multiplies a tile on the diagonal adds its columns first,
  // for which they have to come to its cache anyway.
  void multiply_waiting(std::vector<double>& diagonal) {
    Panel& panel = panel_;
    panel.data = static_cast<char*>(const_cast<void*>(call_.features));
    panel.piece = body_.pad;
    panel.step = call_.row_bytes / sizeof(Real);
    panel.rows = call_.N;
    std::vector<Real> squares((panel.padded + panel.tile - 1) / panel.tile * call_.N);
    parallel_for(threads_for(call_.N * call_.p), static_cast<int64_t>(tiles_.size()),
                 [&](int64_t i, int slot) {
                   const auto [I, J] = tiles_[i];
                   if (I == J) add_tile_columns(I, diagonal, &squares[I / panel.tile * call_.N]);
                   multiply_tile(i, slot, panel, true, call_.scatter);
                 });
    for (int64_t row = 0; row < call_.N; row++) {
      Real square = 0;
      for (size_t i = row; i < squares.size(); i += call_.N) square += squares[i];
      call_.sumsq[label_of(row)] += square;  // which was checked before it could wait
      call_.counts[label_of(row)]++;
    }
  }

  // The columns of one tile, from `first` on, of all rows that wait.
  void add_tile_columns(int64_t first, std::vector<double>& diagonal, Real* squares) {
    const int64_t columns = std::min(call_.p - first, panel_.tile), rows = call_.N;
    for (int64_t row = 0; row < rows; row += kGroup) {
      body_.add_residuals(group_at(row, rows, rows, first), columns, &diagonal[first], squares + row);
    }
  }

  void mirror() {
    constexpr int64_t kSide = 32;
    const int64_t p = call_.p, sides = (p + kSide - 1) / kSide;
    parallel_for(threads_for(p * p), sides, [&](int64_t side, int) {
      const int64_t top = side * kSide, bottom = std::min(p, top + kSide);
      for (int64_t left = 0; left <= top; left += kSide) {
        for (int64_t i = top; i < bottom; i++) {
          const int64_t right = std::min(i, left + kSide);
          for (int64_t j = left; j < right; j++) call_.scatter[i * p + j] = call_.scatter[j * p + i];
        }
      }
    });
  }

  const ClassScatter& call_;
  const ScatterBody& body_;
  const int threads_;
  const std::function<void()>& poll_;
  int64_t chunk_ = 0, strip_ = 0;
  Order order_;
  bool as_they_lie_;            // whether the rows are the panel
  std::vector<Real> no_shift_;  // zeros [p] for rows that wait and are packed: their shifts are subtracted
  Panel panel_;                 // the one that threads share, or that of slot 0
  size_t panel_bytes_ = 0;      // from the panel of one slot to that of the next
  std::vector<std::pair<int64_t, int64_t>> tiles_;
  std::vector<std::atomic<int64_t>> turns_;  // of each tile, the strip that is to be added next
  char* scratch_ = nullptr;                  // of scratch_bytes_ per thread
  size_t scratch_bytes_ = 0;
};

const ScatterBody& scatter_body(const ClassScatter& call, Isa isa) {
  const Dtype dtype = call.dtype;
  // Narrow features are read no faster than FMAs multiply them, and those are more precise.
  const Precision precision = call.p < 64 ? Precision::highest : call.precision;
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return *scatter_body_avx2(dtype);
    case Isa::avx512:
      return *scatter_body_avx512(dtype);
    case Isa::avx512_bf16:
      return *scatter_body_avx512_bf16(dtype, precision);
    case Isa::amx:
      return *scatter_body_amx(dtype, precision);
#endif
    default:
      return *scatter_body_portable(dtype);
  }
}

}  // namespace

Refusal class_scatter(const ClassScatter& call, Isa isa, int threads, const std::function<void()>& poll) {
  if (!call.shift && (!call.scatter || call.radii || call.N > kMostWaiting))
    throw std::invalid_argument("class_scatter: not for rows that wait");
  const ScatterBody& body = scatter_body(call, isa);
  const Refusal refusal = !call.scatter                  ? class_sums(call, body, isa, threads, poll)
                          : call.dtype == Dtype::float64 ? Pass<double>(call, body, threads, poll).run()
                                                         : Pass<float>(call, body, threads, poll).run();
  if (refusal != Refusal::none) return refusal;
  const bool finite =
      std::all_of(call.sumsq, call.sumsq + call.C, [](double sumsq) { return std::isfinite(sumsq); });
  return finite ? Refusal::none : Refusal::nonfinite;
}

namespace {

// A batch looked at before anything of it is added.
template <class Real>
class Admission {
 public:
  // Puts the residuals of the rows in use to those that wait, unless `waiting` is null.
  Admission(const ClassScatter& call, Real* shift, const ScatterBody& body, int threads,
            const WaitingRows* waiting)
      : call_(call), label_(call.N) {
    const int64_t p = call.p;
    std::vector<int64_t> used;
    used.reserve(call.N);
    for (int64_t i = 0; i < call.N; i++) {
      label_[i] = class_at(call, i);
      if (label_[i] == kOutside) {
        refusal_ = Refusal::label;
        return;
      }
      if (label_[i] >= 0) used.push_back(i);
    }
    if (waiting && *waiting->filled + static_cast<int64_t>(used.size()) > waiting->room) {
      refusal_ = Refusal::room;
      return;
    }
    try {
      for (const int64_t i : used) {
        Real* k = shift + label_[i] * p;
        if (std::isnan(k[0])) choose(feature_row(call, i), body, k);
      }
      if (!take(used, shift, body, threads, waiting)) refusal_ = Refusal::nonfinite;
    } catch (...) {  // out of memory
      undo();
      throw;
    }
    if (refusal_ != Refusal::none) undo();
  }

  Refusal refusal() const { return refusal_; }

  void append_labels(const WaitingRows& waiting) const {
    int64_t end = *waiting.filled;
    for (const int64_t label : label_) {
      if (label >= 0) waiting.labels[end++] = label;
    }
    *waiting.filled = end;
  }

  // The batch with the labels as they were, whatever another thread writes there meanwhile.
  ClassScatter batch() const {
    ClassScatter batch = call_;
    batch.labels = label_.data();
    batch.label_size = batch.label_bytes = sizeof(int64_t);
    batch.ignore_index = kLeftOut;
    return batch;
  }

  // The last one first: where a shift begins with a NaN, it is chosen by each of its rows.
  void undo() const {
    for (size_t c = chosen_.size(); c-- > 0;) std::copy_n(&overwritten_[c * call_.p], call_.p, chosen_[c]);
  }

 private:
  void choose(const char* row, const ScatterBody& body, Real* k) {
    const int64_t p = call_.p;
    const std::vector<Real> zeros(p);
    overwritten_.insert(overwritten_.end(), k, k + p);
    chosen_.push_back(k);
    // The sums of one row about zero are the row itself, whatever its dtype.
    std::fill_n(k, p, Real(0));
    Real square;
    body.add_rows(&row, &row, 1, reinterpret_cast<const char*>(zeros.data()), k, p, &square);
  }

  // Returns whether the residuals of the rows `used` and their squares are finite.
  bool take(const std::vector<int64_t>& used, const Real* shift, const ScatterBody& body, int threads,
            const WaitingRows* waiting) const {
    const int64_t rows = used.size(), p = call_.p, parts = threads_for(rows * p, threads);
    char* to = waiting ? waiting->residuals + *waiting->filled * waiting->row_bytes : nullptr;
    std::atomic<bool> finite{true};
    parallel_for(threads, parts, [&](int64_t piece, int) {
      for (int64_t u = part(rows, piece, parts); u < part(rows, piece + 1, parts); u++) {
        const char* k = reinterpret_cast<const char*>(shift + label_[used[u]] * p);
        const Real square =
            body.take_row(feature_row(call_, used[u]), k, p, to ? to + u * waiting->row_bytes : nullptr);
        // Added up in another order it may be a little larger.
        if (!std::isfinite(checked(2 * square))) finite = false;
      }
    });
    return finite;
  }

  const ClassScatter& call_;
  std::vector<int64_t> label_;
  std::vector<Real> overwritten_;  // what stood where shifts were chosen
  std::vector<Real*> chosen_;
  Refusal refusal_ = Refusal::none;
};

// The rows that wait, to be added as `call` would be.
template <class Real>
ClassScatter rows_of(const WaitingRows& waiting, ClassScatter call) {
  call.N = *waiting.filled;
  call.dtype = sizeof(Real) == 8 ? Dtype::float64 : Dtype::float32;
  call.features = waiting.residuals;
  call.row_bytes = waiting.row_bytes;
  call.labels = waiting.labels;
  call.label_size = call.label_bytes = sizeof(int64_t);
  call.ignore_index = kLeftOut;
  call.shift = nullptr;
  return call;
}

template <class Real>
Refusal update(const ClassScatter& call, Real* shift, Isa isa, int threads) {
  // Where it saves a stage the rows wait, though only until they are all admitted.
  int64_t filled = 0;
  WaitingRows waiting = {nullptr, waiting_row_bytes<Real>(call.p), nullptr, &filled, call.N};
  const ScatterBody& later = scatter_body(rows_of<Real>(waiting, call), isa);
  const bool wait =
      call.N <= kMostWaiting && call.scatter && !call.radii && are_panel(later, waiting.row_bytes);
  Memory<char> residuals;
  std::vector<int64_t> labels(wait ? call.N : 0);
  if (wait) {
    residuals = allocate_or_kept(call.N * waiting.row_bytes);
    waiting.residuals = residuals.get();
    waiting.labels = labels.data();
  }
  const Admission<Real> admission(call, shift, scatter_body(call, isa), threads, wait ? &waiting : nullptr);
  if (admission.refusal() == Refusal::none) {
    try {
      if (wait) admission.append_labels(waiting);
      class_scatter(wait ? rows_of<Real>(waiting, call) : admission.batch(), isa, threads, [] {});
    } catch (...) {  // out of memory, before anything was added
      admission.undo();
      throw;
    }
  }
  if (wait) keep(std::move(residuals));
  return admission.refusal();
}

template <class Real>
Refusal admit(const ClassScatter& call, Real* shift, Isa isa, int threads, const WaitingRows& waiting) {
  const Admission<Real> admission(call, shift, scatter_body(call, isa), threads, &waiting);
  if (admission.refusal() == Refusal::none) admission.append_labels(waiting);
  return admission.refusal();
}

}  // namespace

Refusal class_scatter_update(const ClassScatter& call, void* shift, Isa isa, int threads) {
  return call.dtype == Dtype::float64 ? update(call, static_cast<double*>(shift), isa, threads)
                                      : update(call, static_cast<float*>(shift), isa, threads);
}

Refusal class_scatter_admit(const ClassScatter& call, void* shift, Isa isa, int threads,
                            const WaitingRows& waiting) {
  return call.dtype == Dtype::float64 ? admit(call, static_cast<double*>(shift), isa, threads, waiting)
                                      : admit(call, static_cast<float*>(shift), isa, threads, waiting);
}

}  // namespace ncfast

#include "cpu/class_scatter.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/memory.h"
#include "cpu/pool.h"

namespace ncfast {
namespace {

constexpr int64_t kChunk = 1 << 20;  // rows sorted at once: bounds the memory that grows with N
constexpr int64_t kPackStrip = 64;   // rows
constexpr int64_t kPage = 4096;
constexpr int64_t kStreamStrips = 64;  // of a block
// Rows. The first ones of a strip are prefetched by nobody, so the fewer strips the better.
constexpr int64_t kLeastStreamStrip = 256, kMostStreamStrip = 1024;
constexpr int64_t kLongRow = 1024;  // columns; streamed rows as long as this are not prefetched a group ahead
constexpr int64_t kFusedStrip = 2048;  // rows; no float32 sum is longer
constexpr int64_t kFusedBlock = 64 * kFusedStrip;
constexpr int64_t kFusedLeast = 8 * kFusedStrip;  // rows; with fewer some threads would have no strip
constexpr int64_t kSerial = 1 << 16;  // residuals below which waking a thread costs more than it saves

// What a small batch or waiting rows ask for is kept for the thread's next call: for a batch of 128 rows
// fresh pages took longer than the products.
thread_local Memory<char> kept;

void keep(Memory<char> memory) {
  constexpr size_t kMost = 16 << 20;
  const size_t bytes = memory.get_deleter().bytes;
  if (bytes <= kMost && (!kept || kept.get_deleter().bytes < bytes)) kept = std::move(memory);
}

Memory<char> allocate_or_kept(size_t bytes) {
  return kept && kept.get_deleter().bytes >= bytes ? std::move(kept) : allocate<char>(bytes);
}

int64_t label_at(const ClassScatter& call, int64_t i) {
  const char* at = static_cast<const char*>(call.labels) + i * call.label_bytes;
  if (call.label_size == 4) {
    int32_t label;
    std::memcpy(&label, at, sizeof label);
    return label;
  }
  int64_t label;
  std::memcpy(&label, at, sizeof label);
  return label;
}

// Where part i of `parts` equal parts of `count` begins.
int64_t part(int64_t count, int64_t i, int64_t parts) {
  return count / parts * i + std::min(i, count % parts);
}

// The rows of one chunk that are in use, by class and within a class as they came.
class Order {
 public:
  struct Row {
    int32_t place, label;  // the place is that in the chunk
  };

  explicit Order(int64_t most) : given_(new int32_t[most]), sorted_(new Row[most]) {}

  // Each thread counts a piece of the rows, and then writes them to places of its own: how many pieces there
  // are does not show. Labels are read once: another thread may be writing them.
  void sort(const ClassScatter& call, int64_t first, int64_t rows, int threads) {
    const int64_t C = call.C, pieces = std::clamp<int64_t>(rows / std::max(kLeastPiece, 4 * C), 1, threads);
    std::vector<int64_t> next(pieces * C);
    const auto for_pieces = [&](const auto& run) {
      parallel_for(threads, pieces, [&](int64_t piece, int) {
        run(next.data() + piece * C, part(rows, piece, pieces), part(rows, piece + 1, pieces));
      });
    };
    for_pieces([&](int64_t* count, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t y = label_at(call, first + i);
        const bool used = y >= 0 && y < C && y != call.ignore_index;
        given_[i] = used ? static_cast<int32_t>(y) : -1;
        if (used) count[y]++;
      }
    });
    used_ = 0;
    for (int64_t c = 0; c < C; c++) {
      for (int64_t piece = 0; piece < pieces; piece++) used_ += std::exchange(next[piece * C + c], used_);
    }
    for_pieces([&](int64_t* at, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int32_t y = given_[i];
        if (y >= 0) sorted_[at[y]++] = {static_cast<int32_t>(i), y};
      }
    });
  }

  int64_t used() const { return used_; }
  const Row& operator[](int64_t sorted) const { return sorted_[sorted]; }
  bool leaves_out(int64_t place) const { return given_[place] < 0; }

 private:
  static constexpr int64_t kLeastPiece = 1 << 14;  // rows
  const std::unique_ptr<int32_t[]> given_;  // the label of each row of the chunk, -1 for those left out
  const std::unique_ptr<Row[]> sorted_;
  int64_t used_ = 0;
};

// What the strips of a block cannot add to the results themselves. A strip adds to the sums of the classes
// that begin in it; rows of a class that began in an earlier strip of the block are carried, and added when
// all strips are done.
struct Carry {
  int64_t p;
  bool columns;
  std::vector<double> sums;            // [strips, p]
  std::vector<double> column_squares;  // [strips, p]
  std::vector<double> sumsq;           // [strips]

  Carry(int64_t strips, int64_t p, bool columns)
      : p(p), columns(columns), sums(strips * p), column_squares(columns ? strips * p : 0), sumsq(strips) {}
};

// A sum of kChunk such squares stays finite, and with it the panel's products; a larger one counts as
// infinite.
template <class Real>
double checked(Real square) {
  constexpr Real kMost = std::numeric_limits<Real>::max() / kChunk;
  return square <= kMost ? static_cast<double>(square)
                         : square - square + std::numeric_limits<double>::infinity();
}

template <class Real>
class Pass {
 public:
  Pass(const ClassScatter& call, const ScatterBody& body, int threads, const std::function<void()>& poll)
      : call_(call), body_(body), threads_(threads), poll_(poll), order_(std::min(call.N, kChunk)) {}

  void run() {
    const int64_t p = call_.p;
    const bool multiply = call_.scatter != nullptr;
    const int64_t padded = round_up(p, body_.pad);
    const bool fused = multiply && padded <= body_.fused_columns && call_.N >= kFusedLeast;
    const int64_t most = round_up(std::min(call_.N, kChunk), kGroup);
    const int64_t stream_strip =
        std::clamp(round_up(call_.N / kStreamStrips, kGroup), kLeastStreamStrip, kMostStreamStrip);
    strip_ = fused ? kFusedStrip : multiply ? kPackStrip : stream_strip;
    ahead_ = !multiply && call_.p >= kLongRow ? kStreamed : kGroup;
    const int64_t block_rows = std::min(most, fused      ? kFusedBlock
                                              : multiply ? body_.block_rows
                                                         : kStreamStrips * strip_);
    Carry carry((block_rows + strip_ - 1) / strip_, p, multiply);
    std::vector<double> diagonal;
    Memory<char> memory;
    if (multiply) {
      const int64_t rows = fused ? body_.fused_rows : block_rows, tile = fused ? padded : body_.tile(padded);
      const int64_t panels = fused ? threads_ : 1;
      const size_t panel_bytes = round_up(body_.element(call_.precision) * padded * rows, kPage);
      scratch_bytes_ = round_up(body_.scratch * tile * tile, kPage);
      memory = allocate_or_kept(panels * panel_bytes + threads_ * scratch_bytes_);
      for (int64_t i = 0; i < panels; i++) {
        panels_.push_back({p, padded, 0, rows, tile, call_.precision, memory.get() + i * panel_bytes});
      }
      scratch_ = memory.get() + panels * panel_bytes;
      tiles_ = tiles_of(panels_[0]);
      for (int64_t j = 0; j < p; j++) diagonal.push_back(call_.scatter[j * p + j]);
    }
    for (int64_t first = 0; first < call_.N; first += kChunk) {
      chunk_ = first;
      const int64_t rows = std::min(kChunk, call_.N - first);
      order_.sort(call_, first, rows, threads_);
      fill_radii(rows);
      const int64_t used = order_.used();
      for (int64_t start = 0; start < used; start += block_rows) {
        poll_();
        const int64_t end = std::min(used, start + block_rows);
        if (fused) {
          pack_and_multiply(start, end, carry);
        } else {
          pack(start, end, carry);
        }
        add_carries(start, end, carry, diagonal);
        if (multiply && !fused) multiply_tiles(end - start);
      }
    }
    if (!multiply) return;
    // The exact squares of the pack stage: the low-precision products would bias the diagonal.
    for (int64_t j = 0; j < p; j++) call_.scatter[j * p + j] = diagonal[j];
    if (call_.symmetric) mirror();
    keep(std::move(memory));
  }

 private:
  int threads_for(int64_t work) const { return work < kSerial ? 1 : threads_; }

  void fill_radii(int64_t rows) {
    Real* radii = static_cast<Real*>(call_.radii);
    if (!radii) return;
    for (int64_t i = 0; i < rows; i++) {
      if (order_.leaves_out(i)) radii[chunk_ + i] = std::numeric_limits<Real>::quiet_NaN();
    }
  }

  int32_t label_of(int64_t sorted) const { return order_[sorted].label; }

  const char* feature_row(int64_t sorted) const {
    return static_cast<const char*>(call_.features) + (chunk_ + order_[sorted].place) * call_.row_bytes;
  }

  void pack(int64_t start, int64_t end, Carry& carry) {
    const int64_t strips = (end - start + strip_ - 1) / strip_;
    Panel* panel = panels_.empty() ? nullptr : &panels_[0];
    if (panel) panel->rows = end - start;
    parallel_for(threads_for((end - start) * call_.p), strips, [&](int64_t strip, int) {
      const int64_t from = start + strip * strip_;
      pack_strip(start, from, std::min(end, from + strip_), end, strip, carry,
                 [&](const Group& group, int64_t row, double* column_squares, Real* squares) {
                   if (panel) {
                     body_.pack(group, row - start, *panel, column_squares, squares);
                   } else {
                     body_.stream(group, call_.p, squares);
                   }
                 });
    });
  }

  // Both stages at once: every strip in fillings of its thread's panel, its sums in that thread's scratch.
  void pack_and_multiply(int64_t start, int64_t end, Carry& carry) {
    std::atomic<int64_t> turn{0};
    parallel_for(threads_, (end - start + strip_ - 1) / strip_, [&](int64_t strip, int slot) {
      const int64_t from = start + strip * strip_, to = std::min(end, from + strip_);
      Panel& panel = panels_[slot];
      char* sums = scratch_ + slot * scratch_bytes_;
      pack_strip(start, from, to, end, strip, carry,
                 [&](const Group& group, int64_t row, double* column_squares, Real* squares) {
                   const int64_t filled = (row - from) % panel.stride, after = row + group.rows;
                   body_.pack(group, filled, panel, column_squares, squares);
                   panel.rows = filled + group.rows;
                   if (panel.rows == panel.stride || after == to)
                     body_.accumulate(panel, after - panel.rows == from, sums);
                 });
      // Strips are handed out in order, so whoever is waited for is at work.
      while (turn.load(std::memory_order_acquire) != strip) std::this_thread::yield();
      body_.flush(panel, call_.scatter, sums);
      turn.store(strip + 1, std::memory_order_release);
    });
  }

  // Whether the strip's first rows belong to a class that began in an earlier strip of the block.
  bool carried(int64_t start, int64_t from) const {
    return from > start && label_of(from) == label_of(from - 1);
  }

  // run(group, row, column_squares, squares) for the strip's groups.
  template <class Run>
  void pack_strip(int64_t start, int64_t from, int64_t to, int64_t end, int64_t strip, Carry& carry,
                  const Run& run) {
    const int64_t p = call_.p;
    const int32_t carried_class = carried(start, from) ? label_of(from) : -1;
    double* carried_sums = &carry.sums[strip * p];
    double* column_squares = carry.columns ? &carry.column_squares[strip * p] : nullptr;
    if (carried_class >= 0) std::fill_n(carried_sums, p, 0.0);
    if (column_squares) std::fill_n(column_squares, p, 0.0);
    double carried_sumsq = 0.0;
    const char* shift = static_cast<const char*>(call_.shift);
    for (int64_t row = from; row < to; row += kGroup) {
      Group group;
      group.rows = static_cast<int>(std::min<int64_t>(kGroup, to - row));
      for (int i = 0; i < group.rows; i++) {
        const int32_t c = label_of(row + i);
        group.features[i] = feature_row(row + i);
        group.next[i] = feature_row(std::min(row + i + ahead_, end - 1));
        group.shift[i] = shift + c * p * sizeof(Real);
        group.sums[i] = c == carried_class ? carried_sums : call_.sums + c * p;
        group.last[i] = i + 1 == group.rows || label_of(row + i + 1) != c;
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
      if (carry.columns) {
        for (int64_t j = 0; j < p; j++) diagonal[j] += carry.column_squares[strip * p + j];
      }
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
    parallel_for(threads_for(rows * call_.p), static_cast<int64_t>(tiles_.size()), [&](int64_t i, int slot) {
      body_.multiply(panels_[0], tiles_[i].first, tiles_[i].second, call_.scatter,
                     scratch_ + slot * scratch_bytes_);
    });
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
  int64_t chunk_ = 0, strip_ = 0, ahead_ = 0;
  Order order_;
  std::vector<Panel> panels_;  // one, or one per thread, or none to stream
  std::vector<std::pair<int64_t, int64_t>> tiles_;
  char* scratch_ = nullptr;  // of scratch_bytes_ per thread
  size_t scratch_bytes_ = 0;
};

size_t element_bytes(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// In how many pieces rows are read in the order in which they lie; 0 where class by class is better: with the
// scatter, of long rows, where shifts and sums crowd the second-level cache, and of few rows per class.
int64_t storage_pieces(const ClassScatter& call) {
  constexpr int64_t kLongestRow = 2048, kMostSums = 128 << 10;  // bytes; the latter per byte of an element
  constexpr int64_t kLeastPiece = 1024, kPiece = 4096;          // rows
  constexpr int64_t kLeastOfClass = 16, kOfClass = 256;         // rows of a class in a piece, on average
  constexpr int64_t kLeast = 4, kEnough = 16;                   // pieces, for as many threads
  const int64_t element = element_bytes(call.dtype), real = std::max<int64_t>(element, sizeof(float));
  if (call.scatter || element * call.p > kLongestRow || 2 * real * call.C * call.p > kMostSums * element)
    return 0;
  const int64_t most = call.N / std::max(kLeastPiece, kLeastOfClass * call.C);
  if (most < kLeast) return 0;
  return std::max(std::min(most, kEnough), call.N / std::max(kPiece, kOfClass * call.C));
}

// Rows in the order in which they lie, which the processor's prefetchers follow. Each is added to the sums of
// its class, which its thread holds in the cache.
template <class Real>
class StoragePass {
 public:
  StoragePass(const ClassScatter& call, const ScatterBody& body, int threads,
              const std::function<void()>& poll)
      : call_(call), body_(body), threads_(threads), poll_(poll), sums_(threads) {}

  // `ahead`: bytes from a row to the one that is asked for meanwhile.
  void run(int64_t pieces, int64_t ahead) {
    const int64_t N = call_.N, size = call_.C * call_.p;
    const size_t held_bytes = round_up(size * sizeof(Real), kPage);
    const size_t bytes = held_bytes + round_up(size * sizeof(double), kPage);
    Memory<char> memory = allocate_or_kept(threads_ * bytes);
    for (int slot = 0; slot < threads_; slot++) {
      char* at = memory.get() + slot * bytes;
      sums_[slot].held = reinterpret_cast<Real*>(at);
      sums_[slot].totals = reinterpret_cast<double*>(at + held_bytes);
      sums_[slot].sumsq.resize(call_.C);
      sums_[slot].rows.resize(call_.C);
    }
    const int64_t row = call_.p * element_bytes(call_.dtype);
    ahead_ = (ahead + row - 1) / row;
    const int64_t together = std::max<int64_t>(1, kChunk / (N / pieces));  // between two polls
    for (auto& turn : turns_) turn = 0;
    for (int64_t first = 0; first < pieces; first += together) {
      poll_();
      parallel_for(threads_, std::min(together, pieces - first), [&](int64_t i, int slot) {
        const int64_t piece = first + i;
        add_piece(piece, part(N, piece, pieces), part(N, piece + 1, pieces), sums_[slot]);
      });
    }
    keep(std::move(memory));
  }

 private:
  static constexpr int64_t kGroups = 16;    // of classes
  static constexpr int64_t kMostHeld = 32;  // rows; no float32 sum is longer

  struct Sums {
    Real* held;                 // [C, p], zeros between pieces
    double* totals;             // [C, p], of the classes that had more than kMostHeld rows
    bool cleared = false;       // whether `held` has been
    std::vector<double> sumsq;  // [C]
    std::vector<int64_t> rows;  // [C]
  };

  void add_piece(int64_t piece, int64_t from, int64_t to, Sums& sums) {
    const int64_t C = call_.C, p = call_.p;
    if (!sums.cleared) std::fill_n(sums.held, C * p, Real(0));
    sums.cleared = true;
    std::fill(sums.sumsq.begin(), sums.sumsq.end(), 0.0);
    std::fill(sums.rows.begin(), sums.rows.end(), 0);
    const char* features = static_cast<const char*>(call_.features);
    Real* radii = static_cast<Real*>(call_.radii);
    for (int64_t i = from; i < to; i++) {
      const int64_t c = label_at(call_, i);
      if (c < 0 || c >= C || c == call_.ignore_index) {
        if (radii) radii[i] = std::numeric_limits<Real>::quiet_NaN();
        continue;
      }
      Real* held = sums.held + c * p;
      if (sums.rows[c] > 0 && sums.rows[c] % kMostHeld == 0) {
        double* totals = sums.totals + c * p;
        if (sums.rows[c] == kMostHeld) std::fill_n(totals, p, 0.0);
        body_.move_row(held, totals, p);
      }
      sums.rows[c]++;
      const char* shift = static_cast<const char*>(call_.shift) + c * p * sizeof(Real);
      const Real square =
          body_.add_row(features + i * call_.row_bytes,
                        features + std::min(i + ahead_, to - 1) * call_.row_bytes, shift, held, p);
      sums.sumsq[c] += checked(square);
      if (radii) radii[i] = std::sqrt(square);
    }
    // What pieces contribute is added in their order, by groups of classes so that threads need not wait
    // long.
    for (int64_t group = 0; group < kGroups; group++) {
      // Pieces are handed out in order, so whoever is waited for is at work.
      while (turns_[group].load(std::memory_order_acquire) != piece) std::this_thread::yield();
      for (int64_t c = part(C, group, kGroups); c < part(C, group + 1, kGroups); c++) add_class(c, sums);
      turns_[group].store(piece + 1, std::memory_order_release);
    }
  }

  void add_class(int64_t c, Sums& sums) {
    const int64_t p = call_.p;
    if (sums.rows[c] == 0) return;
    call_.counts[c] += sums.rows[c];
    call_.sumsq[c] += sums.sumsq[c];
    double* result = call_.sums + c * p;
    if (sums.rows[c] > kMostHeld) {
      const double* totals = sums.totals + c * p;
      for (int64_t j = 0; j < p; j++) result[j] += totals[j];
    }
    body_.move_row(sums.held + c * p, result, p);
  }

  const ClassScatter& call_;
  const ScatterBody& body_;
  const int threads_;
  const std::function<void()>& poll_;
  int64_t ahead_ = 0;                    // rows
  std::vector<Sums> sums_;               // one per thread
  std::atomic<int64_t> turns_[kGroups];  // the piece whose turn it is
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

template <class Real>
void run(const ClassScatter& call, Isa isa, int threads, const std::function<void()>& poll) {
  const ScatterBody& body = scatter_body(call, isa);
  if (const int64_t pieces = storage_pieces(call)) {
    // Processors with AMX look far enough ahead by themselves.
    StoragePass<Real>(call, body, threads, poll).run(pieces, isa == Isa::amx ? 0 : 8192);
  } else {
    Pass<Real>(call, body, threads, poll).run();
  }
}

}  // namespace

void class_scatter(const ClassScatter& call, Isa isa, int threads, const std::function<void()>& poll) {
  if (call.dtype == Dtype::float64) {
    run<double>(call, isa, threads, poll);
  } else {
    run<float>(call, isa, threads, poll);
  }
}

namespace {

// A batch looked at before anything of it is added.
template <class Real>
class Admission {
 public:
  // admitted(i, label) for every row in use, while its features are in the cache.
  template <class Admitted>
  Admission(const ClassScatter& call, Real* shift, const ScatterBody& body, const Admitted& admitted)
      : call_(call), label_(call.N) {
    const int64_t p = call.p;
    for (int64_t i = 0; i < call.N; i++) {
      label_[i] = label_at(call, i);
      if (label_[i] == call.ignore_index) {
        label_[i] = -1;
      } else if (label_[i] < 0 || label_[i] >= call.C) {
        refusal_ = Refusal::label;
        return;
      }
    }
    std::vector<Real> unused(p);  // sums that nobody asks for
    for (int64_t i = 0; i < call.N; i++) {
      if (label_[i] < 0) continue;
      const char* row = static_cast<const char*>(call.features) + i * call.row_bytes;
      Real* k = shift + label_[i] * p;
      if (std::isnan(k[0])) choose(row, body, k);
      const Real square = body.add_row(row, row, reinterpret_cast<const char*>(k), unused.data(), p);
      if (!std::isfinite(checked(2 * square))) {  // added up in another order it may be a little larger
        refusal_ = Refusal::nonfinite;
        undo();
        return;
      }
      admitted(i, label_[i]);
    }
  }

  Refusal refusal() const { return refusal_; }

  // The batch with the labels as they were, whatever another thread writes there meanwhile.
  ClassScatter batch() const {
    ClassScatter batch = call_;
    batch.labels = label_.data();
    batch.label_size = batch.label_bytes = sizeof(int64_t);
    batch.ignore_index = -1;
    return batch;
  }

  void undo() const {
    for (size_t c = 0; c < chosen_.size(); c++) std::copy_n(&overwritten_[c * call_.p], call_.p, chosen_[c]);
  }

 private:
  void choose(const char* row, const ScatterBody& body, Real* k) {
    const int64_t p = call_.p;
    chosen_.push_back(k);
    overwritten_.insert(overwritten_.end(), k, k + p);
    // The sums of one row about zero are the row itself, whatever its dtype.
    std::vector<double> sums(p);
    const std::vector<Real> zeros(p);
    Group group;
    group.rows = 1;
    group.features[0] = group.next[0] = row;
    group.shift[0] = reinterpret_cast<const char*>(zeros.data());
    group.sums[0] = sums.data();
    group.last[0] = true;
    Real square;
    body.stream(group, p, &square);
    std::copy(sums.begin(), sums.end(), k);
  }

  const ClassScatter& call_;
  std::vector<int64_t> label_;
  std::vector<Real> overwritten_;  // what stood where shifts were chosen
  std::vector<Real*> chosen_;
  Refusal refusal_ = Refusal::none;
};

template <class Real>
Refusal update(const ClassScatter& call, Real* shift, Isa isa, int threads) {
  const Admission<Real> admission(call, shift, scatter_body(call, isa), [](int64_t, int64_t) {});
  if (admission.refusal() != Refusal::none) return admission.refusal();
  try {
    class_scatter(admission.batch(), isa, threads, [] {});
  } catch (...) {  // out of memory, before anything was added
    admission.undo();
    throw;
  }
  return Refusal::none;
}

template <class Real>
Refusal admit(const ClassScatter& call, Real* shift, Isa isa, const WaitingRows& waiting) {
  const size_t row_bytes = call.p * element_bytes(call.dtype);
  int64_t end = *waiting.filled;
  const Admission<Real> admission(call, shift, scatter_body(call, isa), [&](int64_t i, int64_t label) {
    std::memcpy(static_cast<char*>(waiting.features) + end * row_bytes,
                static_cast<const char*>(call.features) + i * call.row_bytes, row_bytes);
    waiting.labels[end++] = label;
  });
  if (admission.refusal() == Refusal::none) *waiting.filled = end;
  return admission.refusal();
}

}  // namespace

Refusal class_scatter_update(const ClassScatter& call, void* shift, Isa isa, int threads) {
  return call.dtype == Dtype::float64 ? update(call, static_cast<double*>(shift), isa, threads)
                                      : update(call, static_cast<float*>(shift), isa, threads);
}

Refusal class_scatter_admit(const ClassScatter& call, void* shift, Isa isa, const WaitingRows& waiting) {
  return call.dtype == Dtype::float64 ? admit(call, static_cast<double*>(shift), isa, waiting)
                                      : admit(call, static_cast<float*>(shift), isa, waiting);
}

}  // namespace ncfast

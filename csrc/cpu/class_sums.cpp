// class_scatter without the scatter: a pure read of the features, beside which everything else counts.
//
// Rows are cut into pieces. In a piece the rows of a class are added in the order in which they lie, 32 in
// float32 and those sums in float64: the same bits whichever way the piece is gone through. That is as its
// rows lie, which the processor's prefetchers follow, each added to the sums of its class that the thread
// holds in the cache: row by row, or a few columns of many rows at a time; or class by class, where sums
// would crowd the cache or threads lack a piece of their own.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "cpu/class_rows.h"
#include "cpu/memory.h"

namespace ncfast {
namespace {

constexpr int64_t kTasks = 32;  // of a piece that is read class by class
constexpr int64_t kHeld = 32;   // rows; no float32 sum is longer

int64_t real_bytes(const ClassScatter& call) {
  return std::max<int64_t>(element_bytes(call.dtype), sizeof(float));
}

// Whether rows that are read as they lie are best gone through a few columns at a time: if they are long
// enough, and shifts and sums crowd the first level of the cache and leave half of the second one to the
// rows. Numbers of 16 bits come so fast that it gains nothing; with AMX it was not tried.
bool suits_windows(const ClassScatter& call, Isa isa) {
  constexpr int64_t kLeastRow = 768, kFirstLevel = 24 << 10, kSecondLevel = 1 << 20;  // bytes
  const int64_t bytes = call.p * real_bytes(call), all = 2 * call.C * bytes;
  return isa != Isa::amx && element_bytes(call.dtype) > 2 && bytes >= kLeastRow && all > kFirstLevel &&
         all <= kSecondLevel / 2;
}

// Whether rows are best read as they lie: if they are short, if not so short that a call for each takes
// longer than reading it, and shifts and sums stay in the cache.
bool suits_storage_order(const ClassScatter& call, Isa isa) {
  constexpr int64_t kShortestRow = 16, kShortRow = 256, kLongestRow = 512;  // columns
  constexpr int64_t kBeside = 32;  // bytes that a class takes besides its shift and sums
  // Bytes of all classes, per byte of an element. With AMX they stay in a second-level cache of 2 MiB: the
  // third level is slow there, and more was not measured.
  constexpr int64_t kMost = 1 << 21, kMostOnAmx = 1 << 18, kMostOfLongRows = 1 << 17;
  if (call.p < kShortestRow || call.p > kLongestRow) return false;
  const int64_t most = call.p > kShortRow ? kMostOfLongRows : isa == Isa::amx ? kMostOnAmx : kMost;
  const int64_t of_class = call.p * (2 * real_bytes(call) + sizeof(double)) + kBeside;
  return call.C * of_class <= most * static_cast<int64_t>(element_bytes(call.dtype));
}

// Small pieces keep the rows of a class near each other in memory, and threads busy; but each costs a visit
// to the sums of every class.
int64_t count_pieces(const ClassScatter& call, bool storage_order) {
  constexpr int64_t kLeastBytes = 8 << 20, kFewRows = 64, kManyRows = 4096;
  const int64_t row_bytes = call.p * element_bytes(call.dtype);
  const int64_t least = std::clamp(kLeastBytes / row_bytes, kFewRows, kManyRows);
  const int64_t C = std::min(call.C, kChunk / 128);
  int64_t pieces = std::max<int64_t>(1, call.N / std::max(least, (storage_order ? 128 : 64) * C));
  if (storage_order)
    pieces = std::max(pieces, std::min<int64_t>(4, call.N / std::max<int64_t>(1024, 16 * C)));
  // Few pieces are best shared out evenly, to 2, 4 or 8 threads.
  while (pieces < 64 && (pieces & (pieces - 1))) pieces &= pieces - 1;
  return pieces;
}

template <class Real>
class SumsPass {
 public:
  SumsPass(const ClassScatter& call, const ScatterBody& body, int threads, const std::function<void()>& poll)
      : call_(call),
        body_(body),
        threads_(threads_for(call.N * call.p, threads)),
        poll_(poll),
        turns_(call.C) {}

  Refusal run(Isa isa, int threads) {
    const bool storage_order = suits_storage_order(call_, isa);
    pieces_ = count_pieces(call_, storage_order);
    // A class is cleared when it is first added to, unless there is more to be cleared than to be read.
    clears_ = call_.fresh && call_.C <= call_.N;
    if (call_.fresh && !clears_) clear(call_, threads);
    // No thread should wait for the others more than a fifth of the time, and a class have 16 rows of a
    // piece.
    const int64_t rounds = (pieces_ + threads_ - 1) / threads_;
    if (storage_order && 4 * rounds * threads_ <= 5 * pieces_ && call_.N >= 16 * call_.C * pieces_) {
      read_in_storage_order(isa);
    } else {
      read_by_class();
    }
    return outside_ ? Refusal::label : Refusal::none;
  }

 private:
  // What a piece has of one class.
  struct Share {
    int64_t rows = 0;
    double sumsq = 0.0;
    Real* held;      // [p], the rows since the last multiple of kHeld; zeros without rows
    double* totals;  // [p], those before; without meaning up to kHeld rows
  };

  int64_t first_row(int64_t piece) const { return part(call_.N, piece, pieces_); }
  const char* shift(int64_t c) const {
    return static_cast<const char*>(call_.shift) + c * call_.p * sizeof(Real);
  }

  void read_in_storage_order(Isa isa) {
    const int64_t C = call_.C, p = call_.p, row_bytes = p * sizeof(Real);
    // Shifts and sums of multiples of 512 bytes lie a line further apart: they would share few sets of the
    // first-level cache.
    const int64_t stride = row_bytes + (row_bytes % 512 ? 0 : kCacheLine);
    const int64_t held_bytes = round_up(C * stride, kPage);
    const int64_t bytes = held_bytes + round_up(C * p * sizeof(double), kPage);
    const bool windows = suits_windows(call_, isa);
    Memory<char> memory = allocate_or_kept(threads_ * bytes + (windows ? held_bytes : 0));
    char* shifts = memory.get() + threads_ * bytes;
    if (windows) {
      for (int64_t c = 0; c < C; c++) std::memcpy(shifts + c * stride, shift(c), row_bytes);
    }
    std::vector<std::vector<Share>> shares(threads_, std::vector<Share>(C));
    std::vector<char> begun(threads_);
    for_pieces([&](int64_t piece, int slot) {
      std::vector<Share>& share = shares[slot];
      if (!begun[slot]) {
        begun[slot] = true;
        char* held = memory.get() + slot * bytes;
        std::memset(held, 0, held_bytes);
        for (int64_t c = 0; c < C; c++) {
          share[c].held = reinterpret_cast<Real*>(held + c * stride);
          share[c].totals = reinterpret_cast<double*>(held + held_bytes) + c * p;
        }
      }
      if (windows) {
        read_windows(piece, shifts, stride, share);
      } else {
        read_rows(piece, isa, share);
      }
      for (int64_t c = 0; c < C; c++) {
        // Threads close behind each other would pass lines of the cache to and fro.
        if (c % 32 == 0) await_turn(piece, std::min(C - 1, c + 31));
        add(piece, c, share[c]);
      }
    });
    keep(std::move(memory));
  }

  void read_rows(int64_t piece, Isa isa, std::vector<Share>& shares) {
    constexpr int64_t kBytesAhead = 8 << 10;
    // Processors with AMX look far enough ahead by themselves.
    const int64_t row_bytes = call_.p * element_bytes(call_.dtype), end = first_row(piece + 1);
    const int64_t ahead = isa == Isa::amx ? 0 : (kBytesAhead + row_bytes - 1) / row_bytes;
    for (int64_t i = first_row(piece); i < end; i++) {
      const int64_t c = class_at(call_, i);
      if (c < 0) {
        leave_out(i, c);
        continue;
      }
      const char* features = feature_row(call_, i);
      const char* next = feature_row(call_, std::min(i + ahead, end - 1));
      add_rows(&features, &next, &i, 1, c, shares[c]);
    }
  }

  // Each window asks for the next one, if that is whole.
  void read_windows(int64_t piece, const char* shifts, int64_t stride, std::vector<Share>& shares) {
    Window::Row rows[Window::kMost];
    Real squares[Window::kMost];
    Window window;
    window.rows = rows;
    window.row_bytes = call_.row_bytes;
    window.p = call_.p;
    window.shift = shifts;
    window.sums = reinterpret_cast<char*>(shares[0].held);
    window.stride = stride;
    window.totals = shares[0].totals;
    const int64_t end = first_row(piece + 1);
    for (int64_t first = first_row(piece); first < end; first += Window::kMost) {
      const int64_t last = std::min(end, first + Window::kMost);
      window.count = 0;
      for (int64_t i = first; i < last; i++) {
        const int64_t c = class_at(call_, i);
        if (c < 0) {
          leave_out(i, c);
          continue;
        }
        Window::Row& row = rows[window.count++];
        row.place = static_cast<uint32_t>(i - first);
        row.label = static_cast<uint32_t>(c);
        row.move = count_rows(shares[c], 1);
      }
      window.features = feature_row(call_, first);
      window.ahead = last + Window::kMost <= end ? Window::kMost * call_.row_bytes : 0;
      body_.add_window(window, squares);
      for (int i = 0; i < window.count; i++)
        add_square(shares[rows[i].label], squares[i], first + rows[i].place);
    }
  }

  void read_by_class() {
    const int64_t p = call_.p;
    const size_t bytes = round_up(p * (sizeof(double) + sizeof(Real)), kCacheLine);
    Memory<char> memory = allocate_or_kept(threads_ * bytes);
    std::fill_n(memory.get(), threads_ * bytes, 0);
    std::vector<Order> orders;
    const int64_t together = pieces_of_chunk();
    // Pieces are sorted one by each thread, or, if they are few, one after the other by all.
    const bool few = together < threads_;
    for (int64_t i = 0; i < together; i++)
      orders.emplace_back(call_, call_.N / pieces_ + 1, few ? threads_ : 1);
    for_chunks([&](int64_t first, int64_t last) {
      if (few) {
        for (int64_t i = first; i < last; i++) sort(orders[i - first], i);
      } else {
        parallel_for(threads_, last - first, [&](int64_t i, int) { sort(orders[i], first + i); });
      }
      parallel_for(threads_, (last - first) * kTasks, [&](int64_t task, int slot) {
        const int64_t piece = first + task / kTasks;
        const Order& order = orders[piece - first];
        const int64_t begin = first_class(order, task % kTasks), end = first_class(order, task % kTasks + 1);
        Share share;
        share.totals = reinterpret_cast<double*>(memory.get() + slot * bytes);
        share.held = reinterpret_cast<Real*>(share.totals + p);
        int64_t row = order.begin_of(begin);
        for (int64_t c = begin; c < end; c++) {
          row = add_class(order, row, first_row(piece), c, share);
          add(piece, c, share);
        }
      });
    });
    keep(std::move(memory));
  }

  // Of a task: it has the classes that begin in its part of the rows.
  int64_t first_class(const Order& order, int64_t task) const {
    if (task == kTasks) return call_.C;
    const int64_t row = part(order.used(), task, kTasks);
    return row == 0 ? 0 : order[row - 1].label + 1;
  }

  // The rows of class c, from `row` of the order on. Returns where the next class begins.
  int64_t add_class(const Order& order, int64_t row, int64_t first, int64_t c, Share& share) {
    constexpr int64_t kLongRow = 1024;  // columns; rows as long are not asked for so many rows ahead
    const int64_t ahead = call_.p >= kLongRow ? 8 : 32, used = order.used();
    while (row < used && order[row].label == c) {
      const char *features[kHeld], *next[kHeld];
      int64_t places[kHeld];
      int count = 0;
      for (; count < kHeld && row < used && order[row].label == c; count++, row++) {
        places[count] = first + order[row].place;
        features[count] = feature_row(call_, places[count]);
        next[count] = feature_row(call_, first + order[std::min(row + ahead, used - 1)].place);
      }
      add_rows(features, next, places, count, c, share);
    }
    return row;
  }

  // As many as have about kChunk rows and a GiB.
  int64_t pieces_of_chunk() const {
    constexpr int64_t kBytes = 1 << 30;
    const int64_t rows =
        std::min(kChunk, kBytes / (call_.p * static_cast<int64_t>(element_bytes(call_.dtype))));
    return std::clamp<int64_t>(rows / std::max<int64_t>(1, call_.N / pieces_), 1, pieces_);
  }

  // run(first, last) for the pieces of a chunk.
  template <class Run>
  void for_chunks(const Run& run) {
    const int64_t together = pieces_of_chunk();
    for (int64_t first = 0; first < pieces_ && !outside_; first += together) {
      poll_();
      run(first, std::min(pieces_, first + together));
    }
  }

  // run(piece, slot), by all threads.
  template <class Run>
  void for_pieces(const Run& run) {
    for_chunks([&](int64_t first, int64_t last) {
      parallel_for(threads_, last - first, [&](int64_t i, int slot) { run(first + i, slot); });
    });
  }

  void sort(Order& order, int64_t piece) {
    const int64_t first = first_row(piece), rows = first_row(piece + 1) - first;
    if (!order.sort(call_, first, rows)) outside_ = true;
    fill_radii<Real>(call_, order, first, rows);
  }

  void leave_out(int64_t i, int64_t reason) {
    if (reason == kOutside) outside_ = true;
    if (call_.radii) static_cast<Real*>(call_.radii)[i] = std::numeric_limits<Real>::quiet_NaN();
  }

  // Rows of class c at `places`, which do not go beyond its next multiple of kHeld.
  void add_rows(const char* const* features, const char* const* next, const int64_t* places, int count,
                int64_t c, Share& share) {
    if (count_rows(share, count)) body_.move_row(share.held, share.totals, call_.p);
    Real squares[kHeld];
    body_.add_rows(features, next, count, shift(c), share.held, call_.p, squares);
    for (int r = 0; r < count; r++) add_square(share, squares[r], places[r]);
  }

  // Before `count` rows of a class are added. Returns whether what is held must be moved to the totals first.
  bool count_rows(Share& share, int count) const {
    const bool move = share.rows > 0 && share.rows % kHeld == 0;
    if (move && share.rows == kHeld) std::fill_n(share.totals, call_.p, 0.0);
    share.rows += count;
    return move;
  }

  void add_square(Share& share, Real square, int64_t row) {
    share.sumsq += checked(square);
    if (call_.radii) static_cast<Real*>(call_.radii)[row] = std::sqrt(square);
  }

  // Pieces, and tasks within them, are handed out in order, so whoever is waited for is at work.
  void await_turn(int64_t piece, int64_t c) const {
    while (turns_[c].load(std::memory_order_acquire) != piece) std::this_thread::yield();
  }

  // To the results, piece by piece; what is held becomes zero.
  void add(int64_t piece, int64_t c, Share& share) {
    await_turn(piece, c);
    const int64_t p = call_.p;
    double* sums = call_.sums + c * p;
    if (clears_ && piece == 0) {
      call_.counts[c] = 0;
      call_.sumsq[c] = 0.0;
      std::fill_n(sums, p, 0.0);
    }
    if (share.rows > 0) {
      call_.counts[c] += share.rows;
      call_.sumsq[c] += share.sumsq;
      if (share.rows > kHeld) {
        for (int64_t j = 0; j < p; j++) sums[j] += share.totals[j];
      }
      body_.move_row(share.held, sums, p);
      share.rows = 0;
      share.sumsq = 0.0;
    }
    turns_[c].store(piece + 1, std::memory_order_release);
  }

  const ClassScatter& call_;
  const ScatterBody& body_;
  const int threads_;
  const std::function<void()>& poll_;
  int64_t pieces_ = 1;
  bool clears_ = false;
  std::vector<std::atomic<int64_t>> turns_;  // [C] the piece whose turn it is
  std::atomic<bool> outside_{false};         // whether a label was outside [0, C)
};

}  // namespace

Refusal class_sums(const ClassScatter& call, const ScatterBody& body, Isa isa, int threads,
                   const std::function<void()>& poll) {
  return call.dtype == Dtype::float64 ? SumsPass<double>(call, body, threads, poll).run(isa, threads)
                                      : SumsPass<float>(call, body, threads, poll).run(isa, threads);
}

}  // namespace ncfast

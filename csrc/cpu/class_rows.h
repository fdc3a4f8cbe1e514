// Rows and their labels, as both ways of class_scatter go through them: with the scatter (class_scatter.cpp)
// and without (class_sums.cpp).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/class_scatter.h"
#include "cpu/memory.h"
#include "cpu/pool.h"

namespace ncfast {

constexpr int64_t kChunk = 1 << 20;  // rows; not many more are sorted at once, however many there are
constexpr int64_t kPage = 4096;
constexpr int64_t kSerial = 1 << 16;  // residuals below which waking a thread costs more than it saves

inline int threads_for(int64_t residuals, int threads) { return residuals < kSerial ? 1 : threads; }

inline size_t element_bytes(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

inline const char* feature_row(const ClassScatter& call, int64_t i) {
  return static_cast<const char*>(call.features) + i * call.row_bytes;
}

// From one row that waits to the next: an odd number of cache lines, as rows a power of two apart would have
// their columns meet in a few sets of the caches.
template <class Real>
int64_t waiting_row_bytes(int64_t p) {
  const int64_t line = kCacheLine;
  return (round_up(p * sizeof(Real), line) / line | 1) * line;
}

constexpr int64_t kLeftOut = -1, kOutside = -2;

// The class of row i, kLeftOut, or kOutside for a label that is neither a class nor ignore_index. Labels are
// read once: another thread may be writing them.
inline int64_t class_at(const ClassScatter& call, int64_t i) {
  const char* at = static_cast<const char*>(call.labels) + i * call.label_bytes;
  int64_t label;
  if (call.label_size == 4) {
    int32_t narrow;
    std::memcpy(&narrow, at, sizeof narrow);
    label = narrow;
  } else {
    std::memcpy(&label, at, sizeof label);
  }
  if (label == call.ignore_index) return kLeftOut;
  return label >= 0 && label < call.C ? label : kOutside;
}

// Where part i of `parts` equal parts of `count` begins.
inline int64_t part(int64_t count, int64_t i, int64_t parts) {
  return count / parts * i + std::min(i, count % parts);
}

// A sum of kChunk such squares stays finite, and with it the panel's products; a larger one counts as
// infinite.
template <class Real>
double checked(Real square) {
  constexpr Real kMost = std::numeric_limits<Real>::max() / kChunk;
  return square <= kMost ? static_cast<double>(square)
                         : square - square + std::numeric_limits<double>::infinity();
}

// Zeros for results that are `fresh`.
inline void clear(const ClassScatter& call, int threads) {
  const auto fill = [&](double* numbers, int64_t count) {
    const int64_t parts = threads_for(count, threads);
    prefer_huge_pages(numbers, count * sizeof(double));
    parallel_for(threads, parts, [&](int64_t i, int) {
      std::fill(numbers + part(count, i, parts), numbers + part(count, i + 1, parts), 0.0);
    });
  };
  std::fill_n(call.counts, call.C, 0);
  std::fill_n(call.sumsq, call.C, 0.0);
  fill(call.sums, call.C * call.p);
  if (call.scatter) fill(call.scatter, call.p * call.p);
}

// The rows of one chunk that are in use, by class and within a class as they came.
class Order {
 public:
  struct Row {
    int32_t place, label;  // the place is that in the chunk
  };

  // Room for `most` rows, to be sorted by as many threads.
  Order(const ClassScatter& call, int64_t most, int threads)
      : given_(new int32_t[most]),
        sorted_(new Row[most]),
        threads_(threads),
        pieces_(std::clamp<int64_t>(most / std::max(kLeastPiece, 4 * call.C), 1, threads)),
        next_(pieces_ * call.C) {}

  // Each thread counts a piece of the rows, and then writes them to places of its own: how many pieces there
  // are does not show. Returns whether all labels were classes or ignore_index.
  bool sort(const ClassScatter& call, int64_t first, int64_t rows) {
    const int64_t C = call.C;
    std::fill(next_.begin(), next_.end(), 0);
    std::atomic<bool> inside{true};
    const auto for_pieces = [&](const auto& run) {
      if (pieces_ == 1) return run(next_.data(), int64_t{0}, rows);
      parallel_for(threads_, pieces_, [&](int64_t piece, int) {
        run(next_.data() + piece * C, part(rows, piece, pieces_), part(rows, piece + 1, pieces_));
      });
    };
    for_pieces([&](int64_t* count, int64_t begin, int64_t end) {
      bool all = true;
      for (int64_t i = begin; i < end; i++) {
        const int64_t y = class_at(call, first + i);
        given_[i] = static_cast<int32_t>(y);
        if (y >= 0) count[y]++;
        all &= y != kOutside;
      }
      if (!all) inside = false;
    });
    used_ = 0;
    for (int64_t c = 0; c < C; c++) {
      for (int64_t piece = 0; piece < pieces_; piece++) used_ += std::exchange(next_[piece * C + c], used_);
    }
    for_pieces([&](int64_t* at, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int32_t y = given_[i];
        if (y >= 0) sorted_[at[y]++] = {static_cast<int32_t>(i), y};
      }
    });
    return inside;
  }

  int64_t used() const { return used_; }
  const Row& operator[](int64_t sorted) const { return sorted_[sorted]; }
  bool leaves_out(int64_t place) const { return given_[place] < 0; }
  // The first row of class c or of one that comes after it.
  int64_t begin_of(int64_t c) const {
    return std::partition_point(&sorted_[0], &sorted_[used_], [c](const Row& row) { return row.label < c; }) -
           &sorted_[0];
  }

 private:
  static constexpr int64_t kLeastPiece = 1 << 14;  // rows
  std::unique_ptr<int32_t[]> given_;  // the class of each row of the chunk, negative for those left out
  std::unique_ptr<Row[]> sorted_;
  int threads_;
  int64_t pieces_;
  std::vector<int64_t> next_;  // [pieces, C]
  int64_t used_ = 0;
};

// The radii of those of `rows` rows from `first` on that the order leaves out.
template <class Real>
void fill_radii(const ClassScatter& call, const Order& order, int64_t first, int64_t rows) {
  Real* radii = static_cast<Real*>(call.radii);
  if (!radii || order.used() == rows) return;
  for (int64_t i = 0; i < rows; i++) {
    if (order.leaves_out(i)) radii[first + i] = std::numeric_limits<Real>::quiet_NaN();
  }
}

// class_scatter without the scatter.
Refusal class_sums(const ClassScatter& call, const ScatterBody& body, Isa isa, int threads,
                   const std::function<void()>& poll);

}  // namespace ncfast

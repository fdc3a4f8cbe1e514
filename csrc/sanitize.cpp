// The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set of this
// machine: `make sanitize`. Buffers are exactly as large as the contracts say, so that one element too many
// is found. It checks counts, the range of indices and the bounds of memory; the values are the business of
// tests/.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/affine_argmax.h"
#include "cpu/class_scatter.h"
#include "cpu/memory.h"
#include "cpu/pair_geometry.h"

namespace {

struct Shape {
  int64_t N, p, C;
};

constexpr Shape kShapes[] = {{0, 3, 2},      {1, 1, 1},     {31, 15, 2},     {33, 17, 5},    {65, 31, 4},
                             {257, 95, 300}, {300, 97, 3},  {1100, 193, 11}, {2100, 260, 2}, {2600, 260, 2},
                             {40, 2400, 3},  {20000, 5, 3}, {20000, 95, 3},  {66000, 5, 3}};

void fail(const char* what, ncfast::Isa isa) {
  std::fprintf(stderr, "%s: %s\n", ncfast::name(isa), what);
  std::exit(1);
}

// The rows of a call wait, and are counted when they are added. Returns whether they were refused.
template <class Real>
bool wait(ncfast::ClassScatter call, ncfast::Isa isa, int64_t used) {
  std::vector<Real> shift(call.C * call.p, std::numeric_limits<Real>::quiet_NaN());
  const int64_t row_bytes = ncfast::round_up(call.p * sizeof(Real), ncfast::kCacheLine);
  std::vector<char> residuals(used * row_bytes);
  std::vector<int64_t> labels(used), counts(call.C);
  int64_t rows = 0;
  const ncfast::WaitingRows waiting = {residuals.data(), row_bytes, labels.data(), &rows, used};
  if (ncfast::class_scatter_admit(call, shift.data(), isa, 3, waiting) != ncfast::Refusal::none) return true;
  if (rows != used) fail("not every row waits", isa);
  call.N = rows;
  if (!call.scatter || rows > ncfast::kMostWaiting) return false;
  call.dtype = sizeof(Real) == 8 ? ncfast::Dtype::float64 : ncfast::Dtype::float32;
  call.features = residuals.data();
  call.row_bytes = row_bytes;
  call.labels = labels.data();
  call.label_size = call.label_bytes = sizeof(int64_t);
  call.shift = nullptr;
  call.counts = counts.data();
  call.radii = nullptr;
  ncfast::class_scatter(call, isa, 3, [] {});
  for (int64_t n : counts) used -= n;
  if (used != 0) fail("not every row that waited was counted", isa);
  return false;
}

template <class Real>
void run(const Shape& shape, ncfast::Dtype dtype, size_t size, ncfast::Isa isa, ncfast::Precision precision,
         bool scatter, bool update) {
  const auto [N, p, C] = shape;
  const int64_t row_bytes = (p + 1) * size;
  // One byte off: rows need not be aligned, not even to their elements. The last row has no padding after it.
  std::vector<char> memory(1 + (N ? (N - 1) * row_bytes + p * size : 0));
  std::vector<int32_t> labels(N);
  int64_t used = 0;
  for (int64_t i = 0; i < N; i++) {
    labels[i] = i % 7 == 3 ? -100 : static_cast<int32_t>(i * 31 % C);
    used += labels[i] >= 0;
    for (int64_t b = 0; b < p * static_cast<int64_t>(size); b++) {
      memory[1 + i * row_bytes + b] = static_cast<char>((i + b) % 61);
    }
  }
  std::vector<Real> shift(C * p, update ? std::numeric_limits<Real>::quiet_NaN() : Real(0));
  std::vector<Real> radii(N);
  std::vector<int64_t> counts(C);
  std::vector<double> sums(C * p), sumsq(C), square(scatter ? p * p : 0);
  const ncfast::ClassScatter call = {N,
                                     p,
                                     C,
                                     dtype,
                                     memory.data() + 1,
                                     row_bytes,
                                     labels.data(),
                                     4,
                                     4,
                                     -100,
                                     shift.data(),
                                     precision,
                                     counts.data(),
                                     sums.data(),
                                     sumsq.data(),
                                     scatter ? square.data() : nullptr,
                                     radii.data(),
                                     !update,
                                     false};
  if (!update) {
    ncfast::class_scatter(call, isa, 3, [] {});
  } else {
    const bool refused = wait<Real>(call, isa, used);
    if ((ncfast::class_scatter_update(call, shift.data(), isa, 3) != ncfast::Refusal::none) != refused)
      fail("rows are refused only when they wait, or only when they do not", isa);
    ncfast::ClassScatter other = call;
    other.radii = nullptr;
    if ((ncfast::class_scatter_update(other, shift.data(), isa, 3) != ncfast::Refusal::none) != refused)
      fail("rows are refused only with radii, or only without", isa);
    used = refused ? 0 : 2 * used;
  }
  int64_t counted = 0;
  for (int64_t n : counts) counted += n;
  if (counted != used) {
    std::fprintf(stderr, "%s: counted %ld rows of %ld\n", ncfast::name(isa), static_cast<long>(counted),
                 static_cast<long>(used));
    std::exit(1);
  }
}

void decide(const Shape& shape, ncfast::Dtype dtype, size_t size, ncfast::Isa isa) {
  const auto [N, p, C] = shape;
  const int64_t row_bytes = (p + 1) * size;
  std::vector<char> memory(1 + (N ? (N - 1) * row_bytes + p * size : 0));
  for (size_t i = 0; i < memory.size(); i++) memory[i] = static_cast<char>(i % 61);
  std::vector<float> middle(p, 0.5f);
  std::vector<double> weight(C * p), bias(C);
  for (size_t i = 0; i < weight.size(); i++) weight[i] = static_cast<double>(i % 37) - 18;
  std::vector<int64_t> index[2] = {std::vector<int64_t>(N, -1), std::vector<int64_t>(N, -1)};
  const std::unique_ptr<bool[]> decided[2] = {std::make_unique<bool[]>(N), std::make_unique<bool[]>(N)};
  ncfast::AffineRule rules[2];
  for (int r = 0; r < 2; r++) {
    rules[r] = {C - r * (C - 1), weight.data(), bias.data(), 0, 0, index[r].data(), decided[r].get()};
  }
  const ncfast::AffineArgmax call = {N, p, dtype, memory.data() + 1, row_bytes, middle.data(), 2, rules};
  ncfast::affine_argmax(call, isa, 3, [] {});
  for (const auto& decisions : index) {
    for (int64_t c : decisions) {
      if (c < 0 || c >= C) fail("a decision out of range", isa);
    }
  }
}

void pairs(int64_t C, int64_t p, ncfast::Isa isa) {
  std::vector<double> rows(C * p), other(C * p), variances(C, 1.0), nearest(C), radii(C);
  for (size_t i = 0; i < rows.size(); i++) {
    rows[i] = static_cast<double>(i % 41) - 20;  // rows repeat: some pairs are equal
    other[i] = static_cast<double>(i % 43) - 21;
  }
  std::vector<int64_t> index(C, -1), classes(C);
  for (int64_t c = 0; c < C; c++) classes[c] = C - 1 - c;
  ncfast::PairStatistics statistics;
  ncfast::pair_geometry({C, p, rows.data(), variances.data(), &statistics, nearest.data(), index.data()}, isa,
                        3, [] {});
  for (int64_t c = 0; c < C; c++) {
    if (index[c] < 0 || index[c] >= C || index[c] == c) fail("a nearest row out of range", isa);
  }
  ncfast::etf_error({C, p, rows.data(), rows.data()}, isa, 3, [] {});
  ncfast::etf_error({C, p, rows.data(), other.data()}, isa, 3, [] {});
  for (const int64_t A : {int64_t{0}, C / 2, C}) {
    const ncfast::DecisionRadius call = {
        C, p, A, rows.data(), variances.data(), other.data(), classes.data(), radii.data()};
    ncfast::decision_radius(call, isa, 3, [] {});
    const std::vector<double> exact(radii);
    ncfast::decision_bound(call, isa, 3, [] {});
    for (int64_t i = 0; i < A; i++) {
      if (radii[i] > exact[i]) fail("a bound above its radius", isa);
    }
  }
}

}  // namespace

int main() {
  using ncfast::Dtype;
  using ncfast::Precision;
  for (ncfast::Isa isa : ncfast::kIsas) {
    if (!ncfast::available(isa)) continue;
    for (const Shape& shape : kShapes) {
      for (Precision precision : {Precision::highest, Precision::high, Precision::medium}) {
        for (bool scatter : {false, true}) {
          for (bool update : {false, true}) {
            run<float>(shape, Dtype::float32, 4, isa, precision, scatter, update);
            run<float>(shape, Dtype::bfloat16, 2, isa, precision, scatter, update);
            run<float>(shape, Dtype::float16, 2, isa, precision, scatter, update);
            run<double>(shape, Dtype::float64, 8, isa, precision, scatter, update);
          }
        }
      }
    }
    for (const Shape& shape : kShapes) {
      decide(shape, ncfast::Dtype::float32, 4, isa);
      decide(shape, ncfast::Dtype::bfloat16, 2, isa);
      decide(shape, ncfast::Dtype::float16, 2, isa);
      decide(shape, ncfast::Dtype::float64, 8, isa);
    }
    const Shape windows = {33000, 193, 20};  // read without the scatter, a few columns of many rows at a time
    run<float>(windows, Dtype::float32, 4, isa, Precision::high, false, false);
    run<double>(windows, Dtype::float64, 8, isa, Precision::high, false, false);
    decide({4100, 70, 300}, ncfast::Dtype::float32, 4, isa);  // enough for 8-bit integers
    for (const int64_t C : {2, 47, 48, 49, 97, 230}) {
      for (const int64_t p : {1, 7, 8, 127, 129, 300}) pairs(C, p, isa);
    }
    std::printf("%s: clean\n", ncfast::name(isa));
  }
}

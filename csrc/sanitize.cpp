// class_scatter under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set of this
// machine: `make sanitize`. Buffers are exactly as large as the contract says, so that one element too many
// is found. It checks counts and the bounds of memory; the values are the business of tests/.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/class_scatter.h"

namespace {

struct Shape {
  int64_t N, p, C;
};

constexpr Shape kShapes[] = {{0, 3, 2},      {1, 1, 1},    {31, 15, 2},     {33, 17, 5},    {65, 31, 4},
                             {257, 95, 300}, {300, 97, 3}, {1100, 193, 11}, {2100, 260, 2}, {20000, 5, 3}};

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
                                     !update};
  if (!update) {
    ncfast::class_scatter(call, isa, 3, [] {});
  } else if (ncfast::class_scatter_update(call, shift.data(), isa, 3) != ncfast::Refusal::none) {
    used = 0;
  }
  int64_t counted = 0;
  for (int64_t n : counts) counted += n;
  if (counted != used) {
    std::fprintf(stderr, "%s: counted %ld rows of %ld\n", ncfast::name(isa), static_cast<long>(counted),
                 static_cast<long>(used));
    std::exit(1);
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
    std::printf("class_scatter on %s: clean\n", ncfast::name(isa));
  }
}

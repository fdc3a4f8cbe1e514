#include "cpu/affine_argmax.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/memory.h"
#include "cpu/pool.h"

namespace ncfast {
namespace {

// A block of rows is scored against one rule after the other: it should stay in the second-level cache, with
// the classes that are streamed past it.
constexpr int64_t kBlockBytes = 512 << 10;
constexpr int64_t kMaxBlockRows = 256;
constexpr int64_t kBlocksPerPoll = 256;

// Where a coarse level is tried: it saves a part of every score, and costs a little more per row and a second
// packing of the classes. It stays where it decides three of four rows of the sample.
constexpr int64_t kCoarseRows = 4096, kSample = 512;

// A rule as a body wants it, at one level.
struct PackedRule {
  int64_t classes;  // padded
  Memory<char> panel;
  std::vector<float> scale, bias;
  Norms largest = {0, 0, 0};
  double largest_bias = 0, bias_slack = 0;

  PackedRule(const AffineRule& rule, const ArgmaxBody& body, int64_t p, int level, int threads)
      : classes(round_up(rule.C, body.classes)),
        panel(allocate<char>(classes * body.bytes(p, level))),
        scale(classes),
        bias(classes, -std::numeric_limits<float>::infinity()) {
    const int64_t tasks = (classes + body.group - 1) / body.group;
    std::vector<Norms> norms(tasks);
    parallel_for(threads, tasks, [&](int64_t task, int) {
      const int64_t first = task * body.group, count = std::min<int64_t>(body.group, classes - first);
      const Operand out = {panel.get() + first * body.bytes(p, level), scale.data() + first};
      body.pack_rule(rule.weight, rule.C, p, level, first, count, out, &norms[task]);
    });
    for (const Norms& n : norms) keep_larger(&largest, n);
    constexpr double kLost = 0x1p-537;  // the root of the least square: what the norms may have lost a number
    largest.residual += rule.weight_slack + std::sqrt(static_cast<double>(p)) * kLost;
    bias_slack = rule.bias_slack;
    for (int64_t c = 0; c < rule.C; c++) {
      bias[c] = static_cast<float>(rule.bias[c]);
      largest_bias = larger(largest_bias, std::abs(rule.bias[c]));
    }
  }
};

// E of the header, rounded up; infinite where it, or a partial sum, might have left the range of float32.
double error_bound(const Norms& row, const PackedRule& rule, double depth, int64_t p) {
  constexpr double u = 1.0 / (1 << 24), kUnderflow = 0x1p-110;
  constexpr double kInRange = 1e37;
  const Norms& v = rule.largest;
  if (!(row.seen * v.seen + rule.largest_bias < kInRange)) return std::numeric_limits<double>::infinity();
  const double rounding =
      depth * u * (row.seen * v.seen + rule.largest_bias) + u * rule.largest_bias + rule.bias_slack;
  const double error =
      row.residual * (v.seen + v.residual) + row.seen * v.residual + row.low * v.low + rounding;
  // Products that are denormal, and numbers, or products of two scales of integers, where a thread takes
  // those for zero: with a sum of up to p 2^14 or, at 16 bits, 2^31.
  const double underflow = (depth + p + (1 << 16)) * (1 + row.seen + v.seen) * kUnderflow;
  return error < kInRange ? error * (1 + 1e-6) + underflow : std::numeric_limits<double>::infinity();
}

class Scorer {
 public:
  Scorer(const AffineArgmax& call, const ArgmaxBody& body, int threads, const std::function<void()>& poll)
      : call_(call), body_(body), threads_(threads), poll_(poll) {}

  using Rules = std::vector<std::unique_ptr<PackedRule>>;

  Rules pack(int level, const std::vector<const AffineRule*>& rules) const {
    Rules packed;
    for (const AffineRule* rule : rules) {
      packed.push_back(std::make_unique<PackedRule>(*rule, body_, call_.p, level, threads_));
    }
    return packed;
  }

  // Decides the rows of the list, or all N where there is none, for the rules chosen.
  void run(int level, const std::vector<int64_t>* list, const std::vector<const AffineRule*>& rules,
           const Rules& packed) {
    const int64_t p = call_.p, count = list ? static_cast<int64_t>(list->size()) : call_.N;
    if (count == 0) return;
    const int64_t fitting = kBlockBytes / static_cast<int64_t>(body_.bytes(p, level));
    const int64_t rows =
        std::clamp(fitting / body_.rows, int64_t{1}, kMaxBlockRows / body_.rows) * body_.rows;
    const int64_t blocks = (count + rows - 1) / rows;
    const size_t block_bytes = rows * body_.bytes(p, level);
    const size_t slot_bytes = round_up(block_bytes, 4096) + round_up(body_.scratch(rows), 4096);
    const Memory<char> buffers = allocate<char>(slot_bytes * threads_);
    const double depth = body_.depth(p, level);
    for (int64_t start = 0; start < blocks; start += kBlocksPerPoll) {
      parallel_for(threads_, std::min(kBlocksPerPoll, blocks - start), [&](int64_t task, int slot) {
        float scale[kMaxBlockRows];
        const Operand block = {buffers.get() + slot * slot_bytes, scale};
        char* scratch = block.numbers + round_up(block_bytes, 4096);
        const int64_t first = (start + task) * rows, filled = std::min(rows, count - first);
        const int64_t padded = round_up(filled, body_.rows);
        Norms norms[kMaxBlockRows];
        TopTwo top[kMaxBlockRows];
        int64_t row[kMaxBlockRows];
        for (int64_t i = 0; i < padded; i++) {
          const char* at = nullptr;
          if (i < filled) {
            row[i] = list ? (*list)[first + i] : first + i;
            at = static_cast<const char*>(call_.features) + row[i] * call_.row_bytes;
          }
          body_.pack_row(at, call_.middle, p, level, i, block, &norms[i]);
        }
        for (size_t r = 0; r < rules.size(); r++) {
          PackedRule& rule = *packed[r];
          const Operand panel = {rule.panel.get(), rule.scale.data()};
          body_.score(block, padded, panel, rule.bias.data(), rule.classes, p, level, scratch, top);
          for (int64_t i = 0; i < filled; i++) {
            const double margin = static_cast<double>(top[i].best) - top[i].second;
            const double error = error_bound(norms[i], rule, depth, p);
            int64_t index = margin > 2 * error ? top[i].index : -1;
            if (index < 0 && std::isfinite(error)) {
              const double threshold = top[i].best - 2 * error;
              index = among_candidates(level, *rules[r], rule, row[i], norms[i], scratch, i, threshold);
            }
            rules[r]->decided[row[i]] = index >= 0;
            rules[r]->index[row[i]] = std::max<int64_t>(index, 0);
          }
        }
      });
      poll_();
    }
  }

  // The row's exact argmax by the float64 scores of the classes at the threshold or above it; -1 where these
  // are not known, too many, or not far enough apart.
  int64_t among_candidates(int level, const AffineRule& rule, const PackedRule& packed, int64_t row,
                           const Norms& norms, const char* scratch, int64_t place, double threshold) const {
    int32_t classes[kCandidates];
    const float least =
        std::nextafter(static_cast<float>(threshold), -std::numeric_limits<float>::infinity());
    const int count = body_.candidates(scratch, place, least, classes);
    // More would cost as much as the row's next level; beyond the last one that is float64 as well.
    const int64_t most = std::max<int64_t>(2, rule.C * (level ? 3 : 1) / 512);
    if (level + 1 < body_.levels && count > most) return -1;
    const char* features = static_cast<const char*>(call_.features) + row * call_.row_bytes;
    double best = -std::numeric_limits<double>::infinity(), second = best;
    int64_t index = -1;
    for (int n = 0; n < count; n++) {
      const int64_t c = classes[n];
      const double score =
          body_.product(features, call_.middle, rule.weight + c * call_.p, call_.p) + rule.bias[c];
      if (score > best) {
        second = best;
        best = score;
        index = c;
      } else if (score > second) {
        second = score;
      }
    }
    // p products and as many additions, each rounded by 2^-53; norms rounded as much again.
    const double norm = norms.seen + norms.residual, longest = packed.largest.seen + packed.largest.residual;
    const double error =
        (static_cast<double>(call_.p) + 8) * 0x1p-52 * (norm * longest + packed.largest_bias) +
        norm * rule.weight_slack + rule.bias_slack;
    return best - second > 2 * error ? index : -1;
  }

  // Whether level 0 decides three of four rows, by a sample of them.
  bool decides_most(int64_t sample, const std::vector<const AffineRule*>& rules, const Rules& packed) {
    std::vector<int64_t> list(sample);
    for (int64_t i = 0; i < sample; i++) list[i] = i * call_.N / sample;
    run(0, &list, rules, packed);
    int64_t decided = 0;
    for (const AffineRule* rule : rules) {
      for (const int64_t row : list) decided += rule->decided[row];
    }
    return 4 * decided >= 3 * sample * static_cast<int64_t>(rules.size());
  }

 private:
  const AffineArgmax& call_;
  const ArgmaxBody& body_;
  const int threads_;
  const std::function<void()>& poll_;
};

}  // namespace

const ArgmaxBody* argmax_body(Isa isa, Dtype dtype) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return argmax_body_avx2(dtype);
    case Isa::avx512:
      return argmax_body_avx512(dtype);
    case Isa::avx512_vnni:
    case Isa::avx512_bf16:
      return argmax_body_avx512_vnni(dtype);
    case Isa::amx:
      return argmax_body_amx(dtype);
#endif
    default:
      return argmax_body_portable(dtype);
  }
}

void affine_argmax(const AffineArgmax& call, Isa isa, int threads, const std::function<void()>& poll) {
  const ArgmaxBody& body = *argmax_body(isa, call.dtype);
  Scorer scorer(call, body, threads, poll);
  std::vector<const AffineRule*> all;
  int64_t classes = 0;
  for (int r = 0; r < call.rules; r++) {
    all.push_back(&call.rule[r]);
    classes += call.rule[r].C;
  }
  const bool tries_coarse =
      call.p <= body.coarse_columns && call.N >= kCoarseRows && classes >= body.coarse_classes;
  int level = tries_coarse || body.coarse_columns == 0 ? 0 : 1;
  Scorer::Rules packed = scorer.pack(level, all);
  if (tries_coarse && !scorer.decides_most(kSample, all, packed)) packed = scorer.pack(level = 1, all);
  scorer.run(level, nullptr, all, packed);
  packed.clear();
  while (++level < body.levels) {
    for (const AffineRule* rule : all) {
      std::vector<int64_t> undecided;
      for (int64_t i = 0; i < call.N; i++) {
        if (!rule->decided[i]) undecided.push_back(i);
      }
      if (!undecided.empty()) scorer.run(level, &undecided, {rule}, scorer.pack(level, {rule}));
    }
  }
}

}  // namespace ncfast

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/block.cuh"
#include "cuda/class_moments.h"
#include "cuda/element.cuh"

namespace ncfast {
namespace {

constexpr int kDigits = 256;
constexpr int kTile = 2048;     // keys that a block sorts
constexpr int kBatch = 4;       // rows in flight per team
constexpr int kSquares = 2048;  // float64 of shared memory per block
constexpr int kLongestRun = 256;
constexpr int64_t kEnoughBlocks = 2048;  // so that a run may be longer: several per multiprocessor of any GPU
constexpr int kGroup = 32;               // partial results that are joined at a time: a lane for each

struct Encode {
  int64_t N, C;
  const void* labels;
  int label_size;
  int64_t label_bytes, ignore_index;
  unsigned* keys;
  void* radii;
  bool wide;
};

__global__ void __launch_bounds__(kThreads) moments_encode(const Encode e) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= e.N) return;
  const int64_t label = read_label(e.labels, e.label_size, e.label_bytes, i);
  const bool kept = label != e.ignore_index && label >= 0 && label < e.C;
  e.keys[i] = static_cast<unsigned>(kept ? label : e.C);
  if (kept || e.radii == nullptr) return;
  if (e.wide) {
    static_cast<double*>(e.radii)[i] = nan("");
  } else {
    static_cast<float*>(e.radii)[i] = nanf("");
  }
}

struct Sort {
  int64_t N, tiles;
  int bit;  // of the digit's lowest
  const unsigned* keys;
  const unsigned* rows;  // null: 0, 1, 2, …
  unsigned* sorted_keys;
  unsigned* sorted_rows;
  unsigned* before;  // [digits, tiles] keys with the digit in a tile, then in the tiles before it
  unsigned* totals;  // [digits]
};

// A warp's share of the tile, 32 keys at a time and in order: visit(i, digit, peers) on every lane that has
// a key, peers being the lanes with the same digit.
template <class Visit>
__device__ void for_each_key(const Sort& s, Visit visit) {
  constexpr int kShare = kTile / kWarps;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x / 32 * kShare;
  for (int k = 0; k < kShare; k += 32) {
    const int64_t i = first + k + threadIdx.x % 32;
    const unsigned digit = i < s.N ? s.keys[i] >> s.bit & (kDigits - 1) : kDigits;
    const unsigned peers = __match_any_sync(kFull, digit);
    visit(i, digit, peers);
    __syncwarp();
  }
}

// seen[warp][digit]: how often in the warp's share.
__device__ void count_digits(const Sort& s, unsigned (*seen)[kDigits]) {
  unsigned* mine = seen[threadIdx.x / 32];
  for (int d = threadIdx.x % 32; d < kDigits; d += 32) mine[d] = 0;
  __syncwarp();
  for_each_key(s, [&](int64_t, unsigned digit, unsigned peers) {
    if (digit < kDigits && threadIdx.x % 32 == __ffs(peers) - 1) mine[digit] += __popc(peers);
  });
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads) digit_count(const Sort s) {
  __shared__ unsigned seen[kWarps][kDigits];
  count_digits(s, seen);
  unsigned n = 0;
  for (int w = 0; w < kWarps; w++) n += seen[w][threadIdx.x];
  s.before[threadIdx.x * s.tiles + blockIdx.x] = n;
}

// One block per digit.
__global__ void __launch_bounds__(kThreads) digit_scan(const Sort s) {
  const unsigned total = scan_array(s.before + blockIdx.x * s.tiles, s.tiles);
  if (threadIdx.x == 0) s.totals[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads) digit_scatter(const Sort s) {
  __shared__ unsigned seen[kWarps][kDigits];
  count_digits(s, seen);
  unsigned total;
  unsigned place = scan_block(s.totals[threadIdx.x], &total) + s.before[threadIdx.x * s.tiles + blockIdx.x];
  for (int w = 0; w < kWarps; w++) {
    const unsigned n = seen[w][threadIdx.x];
    seen[w][threadIdx.x] = place;
    place += n;
  }
  __syncthreads();
  unsigned* mine = seen[threadIdx.x / 32];
  for_each_key(s, [&](int64_t i, unsigned digit, unsigned peers) {
    const unsigned lane = threadIdx.x % 32;
    const unsigned to = digit < kDigits ? mine[digit] + __popc(peers & ((1u << lane) - 1)) : 0;
    __syncwarp();
    if (digit == kDigits) return;
    if (lane == __ffs(peers) - 1) mine[digit] += __popc(peers);
    s.sorted_keys[to] = s.keys[i];
    s.sorted_rows[to] = s.rows ? s.rows[i] : static_cast<unsigned>(i);
  });
}

struct Moments {
  int64_t N, p, C;
  const char* features;
  int64_t row_bytes;
  const void* shift;
  int64_t* counts;
  double* sums;
  double* sumsq;
  void* radii;

  const unsigned* keys;  // [N] sorted
  const unsigned* rows;  // [N] in that order
  unsigned* starts;      // [C + 1] the first place of each class, and of the rows left out
  double* partials;      // [runs, 2, p + 1] of a class that came from the run before; of one that starts here
  int run;               // rows
  int team;              // threads, a power of two
};

__device__ unsigned first_place(const Moments& m, unsigned key) {
  unsigned low = 0, high = static_cast<unsigned>(m.N);
  while (low < high) {
    const unsigned middle = (low + high) / 2;
    if (m.keys[middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// One warp per class, and one for the rows left out.
__global__ void __launch_bounds__(kThreads) moments_bounds(const Moments m) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (c > m.C) return;
  const unsigned start = first_place(m, static_cast<unsigned>(c));
  if (threadIdx.x % 32 == 0) m.starts[c] = start;
  if (c == m.C) return;
  const unsigned n = first_place(m, static_cast<unsigned>(c + 1)) - start;
  if (threadIdx.x % 32 == 0) m.counts[c] = n;
  if (n != 0) return;
  for (int64_t j = threadIdx.x % 32; j < m.p; j += 32) m.sums[c * m.p + j] = 0;
  if (threadIdx.x % 32 == 0) m.sumsq[c] = 0;
}

// 16 bytes of a row, or one element, as they are in memory: nothing waits for them until they are unpacked.
template <class Stored, int kVector>
using Piece = std::conditional_t<kVector == 1, Stored, uint4>;

// Keeps four words what they are: as the elements that a tail is read by they take twice the registers.
__device__ void opaque(uint4& x) { asm("" : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)); }

// Starts to read the first `width` of kVector elements of each row; zeros for the others.
template <class Stored, int kVector>
__device__ void read_rows(Piece<Stored, kVector> (&to)[kBatch], const char* column, int64_t row_bytes,
                          const unsigned (&rows)[kBatch], int width) {
  const auto row = [&](int b) {
    return reinterpret_cast<const Stored*>(column + static_cast<int64_t>(rows[b]) * row_bytes);
  };
  if (width == kVector) {
#pragma unroll
    for (int b = 0; b < kBatch; b++) to[b] = __ldg(reinterpret_cast<const Piece<Stored, kVector>*>(row(b)));
  } else {
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      Stored x[kVector];
      for (int v = 0; v < kVector; v++) x[v] = v < width ? __ldg(row(b) + v) : Stored(0);
      memcpy(&to[b], x, sizeof(x));
    }
  }
}

// Where the sums of class c over places begin … end go, the index-th part of the order: into the result when
// that is all of the class, else into a partial result, the class being the part's first or its last.
struct Target {
  double* sums;
  double* sumsq;
};

__device__ Target target(const Moments& m, double* partials, int64_t index, int64_t begin, int64_t end,
                         unsigned c) {
  const bool continued = begin > 0 && m.keys[begin - 1] == c;
  const bool continues = end < m.starts[m.C] && m.keys[end] == c;
  if (!continued && !continues) return {m.sums + c * m.p, m.sumsq + c};
  double* partial = partials + (2 * index + (continued ? 0 : 1)) * (m.p + 1);
  return {partial, partial + m.p};
}

// Room for two blocks: left alone the compiler spills to make room for more.
template <int kDtype, int kVector>
__global__ void __launch_bounds__(kThreads, 2) moments_rows(const Moments m) {
  using E = Element<static_cast<Dtype>(kDtype)>;
  using Stored = typename E::Stored;
  using Real = typename E::Real;
  // [threads / part, run] what a warp's part of a team, or a team within a warp, adds to the rows' squares.
  __shared__ double squares[kSquares];

  const unsigned used = m.starts[m.C];
  const int teams = kThreads / m.team;
  const unsigned first_run = blockIdx.x * teams;
  if (first_run * m.run >= used) return;
  const int part = min(m.team, 32), parts = m.team / part;
  const unsigned run = first_run + threadIdx.x / m.team;
  const unsigned begin = run * m.run, end = min(begin + m.run, used);  // beyond what is used: begin > end
  double* mine = squares + threadIdx.x / part * m.run;
  const int p = static_cast<int>(m.p);
  const Real* shift = static_cast<const Real*>(m.shift);

  for (int pass = 0; pass < p; pass += m.team * kVector) {
    const int column = pass + threadIdx.x % m.team * kVector;
    const int width = max(0, min(p - column, kVector));
    const char* features = m.features + column * static_cast<int64_t>(sizeof(Stored));
    double sums[kVector];
    Real k[kVector];
    unsigned current = kNone;

    const auto flush = [&] {
      double* to = target(m, m.partials, run, begin, end, current).sums + column;
      for (int v = 0; v < kVector; v++) {
        if (v < width) to[v] = sums[v];
      }
    };

    for (int r = 0; r < m.run; r += kBatch) {
      unsigned keys[kBatch], rows[kBatch];
      Piece<Stored, kVector> pieces[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; b++) {  // beyond the run's end any row in use will do
        const unsigned place = min(begin + r + b, used - 1);
        keys[b] = m.keys[place];
        rows[b] = m.rows[place];
      }
      read_rows<Stored, kVector>(pieces, features, m.row_bytes, rows, width);
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        double square = 0;
        if (begin + r + b < end) {
          if (keys[b] != current) {
            if (current != kNone) flush();
            current = keys[b];
#pragma unroll
            for (int v = 0; v < kVector; v++) {
              k[v] = v < width ? shift[current * m.p + column + v] : Real(0);
              sums[v] = 0;
            }
          }
          Stored x[kVector];
          if constexpr (kVector > 1) opaque(pieces[b]);
          memcpy(x, &pieces[b], sizeof(x));
#pragma unroll
          for (int v = 0; v < kVector; v++) {
            const double residual = E::real(x[v]) - k[v];
            sums[v] += residual;
            square += residual * residual;
          }
        }
        for (int step = part / 2; step > 0; step /= 2) square += __shfl_xor_sync(kFull, square, step);
        if (threadIdx.x % part == 0) mine[r + b] = pass == 0 ? square : mine[r + b] + square;
      }
    }
    if (current != kNone) flush();
  }
  __syncthreads();

  for (int i = threadIdx.x; i < teams * m.run; i += kThreads) {
    const unsigned place = first_run * m.run + i;
    if (place >= used) break;
    double* of_row = squares + i / m.run * parts * m.run + i % m.run;
    double square = 0;
    for (int w = 0; w < parts; w++) square += of_row[w * m.run];
    *of_row = square;
    if (m.radii) static_cast<Real*>(m.radii)[m.rows[place]] = static_cast<Real>(sqrt(square));
  }
  __syncthreads();

  // A warp's worth of the team adds squares, each up to its row within its class; keys ascend, so that rows
  // of the same class follow each other.
  if (threadIdx.x % m.team >= part) return;
  const int lane = threadIdx.x % part;
  double carried = 0;
  unsigned carried_key = kNone;
  for (int top = 0; top < m.run; top += part) {
    const int r = top + lane;
    const bool has = r < m.run && begin + r < end;
    const unsigned key = has ? m.keys[begin + r] : kNone;
    double sum = has ? mine[r] : 0;
    for (int step = 1; step < part; step *= 2) {
      const double before = __shfl_up_sync(kFull, sum, step, part);
      const unsigned its_key = __shfl_up_sync(kFull, key, step, part);
      if (lane >= step && its_key == key) sum += before;
    }
    if (key == carried_key) sum += carried;
    if (has && (begin + r + 1 == end || m.keys[begin + r + 1] != key)) {
      *target(m, m.partials, run, begin, end, key).sumsq = sum;
    }
    carried = __shfl_sync(kFull, sum, part - 1, part);
    carried_key = __shfl_sync(kFull, key, part - 1, part);
  }
}

struct Join {
  Moments m;
  const double* from;  // [runs, 2, p + 1]
  double* to;          // [cover(runs, kGroup), 2, p + 1]
  int64_t run;         // rows, of those of `from`
};

// One warp per group of 32 runs, which are one run of the next level, and 32 columns, the last of them sumsq.
__global__ void __launch_bounds__(kThreads) moments_join(const Join j) {
  const Moments& m = j.m;
  const int lane = threadIdx.x % 32;
  const int64_t tiles = cover(m.p + 1, 32),
                of_grid = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t group = of_grid / tiles, column = of_grid % tiles * 32 + lane;
  const int64_t used = m.starts[m.C], begin = group * kGroup * j.run, end = min(begin + kGroup * j.run, used);
  if (begin >= used) return;

  // Bit i: the i-th run begins within a class; ends within one; ends within one that it began within.
  const int64_t top = begin + lane * j.run, bottom = top + j.run;
  const unsigned first = top < used ? m.keys[top] : kNone, after = bottom < used ? m.keys[bottom] : kNone;
  const unsigned heads = __ballot_sync(kFull, top > 0 && top < used && m.keys[top - 1] == first);
  const unsigned tails = __ballot_sync(kFull, bottom < used && m.keys[bottom - 1] == after);
  const unsigned through = heads & tails & __ballot_sync(kFull, first == after);

  double sum = 0;
  constexpr int kTogether = 8;
  for (int base = 0; base < kGroup; base += kTogether) {
    double head[kTogether], tail[kTogether];
#pragma unroll
    for (int b = 0; b < kTogether; b++) {
      const double* partial = j.from + 2 * (group * kGroup + base + b) * (m.p + 1) + column;
      const bool in = column <= m.p;
      head[b] = in && heads >> (base + b) & 1 ? partial[0] : 0;
      tail[b] = in && (tails & ~through) >> (base + b) & 1 ? partial[m.p + 1] : 0;
    }
#pragma unroll
    for (int b = 0; b < kTogether; b++) {
      const int i = base + b;
      const auto store = [&](unsigned c) {
        const Target to = target(m, j.to, group, begin, end, c);
        if (column <= m.p) *(column < m.p ? to.sums + column : to.sumsq) = sum;
      };
      if (heads >> i & 1) {
        sum += head[b];
        if (!(through >> i & 1)) store(__shfl_sync(kFull, first, i));
      }
      if ((tails & ~through) >> i & 1) sum = tail[b];
      if (i == kGroup - 1 && tails >> i & 1) store(__shfl_sync(kFull, after, i));
    }
  }
}

template <int kDtype, int kVector>
void add_rows(std::vector<Launch>* plan, bool aligned, int64_t grid, const Moments& m) {
  const std::string name = "moments_rowsILi" + std::to_string(kDtype) + "ELi";
  if (aligned) {
    add(plan, name + std::to_string(kVector) + "E", &moments_rows<kDtype, kVector>, grid, kThreads, m);
  } else {
    add(plan, name + "1E", &moments_rows<kDtype, 1>, grid, kThreads, m);
  }
}

// Threads per row: the power of two that leaves the fewest idle, at least a warp's worth of what there is.
int team_of(int64_t pieces) {
  int best = 1;
  while (best < pieces && best < 32) best *= 2;
  for (int team = 64; team <= kThreads; team *= 2) {
    if (cover(pieces, team) * team <= cover(pieces, best) * best) best = team;
  }
  return best;
}

int run_of(int64_t N, int team) {
  const int parts = kThreads / std::min(team, 32), teams = kThreads / team;
  const int longest = std::min(kLongestRun, kSquares / parts);
  int run = 2 * kBatch;
  while (2 * run <= longest && N / (2 * run * teams) >= kEnoughBlocks) run *= 2;
  return run;
}

struct Workspace {
  Carver carver;
  unsigned *keys[2], *rows[2], *before, *totals, *starts;
  std::vector<double*> partials;  // of each level
  int64_t tiles, runs;
  int team, run;
  int passes = 0;  // of the sort, from one side to the other

  Workspace(const ClassMoments& call, void* memory) : carver(memory) {
    while (passes == 0 || call.C >> 8 * passes != 0) passes++;
    team = team_of(cover(call.p, aligned(call) ? 16 / element_bytes(call.dtype) : 1));
    run = run_of(call.N, team);
    tiles = cover(call.N, kTile);
    runs = cover(call.N, run);
    for (int side = 0; side < 2; side++) {
      keys[side] = carver.take<unsigned>(call.N);
      rows[side] = carver.take<unsigned>(call.N);
    }
    before = carver.take<unsigned>(kDigits * tiles);
    totals = carver.take<unsigned>(kDigits);
    starts = carver.take<unsigned>(call.C + 1);
    for (int64_t n = runs; partials.empty() || n > 1; n = cover(n, kGroup)) {
      partials.push_back(carver.take<double>(n * 2 * (call.p + 1)));
    }
  }
};

}  // namespace

Carver class_moments_workspace(const ClassMoments& call) { return Workspace(call, nullptr).carver; }

ClassOrder class_moments_order(const ClassMoments& call, void* workspace) {
  const Workspace w(call, workspace);
  return {w.keys[w.passes % 2], w.rows[w.passes % 2], w.starts};
}

std::vector<Launch> class_moments_plan(const ClassMoments& call, void* workspace) {
  const Workspace w(call, workspace);
  std::vector<Launch> plan;
  const Encode encode = {call.N,          call.C,           call.labels,
                         call.label_size, call.label_bytes, call.ignore_index,
                         w.keys[0],       call.radii,       call.dtype == Dtype::float64};
  add(&plan, "moments_encode", &moments_encode, cover(call.N, kThreads), kThreads, encode);
  for (int pass = 0; pass < w.passes; pass++) {
    const int from = pass % 2, to = !from;
    const Sort sort = {call.N,     w.tiles,    8 * pass, w.keys[from], pass == 0 ? nullptr : w.rows[from],
                       w.keys[to], w.rows[to], w.before, w.totals};
    add(&plan, "digit_count", &digit_count, w.tiles, kThreads, sort);
    add(&plan, "digit_scan", &digit_scan, w.tiles == 0 ? 0 : kDigits, kThreads, sort);
    add(&plan, "digit_scatter", &digit_scatter, w.tiles, kThreads, sort);
  }
  const int side = w.passes % 2;
  const Moments m = {call.N,         call.p,        call.C,       static_cast<const char*>(call.features),
                     call.row_bytes, call.shift,    call.counts,  call.sums,
                     call.sumsq,     call.radii,    w.keys[side], w.rows[side],
                     w.starts,       w.partials[0], w.run,        w.team};
  add(&plan, "moments_bounds", &moments_bounds, cover(call.C + 1, kWarps), kThreads, m);
  const int64_t grid = cover(w.runs, kThreads / w.team);
  switch (call.dtype) {
    case Dtype::float32:
      add_rows<0, 4>(&plan, aligned(call), grid, m);
      break;
    case Dtype::float64:
      add_rows<1, 2>(&plan, aligned(call), grid, m);
      break;
    case Dtype::bfloat16:
      add_rows<2, 8>(&plan, aligned(call), grid, m);
      break;
    case Dtype::float16:
      add_rows<3, 8>(&plan, aligned(call), grid, m);
      break;
  }
  int64_t run = w.run, runs = w.runs;
  for (size_t level = 0; runs > 1; level++) {
    const bool last = level + 1 == w.partials.size();  // one group, which no class leaves
    const Join join = {m, w.partials[level], last ? nullptr : w.partials[level + 1], run};
    run *= kGroup;
    runs = cover(runs, kGroup);
    add(&plan, "moments_join", &moments_join, cover(runs * cover(call.p + 1, 32), kWarps), kThreads, join);
  }
  return plan;
}

}  // namespace ncfast

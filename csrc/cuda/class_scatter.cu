#include <cuda_bf16.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/block.cuh"
#include "cuda/class_scatter.h"
#include "cuda/element.cuh"

namespace ncfast {
namespace {

constexpr int kSide = 128;            // columns of a tile of the scatter
constexpr int kRows = 32;             // of features at a time: a lane of a warp for each
constexpr int kFlush = 2048 / kRows;  // tiles of rows whose products float32 adds
constexpr int kPitch = kSide + 8;  // of a plane: the rows that ldmatrix reads together lie in different banks
constexpr int kColumns = 4;        // that a thread centres
constexpr int kTallest = 64, kWidest = 32;       // a warp's part of a tile: rows and columns of the scatter
constexpr int kCells = kTallest * kWidest / 32;  // of a tile in a thread's registers
constexpr int64_t kBlocks = 528;                 // two rounds of two blocks on each of 132 multiprocessors

static_assert(kRows == 32 && kSide == 32 * kColumns && kSide * kSide == kCells * kThreads);

using bfloat16 = __nv_bfloat16;
using Plane = bfloat16[kRows][kPitch];

struct Scatter {
  int64_t p, C;
  const char* features;
  int64_t row_bytes;
  const float* shift;
  ClassOrder order;
  double* work;     // [splits, pairs, cells, threads]
  double* squares;  // [splits, warps, blocks · side] of the columns
  double* scatter;
  int64_t blocks, pairs, splits;
};

struct Pair {
  int I, J;
};

// threadIdx.x, opaque: what is computed from it is computed again wherever it is needed. Registers are short.
__device__ int fresh_thread() {
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread;
}

// The pair-th of (0, 0), (1, 0), (1, 1), (2, 0), …
__device__ Pair pair_of(int pair) {
  int I = static_cast<int>((sqrt(8.0 * pair + 1) - 1) / 2);
  while (I * (I + 1) / 2 > pair) I--;
  while ((I + 1) * (I + 2) / 2 <= pair) I++;
  return {I, pair - I * (I + 1) / 2};
}

// Where lane and register `cell` of a warp's part of a tile are in the tile: the layout of mma's sums.
struct Cell {
  int i, j;
};

__device__ Cell cell_of(int cell) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int m = cell / 16, n = cell / 4 % 4, half = cell / 2 % 2;
  return {warp / 4 * kTallest + m * 16 + half * 8 + lane / 4,
          warp % 4 * kWidest + n * 8 + lane % 4 * 2 + cell % 2};
}

__device__ unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

// Starts to copy the first `bytes` of kBytes, zeros for the others. (__pipeline_memcpy_async branches on
// their number.)
template <int kBytes>
__device__ void copy_async(void* to, const void* from, int bytes) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from),
                 "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}

// Four 8×8 matrices, transposed: lane l gives the address of row l % 8 of matrix l / 8.
__device__ void load_transposed(unsigned (&to)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}

__device__ void multiply_add(float* sum, const unsigned (&left)[4], const unsigned* right) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

// A warp's part of Σ leftᵀ right over the rows of a tile: the products of planes a and b with a + b <
// kPlanes.
template <int kPlanes>
__device__ void multiply(float (&sums)[kCells], const Plane* left, const Plane* right) {
  const int thread = fresh_thread(), lane = thread % 32, warp = thread / 32;
  const auto address = [](const Plane* plane, int row, int column) {
    return shared_address(&(*plane)[row][column]);
  };
  const unsigned of_left = address(left, lane / 16 * 8 + lane % 8, warp / 4 * kTallest + lane / 8 % 2 * 8);
  const unsigned of_right = address(right, lane / 8 % 2 * 8 + lane % 8, warp % 4 * kWidest + lane / 16 * 8);
  const auto offset = [](int plane, int row, int column) {
    return ((plane * kRows + row) * kPitch + column) * static_cast<int>(sizeof(bfloat16));
  };
#pragma unroll 1
  for (int k = 0; k < kRows; k += 16) {
#pragma unroll
    for (int b = kPlanes - 1; b >= 0; b--) {
      unsigned r[2][4];
#pragma unroll
      for (int n = 0; n < 2; n++) load_transposed(r[n], of_right + offset(b, k, 16 * n));
#pragma unroll
      for (int a = kPlanes - 1 - b; a >= 0; a--) {
#pragma unroll
        for (int m = 0; m < 4; m++) {
          unsigned l[4];
          load_transposed(l, of_left + offset(a, k, 16 * m));
#pragma unroll
          for (int n = 0; n < 4; n++) multiply_add(sums + 16 * m + 4 * n, l, r[n / 2] + n % 2 * 2);
        }
      }
    }
  }
}

template <int kDtype, int kVector, int kPlanes>
__global__ void __launch_bounds__(kThreads, kPlanes == 3 ? 1 : 2) scatter_pairs(const Scatter s) {
  using E = Element<static_cast<Dtype>(kDtype)>;
  using Stored = typename E::Stored;
  using Tile = Stored[kRows][kSide];
  extern __shared__ uint4 shared[];
  Plane* planes = reinterpret_cast<Plane*>(shared);                           // [sides, kPlanes]
  Tile* fetched = reinterpret_cast<Tile*>(planes + 2 * kPlanes);              // [stages, sides]
  float (*squares)[kSide] = reinterpret_cast<float (*)[kSide]>(fetched + 4);  // [warps] of the columns, added

  const Pair pair = pair_of(blockIdx.x % static_cast<unsigned>(s.pairs));
  const bool diagonal = pair.I == pair.J;
  int tile, end;
  unsigned last;  // place of a row in use, one beyond
  {
    const unsigned used = s.order.starts[s.C], split = blockIdx.x / static_cast<unsigned>(s.pairs);
    const int64_t tiles = cover(used, kRows);
    tile = static_cast<int>(tiles * split / s.splits);
    end = static_cast<int>(tiles * (split + 1) / s.splits);
    last = min(used, static_cast<unsigned>(end) * kRows);
  }
  bool first = true;

  // Of the order's keys or rows, this lane's in a tile.
  const auto listed = [&](const unsigned* list, int tile) {
    const unsigned place = static_cast<unsigned>(tile) * kRows + threadIdx.x % 32;
    return place < last ? list[place] : kNone;
  };

  const auto fetch = [&](int tile, unsigned rows) {
    constexpr int kPieces = kSide / kVector, kTogether = kThreads / kPieces;
    constexpr int kBytes = kVector * static_cast<int>(sizeof(Stored));
    const int thread = fresh_thread(), piece = thread % kPieces * kVector;
#pragma unroll 1
    for (int side = 0; side < (diagonal ? 1 : 2); side++) {
      const int column = (side == 0 ? pair.I : pair.J) * kSide + piece;
      const int width = max(0, min(static_cast<int>(s.p) - column, kVector));
      Tile& to = fetched[tile % 2 * 2 + side];
#pragma unroll 4
      for (int top = 0; top < kRows; top += kTogether) {
        const int r = top + thread / kPieces;
        const unsigned row = __shfl_sync(kFull, rows, r);
        const int bytes = row == kNone ? 0 : width * static_cast<int>(sizeof(Stored));
        const char* from = s.features;
        if (bytes != 0) from += row * s.row_bytes + column * sizeof(Stored);
        if constexpr (kBytes >= 4) {
          copy_async<kBytes>(&to[r][piece], from, bytes);
        } else {  // narrower than cp.async
          to[r][piece] = bytes == 0 ? Stored(0) : *reinterpret_cast<const Stored*>(from);
        }
      }
    }
    asm volatile("cp.async.commit_group;");
  };

  // A warp centres some rows of one side, a lane the same columns of each.
  const auto centre = [&](int tile, unsigned keys) {
    const int thread = fresh_thread(), lane = thread % 32, warp = thread / 32;
    const int side = diagonal ? 0 : warp / 4;
    const int height = diagonal ? kRows / kWarps : kRows / 4;
    const int top = diagonal ? warp * height : warp % 4 * height;
    const int column = (side == 0 ? pair.I : pair.J) * kSide + lane * kColumns;
    const Tile& from = fetched[tile % 2 * 2 + side];
    unsigned current = kNone;
    float k[kColumns] = {}, added[kColumns] = {};
#pragma unroll 2
    for (int r = top; r < top + height; r++) {
      const unsigned key = __shfl_sync(kFull, keys, r);
      if (key != current) {
        current = key;
#pragma unroll
        for (int v = 0; v < kColumns; v++) {
          k[v] = key != kNone && column + v < s.p ? __ldg(s.shift + key * s.p + column + v) : 0;
        }
      }
      struct alignas(kColumns * sizeof(Stored)) Piece {
        Stored x[kColumns];
      } piece = *reinterpret_cast<const Piece*>(&from[r][lane * kColumns]);
      float rest[kColumns];
#pragma unroll
      for (int v = 0; v < kColumns; v++) {
        rest[v] = E::real(piece.x[v]) - k[v];
        added[v] += rest[v] * rest[v];
      }
#pragma unroll
      for (int plane = 0; plane < kPlanes; plane++) {
        __nv_bfloat162 rounded[kColumns / 2];
#pragma unroll
        for (int v = 0; v < kColumns; v += 2) {
          rounded[v / 2] = __floats2bfloat162_rn(rest[v], rest[v + 1]);
          rest[v] -= __low2float(rounded[v / 2]);
          rest[v + 1] -= __high2float(rounded[v / 2]);
        }
        memcpy(&planes[side * kPlanes + plane][r][lane * kColumns], rounded, sizeof(rounded));
      }
    }
#pragma unroll
    for (int v = 0; v < kColumns; v++) squares[warp][lane * kColumns + v] += added[v];
  };

  for (int column = threadIdx.x % 32; column < kSide; column += 32) squares[threadIdx.x / 32][column] = 0;
  fetch(tile, listed(s.order.rows, tile));
  unsigned rows = listed(s.order.rows, tile + 1), keys = listed(s.order.keys, tile);
  do {  // at least once: the workspace is not zeroed
    const int until = min(tile + kFlush, end);
    float sums[kCells] = {};
    for (; tile < until; tile++) {
      fetch(tile + 1, rows);
      rows = listed(s.order.rows, tile + 2);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      __syncthreads();  // this tile is there, and the planes of the one before are multiplied
      centre(tile, keys);
      keys = listed(s.order.keys, tile + 1);
      __syncthreads();
      multiply<kPlanes>(sums, planes, planes + (diagonal ? 0 : kPlanes));
    }
    const int thread = fresh_thread(), lane = thread % 32, warp = thread / 32;
    const int64_t part = blockIdx.x / static_cast<unsigned>(s.pairs) * kWarps + warp;
    double* of_warp = s.squares + (part * s.blocks + pair.I) * kSide;
    for (int column = lane; column < kSide; column += 32) {
      if (diagonal) of_warp[column] = squares[warp][column] + (first ? 0 : of_warp[column]);
      squares[warp][column] = 0;
    }
    double* work = s.work + static_cast<int64_t>(blockIdx.x) * kCells * kThreads + thread;
#pragma unroll
    for (int cell = 0; cell < kCells; cell++) {
      asm volatile("" : "+f"(sums[cell])::"memory");  // one by one: all of them in float64 would spill
      work[cell * kThreads] = sums[cell] + (first ? 0 : work[cell * kThreads]);
    }
    first = false;
  } while (tile < end);
  asm volatile("cp.async.wait_group 0;");  // the zeros beyond the last tile
}

// One block per pair and cell, one thread per cell of the scatter and its mirror image.
__global__ void __launch_bounds__(kThreads) scatter_reduce(const Scatter s) {
  const Pair pair = pair_of(blockIdx.x / kCells);
  const Cell cell = cell_of(blockIdx.x % kCells);
  const int64_t i = int64_t{pair.I} * kSide + cell.i, j = int64_t{pair.J} * kSide + cell.j;
  if (i >= s.p || j > i) return;
  double sum = 0;
  if (i == j) {
    for (int64_t part = 0; part < s.splits * kWarps; part++) sum += s.squares[part * s.blocks * kSide + i];
  } else {
    const double* of_split = s.work + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t step = s.pairs * kCells * kThreads;
    for (int64_t split = 0; split < s.splits; split++) sum += of_split[split * step];
  }
  s.scatter[i * s.p + j] = sum;
  s.scatter[j * s.p + i] = sum;
}

template <int kDtype, int kVector, int kPlanes>
void add_pairs(std::vector<Launch>* plan, const Scatter& s) {
  const std::string name = "scatter_pairsILi" + std::to_string(kDtype) + "ELi" + std::to_string(kVector) +
                           "ELi" + std::to_string(kPlanes) + "E";
  add(plan, name, &scatter_pairs<kDtype, kVector, kPlanes>, s.pairs * s.splits, kThreads, s,
      class_scatter_shared(static_cast<Dtype>(kDtype), kPlanes));
}

template <int kDtype, int kVector>
void add_pairs(std::vector<Launch>* plan, int planes, const Scatter& s) {
  if (planes == 1) add_pairs<kDtype, kVector, 1>(plan, s);
  if (planes == 2) add_pairs<kDtype, kVector, 2>(plan, s);
  if (planes == 3) add_pairs<kDtype, kVector, 3>(plan, s);
}

template <int kDtype>
void add_pairs(std::vector<Launch>* plan, bool aligned, int planes, const Scatter& s) {
  constexpr int kVector = 16 / element_bytes(static_cast<Dtype>(kDtype));
  if (aligned) {
    add_pairs<kDtype, kVector>(plan, planes, s);
  } else {
    add_pairs<kDtype, 1>(plan, planes, s);
  }
}

Scatter carve(const ClassScatter& call, Carver* workspace) {
  const ClassMoments& m = call.moments;
  void* of_moments = workspace->take<char>(class_moments_workspace(m).used());
  Scatter s = {};
  s.p = m.p;
  s.C = m.C;
  s.features = static_cast<const char*>(m.features);
  s.row_bytes = m.row_bytes;
  s.shift = static_cast<const float*>(m.shift);
  s.order = class_moments_order(m, of_moments);
  s.scatter = call.scatter;
  s.blocks = cover(m.p, kSide);
  s.pairs = s.blocks * (s.blocks + 1) / 2;
  s.splits = std::max(int64_t{1}, std::min(kBlocks / s.pairs, m.N / (8 * kRows)));
  s.work = workspace->take<double>(s.splits * s.pairs * kCells * kThreads);
  s.squares = workspace->take<double>(s.splits * kWarps * s.blocks * kSide);
  return s;
}

}  // namespace

int class_scatter_shared(Dtype dtype, int planes) {
  return 2 * planes * static_cast<int>(sizeof(Plane)) + 4 * kRows * kSide * element_bytes(dtype) +
         static_cast<int>(sizeof(float[kWarps][kSide]));
}

Carver class_scatter_workspace(const ClassScatter& call) {
  Carver nothing(nullptr);
  carve(call, &nothing);
  return nothing;
}

std::vector<Launch> class_scatter_plan(const ClassScatter& call, void* workspace) {
  Carver carver(workspace);
  const Scatter s = carve(call, &carver);
  std::vector<Launch> plan = class_moments_plan(call.moments, workspace);
  switch (call.moments.dtype) {
    case Dtype::float32:
      add_pairs<0>(&plan, aligned(call.moments), call.planes, s);
      break;
    case Dtype::bfloat16:
      add_pairs<2>(&plan, aligned(call.moments), call.planes, s);
      break;
    case Dtype::float16:
      add_pairs<3>(&plan, aligned(call.moments), call.planes, s);
      break;
    case Dtype::float64:
      throw std::invalid_argument("class_scatter has no float64 products");
  }
  add(&plan, "scatter_reduce", &scatter_reduce, s.pairs * kCells, kThreads, s);
  return plan;
}

}  // namespace ncfast

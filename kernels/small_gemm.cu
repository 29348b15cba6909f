// Products of small float32 matrices, with what follows them in the same launch.
//
//   y = x w            x is (rows, inner), w (inner, columns), y (rows, columns)
//   y += bias          a row for all rows
//   y = max(y, 0)      NaN kept
//   y = 0              where not gate > 0
//   sums = ones x w    the sums of w over its rows, as one more row of x would give them
//
// where bias, gate and sums may be null. At such sizes a library's large tiles leave most
// multiprocessors idle, and each launch after it costs as much as the product.
//
// A block makes a tile of y, SIDE x SIDE, of which a thread holds EACH x EACH values. Its threads
// are divided into slices, each with the whole tile for a part of the inner index, for a small tile
// has fewer values than a multiprocessor needs threads. What the slices hold is added up in shared
// memory. The grid may cut the inner index too (gridDim.z > 1): then the blocks' tiles go to
// `partial`, and a second launch adds them up. All in a fixed order: the same bits at every run.
//
// Operands are read where they lie. ALONG: neighbours in memory follow the inner index, as in rows
// of x; else they go across it, as in rows of w. Both are dense. 16 bytes are moved at once where a
// matrix's base and rows are multiples of that (kPackedX and so on, in `packed`).
#include "common.cuh"

constexpr int kThreads = 256;
constexpr int kWidth = 4;  // floats in 16 bytes
constexpr int kPackedX = 1, kPackedW = 2, kPackedY = 4;

template <int SIDE, int EACH> struct Tile {
  static constexpr int kAcross = SIDE / EACH;            // threads along a side
  static constexpr int kLanes = kAcross * kAcross;       // of a slice
  static constexpr int kSlices = kThreads / kLanes;
  static constexpr int kDepth = 2048 / SIDE;             // of the inner index, staged at once
  // a row 4 floats longer: then its columns lie in different banks, and 16 bytes stay aligned
  using Stage = float[kDepth][SIDE + kWidth];
  struct Stages {
    Stage x[2], w[2];  // one is read while the other is written
  };
  union alignas(16) Shared {
    Stages stages;
    float sums[kSlices / 2][EACH * EACH][kLanes];
  };
};

// A stage of one operand, on its way from global memory to shared.
template <int SIDE, int EACH, bool ALONG> struct Part {
  using Shape = Tile<SIDE, EACH>;
  static constexpr int kPacks = SIDE * Shape::kDepth / kWidth / kThreads;
  Pack<float, kWidth> held[kPacks];

  // Where in the stage pack p lies. Along: four threads read 64 bytes of a row, and a warp writes
  // eight columns, so that neither reads nor banks are wasted.
  __device__ static int outer(int p) {
    return ALONG ? p / 4 % SIDE : p % (SIDE / kWidth) * kWidth;
  }
  __device__ static int inner(int p) {
    return ALONG ? (p / (4 * SIDE) * 4 + p % 4) * kWidth : p / (SIDE / kWidth);
  }

  // From position (first, begin); what lies beyond `outers` or `end` is 0, but 1 in an outer row
  // `ones`, where one is asked for.
  __device__ void fetch(const float *matrix, int first, int begin, int outers, int length, int end,
                        bool packed, bool ones) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int p = i * kThreads + threadIdx.x, o = first + outer(p), k = begin + inner(p);
      const int room = ALONG ? (o < outers ? end - k : 0) : (k < end ? outers - o : 0);
      const float *at = matrix + (ALONG ? index_t(o) * length + k : index_t(k) * outers + o);
      if (packed && room >= kWidth) {
        held[i] = load<kWidth>(at, 0);
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) held[i].at[j] = j < room ? at[j] : 0.0f;
      }
      if (!ones) continue;
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        if (ALONG ? o == outers && k + j < end : o + j == outers && k < end) held[i].at[j] = 1.0f;
    }
  }

  __device__ void put(typename Shape::Stage &stage) const {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int p = i * kThreads + threadIdx.x, o = outer(p), k = inner(p);
      if (ALONG) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) stage[k + j][o] = held[i].at[j];
      } else {
        store<kWidth>(&stage[k][o], 0, held[i]);
      }
    }
  }
};

// Where results go, and what is done to them on the way.
struct Output {
  float *y;
  const float *bias, *gate;
  float *sums;
  int relu, rows, columns;
  bool packed;  // whether neighbours may move at once

  // N neighbours of row r, from column c on; those beyond the last column are dropped. Row `rows` is
  // that of the sums.
  template <int N> __device__ void put(int r, int c, Pack<float, N> v) const {
    const index_t first = index_t(r) * columns + c;
    const bool whole = packed && columns - c >= N, plain = r < rows;
    if (!plain && (r > rows || !sums)) return;
    float *const to = plain ? y + first : sums + c;
    Pack<float, N> open = {};
    if (plain && gate && whole) open = load<N>(gate + first, 0);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (c + j >= columns) break;
      if (plain && bias) v.at[j] += bias[c + j];
      if (plain && relu && v.at[j] < 0.0f) v.at[j] = 0.0f;
      if (plain && gate && !((whole ? open.at[j] : gate[first + j]) > 0.0f)) v.at[j] = 0.0f;
      if (!whole) to[j] = v.at[j];
    }
    if (whole) store<N>(to, 0, v);
  }
};

// gridDim = (tiles across, tiles down, parts of `chunk` of the inner index).
template <int SIDE, int EACH, bool X_ALONG, bool W_ALONG>
__global__ void __launch_bounds__(kThreads)
    tapegrad_small_gemm(const float *__restrict__ x, const float *__restrict__ w, float *y,
                        const float *bias, const float *gate, float *sums, float *partial, int rows,
                        int columns, int inner, int chunk, int relu, int packed) {
  using Shape = Tile<SIDE, EACH>;
  // Of a thread's values four neighbours lie together, and the next four a whole round of threads
  // further: so a warp reads neighbouring banks.
  constexpr int kGroups = EACH / kWidth, kRound = Shape::kAcross * kWidth;
  __shared__ typename Shape::Shared shared;
  const int lane = threadIdx.x % Shape::kLanes, slice = threadIdx.x / Shape::kLanes;
  const int across = lane % Shape::kAcross * kWidth, down = lane / Shape::kAcross * kWidth;
  const int row = blockIdx.y * SIDE, column = blockIdx.x * SIDE, begin = blockIdx.z * chunk;
  const int end = inner - begin < chunk ? inner : begin + chunk;

  Part<SIDE, EACH, X_ALONG> of_x;
  Part<SIDE, EACH, W_ALONG> of_w;
  const auto fetch = [&](int k) {
    of_x.fetch(x, row, k, rows, inner, end, packed & kPackedX, sums);
    of_w.fetch(w, column, k, columns, inner, end, packed & kPackedW, false);
  };
  const auto put = [&](int stage) {
    of_x.put(shared.stages.x[stage]);
    of_w.put(shared.stages.w[stage]);
    __syncthreads();
  };
  float total[EACH][EACH] = {};
  fetch(begin);
  put(0);
  for (int k = begin, stage = 0;; k += Shape::kDepth, stage ^= 1) {
    const bool more = end - k > Shape::kDepth;
    if (more) fetch(k + Shape::kDepth);  // on its way while this stage is multiplied
#pragma unroll
    for (int d = 0; d < Shape::kDepth; d += Shape::kSlices) {
      Pack<float, kWidth> a[kGroups], b[kGroups];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        a[g] = load<kWidth>(&shared.stages.x[stage][d + slice][g * kRound + down], 0);
        b[g] = load<kWidth>(&shared.stages.w[stage][d + slice][g * kRound + across], 0);
      }
#pragma unroll
      for (int i = 0; i < EACH; ++i)
#pragma unroll
        for (int j = 0; j < EACH; ++j)
          total[i][j] += a[i / kWidth].at[i % kWidth] * b[j / kWidth].at[j % kWidth];
    }
    if (!more) break;
    put(stage ^ 1);
  }

  // The slices' sums, halved again and again; they take the place of the stages.
  for (int half = Shape::kSlices / 2; half > 0; half /= 2) {
    __syncthreads();
    if (slice >= half && slice < 2 * half)
#pragma unroll
      for (int i = 0; i < EACH * EACH; ++i)
        shared.sums[slice - half][i][lane] = total[i / EACH][i % EACH];
    __syncthreads();
    if (slice < half)
#pragma unroll
      for (int i = 0; i < EACH * EACH; ++i)
        total[i / EACH][i % EACH] += shared.sums[slice][i][lane];
  }
  if (slice > 0) return;

  Output to = {y, bias, gate, sums, relu, rows, columns, (packed & kPackedY) != 0};
  if (gridDim.z > 1) {  // the row of sums, if there is one, is one of the part's
    const int height = rows + (sums != nullptr);
    partial += index_t(blockIdx.z) * height * columns;
    to = {partial, nullptr, nullptr, nullptr, 0, height, columns, to.packed};
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i)
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      Pack<float, kWidth> v;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) v.at[j] = total[i][g * kWidth + j];
      to.put(row + i / kWidth * kRound + down + i % kWidth, column + g * kRound + across, v);
    }
}

// What `parts` parts of the inner index have left in `partial`, added up; N neighbours a thread.
// gridDim = (tiles of packs of columns, any number of blocks that share the rows).
template <int N>
__global__ void __launch_bounds__(kThreads)
    tapegrad_small_gemm_sum(const float *__restrict__ partial, float *y, const float *bias,
                            const float *gate, float *sums, int parts, int rows, int columns,
                            int relu) {
  const Output to = {y, bias, gate, sums, relu, rows, columns, true};
  const int packs = columns / N, c = blockIdx.x * blockDim.x + threadIdx.x;
  const int height = rows + (sums != nullptr);
  if (c >= packs) return;
  for (int r = blockIdx.y * blockDim.y + threadIdx.y; r < height; r += gridDim.y * blockDim.y) {
    Pack<float, N> total = {};
#pragma unroll 4
    for (int part = 0; part < parts; ++part) {
      const Pack<float, N> v = load<N>(partial, (index_t(part) * height + r) * packs + c);
#pragma unroll
      for (int j = 0; j < N; ++j) total.at[j] += v.at[j];
    }
    to.put(r, c * N, total);
  }
}

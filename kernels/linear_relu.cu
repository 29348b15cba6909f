// Bias and ReLU after a GEMM, and the gradient of both together with the bias's own.
//
// T is float, double, __half or __nv_bfloat16; N = 16 / sizeof(T), or 1 where a row of `columns`
// values or a base address is no multiple of 16 bytes.
//
// All of them: one thread owns N neighbouring columns and walks down the rows, so that a bias is
// loaded once and no index is divided. blockDim = (lanes across, lanes down) of kThreads in all.
#include "common.cuh"

constexpr int kThreads = 256;  // enough for full occupancy, few enough for small layers to spread

// y[r, c] = max(y[r, c] + bias[c], 0) in place, NaN kept.
// gridDim = (tiles of columns, any number of blocks that share the rows).
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    tapegrad_bias_relu(T *y, const T *bias, index_t rows, int columns) {
  using A = accumulator_t<T>;
  const int packs = columns / N, c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= packs) return;
  const Pack<T, N> b = load<N>(bias, c);
  const index_t step = index_t(gridDim.y) * blockDim.y;
  for (index_t r = index_t(blockIdx.y) * blockDim.y + threadIdx.y; r < rows; r += step) {
    Pack<T, N> v = load<N>(y, r * packs + c);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A z = A(v.at[i]) + A(b.at[i]);
      v.at[i] = T(z < A(0) ? A(0) : z);
    }
    store<N>(y, r * packs + c, v);
  }
}

// The sum over the lanes down a block, in their order; only lane 0's is right.
template <typename A, int N>
__device__ void sum_down(A (&total)[N]) {
  __shared__ Pack<A, N> shared[kThreads];
  Pack<A, N> &own = shared[threadIdx.y * blockDim.x + threadIdx.x];
#pragma unroll
  for (int i = 0; i < N; ++i) own.at[i] = total[i];
  __syncthreads();
  if (threadIdx.y == 0)
    for (int lane = 1; lane < blockDim.y; ++lane)
#pragma unroll
      for (int i = 0; i < N; ++i) total[i] += shared[lane * blockDim.x + threadIdx.x].at[i];
}

// gz[r, c] = g[r, c] where y[r, c] > 0, else 0. Block (t, k) also sums the columns of tile t over
// the rows [k * chunk, (k + 1) * chunk): into gb where it is the only such block, else into row k
// of `partial`, for tapegrad_sum_partials. No atomics: the same bits at every run.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    tapegrad_linear_relu_grad(const T *__restrict__ g, const T *__restrict__ y, T *__restrict__ gz,
                              T *__restrict__ gb, accumulator_t<T> *__restrict__ partial,
                              index_t rows, int columns, index_t chunk) {
  using A = accumulator_t<T>;
  const int packs = columns / N, c = blockIdx.x * blockDim.x + threadIdx.x;
  const index_t begin = blockIdx.y * chunk, end = begin + chunk < rows ? begin + chunk : rows;
  A total[N] = {};
  if (c < packs) {
#pragma unroll 2
    for (index_t r = begin + threadIdx.y; r < end; r += blockDim.y) {
      Pack<T, N> v = load<N>(g, r * packs + c);
      const Pack<T, N> gate = load<N>(y, r * packs + c);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (!(A(gate.at[i]) > A(0))) v.at[i] = T(A(0));
        total[i] += A(v.at[i]);
      }
      store<N>(gz, r * packs + c, v);
    }
  }
  sum_down(total);
  if (threadIdx.y != 0 || c >= packs) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (gridDim.y == 1)
      gb[c * N + i] = T(total[i]);
    else
      partial[index_t(blockIdx.y) * columns + c * N + i] = total[i];
  }
}

// gb[c] = sum over k of partial[k, c], in a fixed order. gridDim = (tiles of columns).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    tapegrad_sum_partials(const accumulator_t<T> *partial, T *gb, int chunks, int columns) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  accumulator_t<T> total[1] = {};
  if (c < columns) {
#pragma unroll 4
    for (int k = threadIdx.y; k < chunks; k += blockDim.y)
      total[0] += partial[index_t(k) * columns + c];
  }
  sum_down(total);
  if (threadIdx.y == 0 && c < columns) gb[c] = T(total[0]);
}

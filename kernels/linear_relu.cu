// Bias and ReLU after a GEMM, and the gradient of both together with the bias's own.
//
// T is float, double, __half or __nv_bfloat16; N = 16 / sizeof(T), or 1 where a row of `columns`
// values or a base address is no multiple of 16 bytes.
#include "common.cuh"
#include "columns.cuh"

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

// gz[r, c] = g[r, c] where y[r, c] > 0, else 0. Block (t, k) also sums the columns of tile t over
// the rows [k * chunk, (k + 1) * chunk): into gb where it is the only such block, else into row k
// of `partial`.
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
  keep_sum(total, gb, partial, columns);
}

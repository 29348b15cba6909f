// Kernels whose threads walk down the columns of a matrix, and sums over its rows.
//
// One thread owns N neighbouring columns and walks down the rows, so that a bias is loaded once and
// no index is divided. blockDim = (lanes across, lanes down) of kThreads in all.

constexpr int kThreads = 256;  // enough for full occupancy, few enough for small layers to spread

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

// The same, put away: into `out` where this block has seen every row, else into its row of
// `partial`, for tapegrad_sum_partials. No atomics: the same bits at every run.
template <typename T, typename A, int N>
__device__ void keep_sum(A (&total)[N], T *out, A *partial, int columns) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  sum_down(total);
  if (threadIdx.y != 0 || c >= columns / N) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (gridDim.y == 1)
      out[c * N + i] = T(total[i]);
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

// The norm of all gradients together, and the factor that it and a scaled loss ask for.
//
// T is float, double, __half or __nv_bfloat16; N = 16 / sizeof(T), or 1 where an address is no multiple of 16 bytes. Two
// launches, the first for each array, without atomics: the same bits at every run.
#include "common.cuh"

constexpr int kThreads = 256;

// The sum of v over the block's threads, in a fixed order; only the first one's is right.
__device__ double sum_of_block(double v) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = v;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[threadIdx.x];
}

// In double: the square of a float overflows from 2e19.
template <typename T> __device__ double square(T v) {
  const double wide = double(accumulator_t<T>(v));
  return wide * wide;
}

// partial[block] = the sum of the squares of the elements that a block sees.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    tapegrad_sum_of_squares(const T *g, double *partial, index_t count) {
  const index_t start = index_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const index_t step = index_t(gridDim.x) * blockDim.x;
  double sum = 0;
  for (index_t i = start; i < count / N; i += step) {
    const Pack<T, N> pack = load<N>(g, i);
#pragma unroll
    for (int k = 0; k < N; ++k) sum += square(pack.at[k]);
  }
  for (index_t i = count / N * N + start; i < count; i += step) sum += square(g[i]);
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// factor = min(1, limit / norm) / scale, where norm is that of the gradients divided by scale: NaN
// for an infinite one, of which limit / norm would make a small step. One block; limit and scale
// may be null: none, and 1.
extern "C" __global__ void __launch_bounds__(kThreads)
    tapegrad_gradient_factor(double *factor, const double *partial, int partials,
                             const double *limit, const double *scale) {
  double sum = 0;
  for (int i = threadIdx.x; i < partials; i += blockDim.x) sum += partial[i];
  sum = sum_of_block(sum);
  if (threadIdx.x != 0) return;
  const double by = scale ? 1.0 / *scale : 1.0, norm = sqrt(sum) * by;
  const double infinite = norm - norm;  // 0, or NaN
  *factor = (!limit || norm <= *limit ? 1.0 : *limit / norm) * by + infinite;
}

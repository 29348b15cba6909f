// Rows of `values` added up by their index: the gradient of a gather, without atomics.
//
// T is float, double, __half or __nv_bfloat16. `order` is a stable argsort of `index`, so that
// equal indices are neighbours in it. The thread at the first of them, one for each column, adds
// the others in their order: the bits of a loop over the rows, at every run.
// blockDim = (columns, positions); gridDim = (tiles of columns, any number of blocks).
#include "common.cuh"

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    tapegrad_scatter_add(const T *__restrict__ values, const index_t *__restrict__ index,
                         const index_t *__restrict__ order, T *__restrict__ out, index_t count,
                         int columns) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= columns) return;
  const index_t step = index_t(gridDim.y) * blockDim.y;
  for (index_t i = index_t(blockIdx.y) * blockDim.y + threadIdx.y; i < count; i += step) {
    const index_t row = index[order[i]];
    if (i > 0 && index[order[i - 1]] == row) continue;
    accumulator_t<T> sum = 0;
    for (index_t k = i; k < count && index[order[k]] == row; ++k)
      sum += accumulator_t<T>(values[order[k] * columns + c]);
    out[row * columns + c] = T(sum);
  }
}

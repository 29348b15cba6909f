// Rows of `values` added up by their index: the gradient of a gather, without atomics.
//
// Equal entries of the index are linked (see links.cu). The thread at the first of them, one for each
// column, adds the others in their order: the bits of a loop over the rows, at every run.
#include "common.cuh"

constexpr int kThreads = 256;

// T is float, double, __half or __nv_bfloat16.
// blockDim = (columns, positions); gridDim = (tiles of columns, any number of blocks).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    tapegrad_scatter_add(const T *__restrict__ values, const index_t *__restrict__ index,
                         const index_t *__restrict__ link, T *__restrict__ out, index_t count,
                         int columns) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= columns) return;
  const index_t step = index_t(gridDim.y) * blockDim.y;
  for (index_t i = index_t(blockIdx.y) * blockDim.y + threadIdx.y; i < count; i += step) {
    if (link[i] < 0) continue;
    accumulator_t<T> sum = 0;
    for (index_t k = i; k < count; k = link[k] < 0 ? -link[k] : link[k])
      sum += accumulator_t<T>(values[k * columns + c]);
    out[index[i] * columns + c] = T(sum);
  }
}

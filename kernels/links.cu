// Which entries of an index are equal: for each the next one.
//
// link[i] says where the next entry stands that is equal to index[i], `count` where there is none, and
// is negative unless i is the first of them. (Nothing comes before entry 0, so no link is 0 and the
// sign always shows.)
#include "common.cuh"

constexpr int kThreads = 256;

// By looking at every pair. gridDim = (blocks for all entries).
__global__ void __launch_bounds__(kThreads)
    tapegrad_links(const index_t *__restrict__ index, index_t *__restrict__ link, index_t count) {
  __shared__ index_t tile[kThreads];
  const index_t i = index_t(blockIdx.x) * kThreads + threadIdx.x;
  const index_t mine = i < count ? index[i] : 0;
  bool first = true;
  index_t next = count;
  for (index_t start = 0; start < count; start += kThreads) {
    const index_t rest = count - start, length = rest < kThreads ? rest : kThreads;
    __syncthreads();
    if (threadIdx.x < length) tile[threadIdx.x] = index[start + threadIdx.x];
    __syncthreads();
    for (index_t k = 0; k < length; ++k) {
      if (tile[k] != mine) continue;
      first = first && start + k >= i;
      if (start + k > i && next == count) next = start + k;
    }
  }
  if (i < count) link[i] = first ? next : -next;
}

// By `order`, a stable argsort of the index, in which equal entries are neighbours.
// gridDim = (any number of blocks).
__global__ void __launch_bounds__(kThreads)
    tapegrad_sorted_links(const index_t *__restrict__ index, const index_t *__restrict__ order,
                          index_t *__restrict__ link, index_t count) {
  const index_t step = index_t(gridDim.x) * blockDim.x;
  for (index_t p = index_t(blockIdx.x) * blockDim.x + threadIdx.x; p < count; p += step) {
    const index_t i = order[p], mine = index[i];
    const bool first = p == 0 || index[order[p - 1]] != mine;
    const index_t next = p + 1 < count && index[order[p + 1]] == mine ? order[p + 1] : count;
    link[i] = first ? next : -next;
  }
}

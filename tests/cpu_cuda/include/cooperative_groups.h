// Grid- and block-wide barriers of cooperative groups. Launch with resident=0: all
// blocks in flight.
#pragma once
#include "cuda_shim.h"
namespace cooperative_groups {
struct grid_group {
  void sync(int line = __builtin_LINE()) const { cushim::grid_sync(line); }
  unsigned long long size() const {
    return (unsigned long long)gridDim.x * gridDim.y * gridDim.z * blockDim.x * blockDim.y *
           blockDim.z;
  }
  unsigned long long thread_rank() const {
    const unsigned long long b =
        (blockIdx.z * (unsigned long long)gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    return b * blockDim.x * blockDim.y * blockDim.z +
           (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  }
};
struct thread_block {
  void sync(int line = __builtin_LINE()) const { cushim::syncthreads_count(0, line); }
  unsigned thread_rank() const {
    return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  }
  unsigned size() const { return blockDim.x * blockDim.y * blockDim.z; }
};
static inline grid_group this_grid() { return {}; }
static inline thread_block this_thread_block() { return {}; }
}  // namespace cooperative_groups

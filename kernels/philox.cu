// Random bits of Philox4x64-10, equal to numpy.random.Philox's.
//
// Thread i writes the four words of the counter given plus 1 + i, for NumPy increments before the
// first block. Counter and key lie on the device, so that a captured launch sees them change.
#include "common.cuh"
#include "philox.cuh"

extern "C" __global__ void tapegrad_philox(word *__restrict__ out,
                                           const long long *__restrict__ counter,
                                           const word *__restrict__ key, index_t count) {
  const index_t step = index_t(gridDim.x) * blockDim.x;
  for (index_t i = index_t(blockIdx.x) * blockDim.x + threadIdx.x; i * kWords < count; i += step) {
    word c[kWords];
    encrypt(word(*counter) + 1 + word(i), key, c);
#pragma unroll
    for (int k = 0; k < kWords; ++k)
      if (i * kWords + k < count) out[i * kWords + k] = c[k];
  }
}

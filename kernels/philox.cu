// Random bits of Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011), equal to numpy.random.Philox's.
//
// One thread encrypts one 256-bit counter and writes its four words; thread i takes the counter
// given plus 1 + i, for NumPy increments before the first block. Counter and key lie on the device,
// so that a captured launch sees them change.
#include "common.cuh"

using word = unsigned long long;

constexpr int kRounds = 10, kWords = 4;
// the multipliers and Weyl constants of section 3.3 and of its Random123 implementation
constexpr word kMultiply0 = 0xD2E7470EE14C6C93ull, kMultiply1 = 0xCA5A826395121157ull;
constexpr word kWeyl0 = 0x9E3779B97F4A7C15ull, kWeyl1 = 0xBB67AE8584CAA73Bull;

extern "C" __global__ void tapegrad_philox(word *__restrict__ out,
                                           const long long *__restrict__ counter,
                                           const word *__restrict__ key, index_t count) {
  const index_t step = index_t(gridDim.x) * blockDim.x;
  for (index_t i = index_t(blockIdx.x) * blockDim.x + threadIdx.x; i * kWords < count; i += step) {
    word c[kWords] = {word(*counter) + 1 + word(i), 0, 0, 0};  // 2^63 steps never reach c[1]
    word k0 = key[0], k1 = key[1];
#pragma unroll
    for (int round = 0; round < kRounds; ++round, k0 += kWeyl0, k1 += kWeyl1) {
      const word high_0 = __umul64hi(kMultiply0, c[0]), low_0 = kMultiply0 * c[0];
      const word high_1 = __umul64hi(kMultiply1, c[2]), low_1 = kMultiply1 * c[2];
      c[0] = high_1 ^ c[1] ^ k0;
      c[1] = low_1;
      c[2] = high_0 ^ c[3] ^ k1;
      c[3] = low_0;
    }
#pragma unroll
    for (int k = 0; k < kWords; ++k)
      if (i * kWords + k < count) out[i * kWords + k] = c[k];
  }
}

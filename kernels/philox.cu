// Random bits of Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011), equal to numpy.random.Philox's.
//
// One thread encrypts one 256-bit counter and writes its four words; thread i takes the counter
// given plus i.
#include "common.cuh"

using word = unsigned long long;

constexpr int kRounds = 10, kWords = 4;
// the multipliers and Weyl constants of section 3.3 and of its Random123 implementation
constexpr word kMultiply0 = 0xD2E7470EE14C6C93ull, kMultiply1 = 0xCA5A826395121157ull;
constexpr word kWeyl0 = 0x9E3779B97F4A7C15ull, kWeyl1 = 0xBB67AE8584CAA73Bull;

extern "C" __global__ void tapegrad_philox(word *out, index_t count, word key_0, word key_1,
                                           word counter_0, word counter_1, word counter_2,
                                           word counter_3) {
  const index_t step = index_t(gridDim.x) * blockDim.x;
  for (index_t i = index_t(blockIdx.x) * blockDim.x + threadIdx.x; i * kWords < count; i += step) {
    word c[kWords] = {counter_0 + word(i), counter_1, counter_2, counter_3};
    bool carry = c[0] < word(i);
#pragma unroll
    for (int k = 1; k < kWords; ++k) {
      c[k] += carry;
      carry = carry && c[k] == 0;
    }
    word k0 = key_0, k1 = key_1;
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

// Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

using word = unsigned long long;

constexpr int kRounds = 10, kWords = 4;
// the multipliers and Weyl constants of section 3.3 and of its Random123 implementation
constexpr word kMultiply0 = 0xD2E7470EE14C6C93ull, kMultiply1 = 0xCA5A826395121157ull;
constexpr word kWeyl0 = 0x9E3779B97F4A7C15ull, kWeyl1 = 0xBB67AE8584CAA73Bull;

// Encrypt a 256-bit counter, of which the upper words are 0: 2^63 steps never reach the second.
__device__ void encrypt(word counter, const word *key, word (&c)[kWords]) {
  c[0] = counter, c[1] = c[2] = c[3] = 0;
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
}

// Dropout: y = x * factors, where a factor is 0 or the number given, by random bits made here.
//
// T is float, double, __half or __nv_bfloat16; N = 16 / sizeof(T), or 1 where an address is no
// multiple of 16 bytes. Element e is kept where 32-bit word e of Philox's stream (see philox.cu) is
// below `threshold`, which may be 2^32: the mask that the NumPy backend draws. One thread encrypts
// one counter, which is the words of eight neighbouring elements.
#include "common.cuh"
#include "philox.cuh"

constexpr int kElements = 2 * kWords;  // of a counter

template <int N, typename T>
__device__ void drop(const T *x, T *y, T *factors, index_t pack, unsigned kept, T factor) {
  using A = accumulator_t<T>;
  Pack<T, N> v = load<N>(x, pack), f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    f.at[i] = kept >> i & 1 ? factor : T(A(0));
    v.at[i] = T(A(v.at[i]) * A(f.at[i]));
  }
  store<N>(y, pack, v);
  store<N>(factors, pack, f);
}

// 4 blocks: 64 registers a thread. Without a number the compiler takes 32, and spills on sm_70.
template <typename T, int N>
__global__ void __launch_bounds__(256, 4)
    tapegrad_dropout(const T *__restrict__ x, T *__restrict__ y, T *__restrict__ factors,
                     const long long *__restrict__ counter, const word *__restrict__ key,
                     index_t count, index_t threshold, accumulator_t<T> factor) {
  const index_t step = index_t(gridDim.x) * blockDim.x;
  for (index_t i = index_t(blockIdx.x) * blockDim.x + threadIdx.x; i * kElements < count;
       i += step) {
    word c[kWords];
    encrypt(word(*counter) + 1 + word(i), key, c);
    unsigned kept = 0;  // bit k for element k
#pragma unroll
    for (int k = 0; k < kElements; ++k)
      kept |= unsigned(index_t(unsigned(c[k / 2] >> (k % 2 * 32))) < threshold) << k;
    const index_t left = count - i * kElements;
    if (left >= kElements) {
#pragma unroll
      for (int k = 0; k < kElements / N; ++k)
        drop<N>(x, y, factors, i * (kElements / N) + k, kept >> k * N, T(factor));
    } else {
#pragma unroll
      for (int k = 0; k < kElements; ++k)
        if (k < left) drop<1>(x, y, factors, i * kElements + k, kept >> k, T(factor));
    }
  }
}

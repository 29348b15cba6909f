// What the kernel files share. _build.py puts this text in the place of the #include: CuPy's cache
// of compiled kernels knows a source by its text alone and would miss a change in a header.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using index_t = long long;  // of elements: an array may hold more than 2^31

// In which type a T is computed and summed: float for the 16-bit types too.
template <typename T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
template <typename T> using accumulator_t = typename Accumulator<T>::type;

// N neighbouring values that move in one instruction; 16 bytes is the widest there is.
template <typename T, int N> struct alignas(N * sizeof(T)) Pack { T at[N]; };

template <int N, typename T> __device__ Pack<T, N> load(const T *base, index_t pack) {
  return reinterpret_cast<const Pack<T, N> *>(base)[pack];
}
template <int N, typename T> __device__ void store(T *base, index_t pack, const Pack<T, N> &value) {
  reinterpret_cast<Pack<T, N> *>(base)[pack] = value;
}

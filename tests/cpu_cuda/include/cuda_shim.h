// cuda_shim.h -- the CUDA C++ names a kernel uses, for running its source on the CPU in tests.
//
// cuda_shim.cpp holds the machine that runs the grid; cpu_cuda.py rewrites `__shared__`
// declarations, compiles kernel and machine together and calls the kernels. See README.md for what
// is checked and what is not covered.
#pragma once
#include <cassert>
#include <math.h>  // not <cmath> alone: this makes exp(float) of the global namespace a float
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#define CUSHIM 1
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#ifndef INFINITY
#define INFINITY __builtin_inff()
#endif

// ------------------------------------------------------------------ vector types
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
#define CUSHIM_VEC(T, name)                                                          \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
  static inline name##2 make_##name##2(T x, T y) { return {x, y}; }                  \
  static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUSHIM_VEC(float, float)
CUSHIM_VEC(double, double)
CUSHIM_VEC(int, int)
CUSHIM_VEC(unsigned, uint)
CUSHIM_VEC(unsigned short, ushort)
CUSHIM_VEC(long long, longlong)

// ------------------------------------------------------------------ what cuda_shim.cpp provides
namespace cushim {
// of the CUDA thread that runs now
extern uint3 g_thread, g_block;
extern dim3 g_block_dim, g_grid_dim;
extern unsigned g_lane;

int syncthreads_count(int predicate, int line);
void grid_sync(int line);
void syncwarp(unsigned mask, int line);
uint64_t exchange(unsigned mask, uint64_t bits, unsigned source_lane, int line);
unsigned ballot(unsigned mask, bool predicate, int line);
unsigned activemask();
void *shared_static(int site, size_t bytes, size_t align);
void *shared_dynamic();

// A kernel, called with one pointer per parameter as cuLaunchKernel's kernelParams are.
// signature: a letter (pointer, float, int, struct) and a size for each, e.g. "p8 p8 i4 f4 ".
struct Entry {
  const char *name;
  char signature[256];
  void (*call)(void **args);
};

template <class... P, size_t... I>
void apply(void (*f)(P...), void **a, std::index_sequence<I...>) {
  f(*static_cast<std::remove_cv_t<P> *>(a[I])...);
}
template <auto F> struct Bind;
template <class... P, void (*F)(P...)> struct Bind<F> {
  static void call(void **a) { apply(F, a, std::index_sequence_for<P...>{}); }
  static Entry entry(const char *name) {
    Entry e{name, "", &call};
    size_t n = 0;
    auto add = [&](char c, size_t size) {
      n += snprintf(e.signature + n, sizeof e.signature - n, "%c%zu ", c, size);
    };
    (add(std::is_pointer<P>::value          ? 'p'
         : std::is_floating_point<P>::value ? 'f'
         : std::is_integral<P>::value       ? 'i'
                                            : 's',
         sizeof(P)),
     ...);
    (void)add;
    return e;
  }
};

// ------------------------------------------------------------------ shuffles, on top of exchange()
template <class T> T swap_with(unsigned mask, T v, unsigned source, int line) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value,
                "shuffle of a type wider than 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof v);
  bits = exchange(mask, bits, source, line);
  memcpy(&v, &bits, sizeof v);
  return v;
}
inline unsigned segment(int width) { return g_lane & ~unsigned(width - 1); }
template <class T> T shfl(unsigned m, T v, int src, int width, int line) {
  return swap_with(m, v, segment(width) + (unsigned(src) & unsigned(width - 1)), line);
}
template <class T> T shfl_xor(unsigned m, T v, int x, int width, int line) {
  const unsigned s = g_lane ^ unsigned(x);
  return swap_with(m, v, s < segment(width) + width ? s : g_lane, line);
}
template <class T> T shfl_down(unsigned m, T v, unsigned d, int width, int line) {
  return swap_with(m, v, g_lane + d < segment(width) + width ? g_lane + d : g_lane, line);
}
template <class T> T shfl_up(unsigned m, T v, unsigned d, int width, int line) {
  return swap_with(m, v, g_lane >= segment(width) + d ? g_lane - d : g_lane, line);
}

template <class T, class F>
T atomic_update(T *p, F next) {  // compare-and-swap loop: also right for float and double
  T old, now;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do now = next(old);
  while (!__atomic_compare_exchange(p, &old, &now, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
}  // namespace cushim

// ------------------------------------------------------------------ the CUDA names
#define threadIdx (cushim::g_thread)
#define blockIdx (cushim::g_block)
#define blockDim (cushim::g_block_dim)
#define gridDim (cushim::g_grid_dim)
#define warpSize 32

#define __syncthreads() ((void)cushim::syncthreads_count(0, __LINE__))
#define __syncthreads_count(p) cushim::syncthreads_count(bool(p), __LINE__)
#define __syncthreads_or(p) (cushim::syncthreads_count(bool(p), __LINE__) != 0)
#define __syncthreads_and(p) (cushim::syncthreads_count(!(p), __LINE__) == 0)
#define CUSHIM_PICK(a, b, c, d, name, ...) name
#define CUSHIM_SHFL3(f, m, v, x) cushim::f(m, v, x, 32, __LINE__)
#define CUSHIM_SHFL4(f, m, v, x, w) cushim::f(m, v, x, w, __LINE__)
#define CUSHIM_SHFL(f, ...) CUSHIM_PICK(__VA_ARGS__, CUSHIM_SHFL4, CUSHIM_SHFL3, , )(f, __VA_ARGS__)
#define __shfl_sync(...) CUSHIM_SHFL(shfl, __VA_ARGS__)
#define __shfl_xor_sync(...) CUSHIM_SHFL(shfl_xor, __VA_ARGS__)
#define __shfl_down_sync(...) CUSHIM_SHFL(shfl_down, __VA_ARGS__)
#define __shfl_up_sync(...) CUSHIM_SHFL(shfl_up, __VA_ARGS__)
#define __ballot_sync(m, p) cushim::ballot(m, bool(p), __LINE__)
#define __any_sync(m, p) (cushim::ballot(m, bool(p), __LINE__) != 0)
#define __all_sync(m, p) (cushim::ballot(m, !(p), __LINE__) == 0)
#define __activemask() cushim::activemask()
static inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  cushim::syncwarp(mask, line);
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}

template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> void __stcs(T *p, T v) { *p = v; }
template <class T> void __stcg(T *p, T v) { *p = v; }

#define CUSHIM_ATOMIC(name, expr)                                    \
  template <class T> T name(T *p, std::common_type_t<T> v) {         \
    return cushim::atomic_update(p, [=](T o) -> T { return expr; }); \
  }
CUSHIM_ATOMIC(atomicAdd, o + v)
CUSHIM_ATOMIC(atomicSub, o - v)
CUSHIM_ATOMIC(atomicMax, o < v ? v : o)
CUSHIM_ATOMIC(atomicMin, v < o ? v : o)
CUSHIM_ATOMIC(atomicAnd, o &v)
CUSHIM_ATOMIC(atomicOr, o | v)
CUSHIM_ATOMIC(atomicExch, v)
template <class T> T atomicCAS(T *p, std::common_type_t<T> expected, std::common_type_t<T> v) {
  return cushim::atomic_update(p, [=](T o) -> T { return o == expected ? v : o; });
}

template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
// macros, because glibc declares functions of these names
#define __expf(x) expf(x)
#define __exp2f(x) exp2f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __powf(x, y) powf(x, y)
static inline unsigned __float_as_uint(float f) {
  unsigned u;
  memcpy(&u, &f, 4);
  return u;
}
static inline int __float_as_int(float f) {
  int u;
  memcpy(&u, &f, 4);
  return u;
}
static inline float __uint_as_float(unsigned u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline float __int_as_float(int u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline int __popc(unsigned u) { return __builtin_popcount(u); }
static inline int __popcll(unsigned long long u) { return __builtin_popcountll(u); }
static inline int __clz(int u) { return u ? __builtin_clz(unsigned(u)) : 32; }
static inline int __ffs(int u) { return __builtin_ffs(u); }
static inline unsigned __umulhi(unsigned a, unsigned b) {
  return unsigned((uint64_t(a) * b) >> 32);
}
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}

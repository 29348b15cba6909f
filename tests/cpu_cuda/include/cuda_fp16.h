// The part of cuda_fp16.h that scalar kernels use; the compiler's _Float16 rounds as the GPU does.
#pragma once
#include "cuda_shim.h"
struct __half {
  _Float16 h;
  __half() = default;
  __half(float f) : h((_Float16)f) {}
  operator float() const { return (float)h; }
};
typedef __half half;
struct alignas(4) __half2 {
  __half x, y;
};
static inline __half __float2half(float f) { return __half(f); }
static inline __half __float2half_rn(float f) { return __half(f); }
static inline float __half2float(__half h) { return float(h); }
static inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
static inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }

// Optimiser updates of one flat buffer, in place, in one pass.
//
// T is float, double, __half or __nv_bfloat16; N = 16 / sizeof(T), or 1 where an address is no
// multiple of 16 bytes. One thread updates N neighbouring parameters at a time; the last count % N
// go one by one. The rules compute in A, float for the 16-bit types too: what they change is
// rounded once.
//
// Each gradient is multiplied by *factor first (null: by 1), which is what the loss was scaled by
// and the limit of the gradients' norm make of it: see gradient_norm.cu.
//
// The hyper-parameters and the step are read from device memory, so that a captured CUDA graph
// follows a schedule without being changed. They are double, and what is made of them alone (1 -
// beta, the bias corrections) is computed in double: float(1) - float(0.999) has 4 digits.
#include "common.cuh"

constexpr int kThreads = 256;
// 80 or 128 registers a thread: with fewer the rules in double spill, on sm_89 or sm_100.
template <typename T> constexpr int kMinBlocks = sizeof(T) == 8 ? 2 : 3;

// ------------------------------------------------------------------ the rules, for one parameter
template <typename T> struct Sgd {
  static constexpr int kSlots = 0;
  T rate;
  __device__ void operator()(T &p, T &, T &, T g) const { p -= rate * g; }
};

template <typename T> struct Momentum {
  static constexpr int kSlots = 1;
  T rate, momentum;
  bool nesterov;
  __device__ void operator()(T &p, T &v, T &, T g) const {
    v = momentum * v - rate * g;
    p += nesterov ? momentum * v - rate * g : v;
  }
};

// With epsilon 0 a parameter that never had a gradient has 0 / 0: it does not move.
template <typename T> __device__ T ratio(T a, T b) { return b == T(0) ? T(0) : a / b; }

template <typename T> struct Adagrad {
  static constexpr int kSlots = 1;
  T rate, epsilon;
  __device__ void operator()(T &p, T &a, T &, T g) const {
    a += g * g;
    p -= ratio(rate * g, sqrt(a) + epsilon);
  }
};

template <typename T> struct RmsProp {
  static constexpr int kSlots = 1;
  T rate, rho, one_minus_rho, epsilon;
  __device__ void operator()(T &p, T &v, T &, T g) const {
    v = rho * v + one_minus_rho * (g * g);
    p -= ratio(rate * g, sqrt(v) + epsilon);
  }
};

// rate = learning rate / (1 - beta_1^t), spread = 1 / sqrt(1 - beta_2^t),
// decay = learning rate * weight decay.
template <typename T> struct Adam {
  static constexpr int kSlots = 2;
  T beta_1, one_minus_beta_1, beta_2, one_minus_beta_2, epsilon, rate, spread, decay;
  __device__ void operator()(T &p, T &m, T &v, T g) const {
    m = beta_1 * m + one_minus_beta_1 * g;
    v = beta_2 * v + one_minus_beta_2 * (g * g);
    p -= ratio(rate * m, sqrt(v) * spread + epsilon) + decay * p;
  }
};

// ------------------------------------------------------------------ over the buffer
template <int N, typename T, typename A, typename Rule>
__device__ void update_pack(const Rule &rule, T *p, T *slot_1, T *slot_2, const T *g, A factor,
                            index_t i) {
  Pack<T, N> parameter = load<N>(p, i), first, second;
  if constexpr (Rule::kSlots > 0) first = load<N>(slot_1, i);
  if constexpr (Rule::kSlots > 1) second = load<N>(slot_2, i);
  const Pack<T, N> gradient = load<N>(g, i);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    A value = A(parameter.at[k]), one = 0, two = 0;
    if constexpr (Rule::kSlots > 0) one = A(first.at[k]);
    if constexpr (Rule::kSlots > 1) two = A(second.at[k]);
    rule(value, one, two, factor * A(gradient.at[k]));
    parameter.at[k] = T(value);
    if constexpr (Rule::kSlots > 0) first.at[k] = T(one);
    if constexpr (Rule::kSlots > 1) second.at[k] = T(two);
  }
  store<N>(p, i, parameter);
  if constexpr (Rule::kSlots > 0) store<N>(slot_1, i, first);
  if constexpr (Rule::kSlots > 1) store<N>(slot_2, i, second);
}

template <int N, typename T, typename Rule>
__device__ void update(const Rule &rule, T *p, T *slot_1, T *slot_2, const T *g,
                       const double *factor, index_t count) {
  using A = accumulator_t<T>;
  const A by = factor ? A(*factor) : A(1);
  const index_t start = index_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const index_t step = index_t(gridDim.x) * blockDim.x;
  for (index_t i = start; i < count / N; i += step)
    update_pack<N>(rule, p, slot_1, slot_2, g, by, i);
  for (index_t i = count / N * N + start; i < count; i += step)
    update_pack<1>(rule, p, slot_1, slot_2, g, by, i);
}

// By squaring: 17 multiplications for t = 100 000, where pow costs 150 instructions at the 1/64
// rate that most GPUs have for double. The error, t * 1e-16 relative, is gone where t is large.
__device__ double power(double base, index_t t) {
  double result = 1.0;
  for (; t > 0; t >>= 1, base *= base)
    if (t & 1) result *= base;
  return result;
}

// ------------------------------------------------------------------ kernels
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    tapegrad_sgd(T *p, const T *g, const double *factor, index_t count,
                 const double *learning_rate) {
  using A = accumulator_t<T>;
  update<N>(Sgd<A>{A(*learning_rate)}, p, (T *)nullptr, (T *)nullptr, g, factor, count);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    tapegrad_momentum(T *p, T *v, const T *g, const double *factor, index_t count,
                      const double *learning_rate, const double *momentum, int nesterov) {
  using A = accumulator_t<T>;
  const Momentum<A> rule = {A(*learning_rate), A(*momentum), nesterov != 0};
  update<N>(rule, p, v, (T *)nullptr, g, factor, count);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    tapegrad_adagrad(T *p, T *a, const T *g, const double *factor, index_t count,
                     const double *learning_rate, const double *epsilon) {
  using A = accumulator_t<T>;
  update<N>(Adagrad<A>{A(*learning_rate), A(*epsilon)}, p, a, (T *)nullptr, g, factor, count);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    tapegrad_rmsprop(T *p, T *v, const T *g, const double *factor, index_t count,
                     const double *learning_rate, const double *rho, const double *epsilon) {
  using A = accumulator_t<T>;
  const RmsProp<A> rule = {A(*learning_rate), A(*rho), A(1.0 - *rho), A(*epsilon)};
  update<N>(rule, p, v, (T *)nullptr, g, factor, count);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    tapegrad_adam(T *p, T *m, T *v, const T *g, const double *factor, index_t count,
                  const index_t *step, const double *learning_rate, const double *beta_1,
                  const double *beta_2, const double *epsilon, const double *weight_decay) {
  // by one thread a block: double arithmetic in every thread would outlast the memory traffic
  using A = accumulator_t<T>;
  __shared__ A corrected[2];
  if (threadIdx.x == 0) {
    corrected[0] = A(*learning_rate / (1.0 - power(*beta_1, *step)));
    corrected[1] = A(1.0 / sqrt(1.0 - power(*beta_2, *step)));
  }
  __syncthreads();
  const Adam<A> rule = {A(*beta_1),        A(1.0 - *beta_1), A(*beta_2),
                        A(1.0 - *beta_2),  A(*epsilon),      corrected[0],
                        corrected[1],      A(*learning_rate * *weight_decay)};
  update<N>(rule, p, m, v, g, factor, count);
}

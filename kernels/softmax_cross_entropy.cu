// Softmax cross-entropy of each row of logits x and, in the same launch, its gradient.
//
//   loss[r]  = sum over c of w[c] * (lse(x[r]) - x[r, c])          lse = log sum exp
//   dx[r, c] = softmax(x[r])[c] * sum(w) - w[c]
//
// where w is a row of probabilities, or comes from a label: (1 - s) at the label plus s / columns
// everywhere, times the weight of each class if there are weights. A term with w == 0 is exactly 0,
// also at a masked logit of -inf.
//
// T is float, double, __half or __nv_bfloat16; N values move at once, 16 bytes of them where rows
// and addresses allow it, else 1. Short rows lie in the registers of 1 to 32 lanes of
// a warp; a long row is read twice by one block: once for the maximum and the sum of exponentials
// together (online softmax), once, from L1 or L2, for the gradient. dx may be null.
//
// exp, not __expf: __expf(-20) is 25 ulp (1.5e-6 relative) off, exp 1 ulp for a few multiply-adds
// more, and both spend the one special-function instruction that limits 16-bit types.
#include "common.cuh"

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;  // of a block
// 64 registers a thread; double needs more, and would spill.
template <typename T> constexpr int kMaxThreads = sizeof(T) == 8 ? 512 : 1024;

// The start of a maximum. Not -inf: exp(-inf - -inf) is NaN.
template <typename A> __device__ A lowest() { return A(-3.402823466e38f); }
template <> __device__ double lowest<double>() { return -1.7976931348623157e308; }

template <typename A> __device__ A weighted(A weight, A value) {
  return weight == A(0) ? A(0) : weight * value;
}

// ------------------------------------------------------------------ what a row is compared with
template <typename T> struct LabelRow {
  using A = accumulator_t<T>;
  int label;
  A even, at_label;
  const T *class_weights;  // null: all are 1
  A mass;                  // the sum of the w, where it is known
  bool counts;             // false for an ignored row and for a label that is no class
  T other_loss;            // of a row that does not count
  __device__ bool knows_mass() const { return !class_weights || even == A(0); }
  __device__ A weight(int c) const {
    const A w = c == label ? at_label : even;
    return class_weights && w != A(0) ? w * A(class_weights[c]) : w;
  }
  template <int N> __device__ void weights(int pack, A (&w)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] = weight(pack * N + i);
  }
  __device__ int only() const { return even == A(0) ? label : -1; }  // the one w that is not 0
};
template <typename T> struct Labels {
  using A = accumulator_t<T>;
  using Row = LabelRow<T>;
  const void *labels;
  int label_bytes;  // 4 or 8
  int ignores;
  index_t ignored;
  A even, at_label;
  const T *class_weights;
  __device__ Row row(index_t r, int columns) const {
    const index_t label = label_bytes == 8 ? static_cast<const long long *>(labels)[r]
                                           : static_cast<const int *>(labels)[r];
    const bool ignore = ignores && label == ignored;
    const bool counts = !ignore && label >= 0 && label < columns;
    Row row = {counts ? int(label) : -1, even, at_label, class_weights, A(1), counts,
               T(ignore ? A(0) : A(nanf("")))};
    if (counts && class_weights && even == A(0)) row.mass = row.weight(row.label);
    return row;
  }
};
template <typename T> struct ProbabilityRow {
  using A = accumulator_t<T>;
  const T *probability;
  static constexpr bool counts = true;
  static constexpr accumulator_t<T> mass = 0;
  T other_loss;
  __device__ bool knows_mass() const { return false; }
  __device__ A weight(int c) const { return A(probability[c]); }
  template <int N> __device__ void weights(int pack, A (&w)[N]) const {
    const Pack<T, N> q = load<N>(probability, pack);
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] = A(q.at[i]);
  }
  __device__ int only() const { return -1; }
};
template <typename T> struct Probabilities {
  using Row = ProbabilityRow<T>;
  const T *probabilities;
  __device__ Row row(index_t r, int columns) const {
    return {probabilities + r * columns, T(0.0f)};
  }
};

// ------------------------------------------------------------------ over the lanes of a row
template <typename A> __device__ A lanes_max(A v, int lanes) {
  for (int d = lanes / 2; d > 0; d /= 2) v = fmax(v, __shfl_xor_sync(kAllLanes, v, d));
  return v;
}
template <typename A> __device__ A lanes_sum(A v, int lanes) {
  for (int d = lanes / 2; d > 0; d /= 2) v += __shfl_xor_sync(kAllLanes, v, d);
  return v;
}

// ------------------------------------------------------------------ short rows
// `lanes` (a power of two up to 32) neighbouring lanes hold a row, VALUES each in packs of N.
template <typename T, int VALUES, int N, typename Target>
__device__ void row_in_registers(const T *__restrict__ x, const Target target, T *__restrict__ loss,
                                 T *__restrict__ dx, index_t rows, int columns, int lanes) {
  using A = accumulator_t<T>;
  const int lane = threadIdx.x & (lanes - 1);
  const index_t step = index_t(gridDim.x) * (blockDim.x / lanes);
  const int in_warp = (threadIdx.x % kWarp) / lanes;
  // `first` is the warp's, not the lane's: all its lanes must reach the shuffles
  for (index_t first = (index_t(blockIdx.x) * blockDim.x + threadIdx.x / kWarp * kWarp) / lanes;
       first < rows; first += step) {
    const index_t r = first + in_warp;
    const int packs = r < rows ? columns / N : 0;
    A v[VALUES / N][N], top = lowest<A>();
#pragma unroll
    for (int i = 0; i < VALUES / N; ++i) {
      const int p = i * lanes + lane;
      if (p >= packs) continue;
      const Pack<T, N> pack = load<N>(x + r * columns, p);
#pragma unroll
      for (int k = 0; k < N; ++k) top = fmax(top, v[i][k] = A(pack.at[k]));
    }
    top = lanes_max(top, lanes);
    const typename Target::Row row = target.row(r < rows ? r : rows - 1, columns);
    A sum = 0, cost = 0, mass = 0;  // cost: sum of w * (top - x)
#pragma unroll
    for (int i = 0; i < VALUES / N; ++i) {
      const int p = i * lanes + lane;
      if (p >= packs) continue;
      A w[N];
      row.weights(p, w);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        mass += w[k];
        cost += weighted(w[k], top - v[i][k]);
        v[i][k] = exp(v[i][k] - top);
        sum += v[i][k];
      }
    }
    sum = lanes_sum(sum, lanes);
    cost = lanes_sum(cost, lanes);
    mass = row.knows_mass() ? row.mass : lanes_sum(mass, lanes);
    if (r >= rows) continue;
    if (lane == 0) loss[r] = row.counts ? T(weighted(mass, log(sum)) + cost) : row.other_loss;
    if (!dx) continue;
    const A scale = mass / sum;
#pragma unroll
    for (int i = 0; i < VALUES / N; ++i) {
      const int p = i * lanes + lane;
      if (p >= packs) continue;
      A w[N];
      row.weights(p, w);
      Pack<T, N> pack;
#pragma unroll
      for (int k = 0; k < N; ++k)
        // the difference in A: a 16-bit probability near 1 would lose it
        pack.at[k] = T(row.counts ? v[i][k] * scale - w[k] : A(0));
      store<N>(dx + r * columns, p, pack);
    }
  }
}

// ------------------------------------------------------------------ long rows
template <typename A> struct Online {  // of the values seen so far
  A top, sum;                          // the largest; the sum of exp(value - top)
  template <int N> __device__ void add(const A (&v)[N]) {
    A highest = v[0];
#pragma unroll
    for (int i = 1; i < N; ++i) highest = fmax(highest, v[i]);
    rise(highest);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += exp(v[i] - top);
  }
  __device__ void rise(A highest) {
    if (!(highest > top)) return;  // rare after the first few: saves an exp
    sum *= exp(top - highest);
    top = highest;
  }
};

// A block, of whole warps, for each row in turn; N values a load.
template <typename T, int N, typename Target>
__device__ void row_a_block(const T *__restrict__ x, const Target target, T *__restrict__ loss,
                            T *__restrict__ dx, index_t rows, int columns) {
  using A = accumulator_t<T>;
  __shared__ A tops[kMaxWarps], sums[kMaxWarps], masses[kMaxWarps], costs[kMaxWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int packs = columns / N;
  for (index_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const T *xr = x + r * columns;
    const typename Target::Row row = target.row(r, columns);

    Online<A> seen = {lowest<A>(), A(0)};
    A mass = 0;
#pragma unroll 2
    for (int p = threadIdx.x; p < packs; p += blockDim.x) {
      const Pack<T, N> pack = load<N>(xr, p);
      A v[N];
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = A(pack.at[i]);
      seen.add(v);
      if (row.knows_mass()) continue;
      A w[N];
      row.weights(p, w);
#pragma unroll
      for (int i = 0; i < N; ++i) mass += w[i];
    }
    A top = lanes_max(seen.top, kWarp);
    A sum = lanes_sum(seen.sum * exp(seen.top - top), kWarp);
    mass = row.knows_mass() ? A(0) : lanes_sum(mass, kWarp);
    if (lane == 0) tops[warp] = top, sums[warp] = sum, masses[warp] = mass;
    __syncthreads();
    // each warp adds up all warps' parts for itself: no second barrier
    const A part = lane < warps ? tops[lane] : lowest<A>();
    top = lanes_max(part, kWarp);
    sum = lanes_sum(lane < warps ? sums[lane] * exp(part - top) : A(0), kWarp);
    mass = row.knows_mass() ? row.mass : lanes_sum(lane < warps ? masses[lane] : A(0), kWarp);

    const bool one_term = row.only() >= 0;
    A cost = 0;  // sum of w * (top - x)
    if (row.counts && one_term && threadIdx.x == 0)
      cost = weighted(row.weight(row.only()), top - A(xr[row.only()]));
    if (dx || (row.counts && !one_term)) {
      const A scale = mass / sum;
      for (int p = threadIdx.x; p < packs; p += blockDim.x) {
        Pack<T, N> pack = load<N>(xr, p);
        A w[N];
        row.weights(p, w);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const A v = A(pack.at[i]);
          if (!one_term) cost += weighted(w[i], top - v);
          pack.at[i] = T(row.counts ? exp(v - top) * scale - w[i] : A(0));
        }
        if (dx) store<N>(dx + r * columns, p, pack);
      }
    }
    if (row.counts && !one_term) {
      cost = lanes_sum(cost, kWarp);
      if (lane == 0) costs[warp] = cost;
      __syncthreads();
      cost = lanes_sum(lane < warps ? costs[lane] : A(0), kWarp);
    }
    if (threadIdx.x == 0)
      loss[r] = row.counts ? T(weighted(mass, log(sum)) + cost) : row.other_loss;
    __syncthreads();  // before the next row overwrites the shared parts
  }
}

// ------------------------------------------------------------------ kernels
template <typename T, int VALUES, int N>
__global__ void tapegrad_label_cross_entropy_short(
    const T *x, const void *labels, T *loss, T *dx, index_t rows, int columns, int lanes,
    int label_bytes, int ignores, index_t ignored, accumulator_t<T> even,
    accumulator_t<T> at_label, const T *class_weights) {
  const Labels<T> target = {labels, label_bytes, ignores, ignored, even, at_label, class_weights};
  row_in_registers<T, VALUES, N>(x, target, loss, dx, rows, columns, lanes);
}

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads<T>, 1) tapegrad_label_cross_entropy_long(
    const T *x, const void *labels, T *loss, T *dx, index_t rows, int columns, int label_bytes,
    int ignores, index_t ignored, accumulator_t<T> even, accumulator_t<T> at_label,
    const T *class_weights) {
  const Labels<T> target = {labels, label_bytes, ignores, ignored, even, at_label, class_weights};
  row_a_block<T, N>(x, target, loss, dx, rows, columns);
}

template <typename T, int VALUES, int N>
__global__ void tapegrad_probability_cross_entropy_short(const T *x, const T *probabilities,
                                                         T *loss, T *dx, index_t rows, int columns,
                                                         int lanes) {
  const Probabilities<T> target = {probabilities};
  row_in_registers<T, VALUES, N>(x, target, loss, dx, rows, columns, lanes);
}

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads<T>, 1)
    tapegrad_probability_cross_entropy_long(const T *x, const T *probabilities, T *loss, T *dx,
                                            index_t rows, int columns) {
  row_a_block<T, N>(x, Probabilities<T>{probabilities}, loss, dx, rows, columns);
}

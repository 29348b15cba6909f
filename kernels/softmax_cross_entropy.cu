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
// a warp; a long row is read twice by one block, or by several where there are fewer such rows than
// multiprocessors: once for the maximum, the sum of exponentials and the loss together (online
// softmax), once, from L1 or L2, for the gradient. dx may be null: then a row is read once.
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
// Of the values that a thread, a block or several have seen: the largest, the sum of
// exp(value - top), and of w and w * (top - value) where a row has more than one w that counts.
template <typename A> struct Seen {
  A top, sum, mass, cost;
  __device__ void rise(A highest) {
    if (!(highest > top)) return;  // rare after the first few: saves an exp
    sum *= exp(top - highest);
    cost += weighted(mass, highest - top);
    top = highest;
  }
  __device__ void add(Seen other) {
    rise(other.top);
    other.rise(top);
    sum += other.sum, mass += other.mass, cost += other.cost;
  }
};
template <typename A> __device__ Seen<A> nothing() { return {lowest<A>(), A(0), A(0), A(0)}; }

// What the lanes of a warp have seen together; every lane gets it.
template <typename A> __device__ Seen<A> lanes_seen(Seen<A> seen) {
  seen.rise(lanes_max(seen.top, kWarp));
  return {seen.top, lanes_sum(seen.sum, kWarp), lanes_sum(seen.mass, kWarp),
          lanes_sum(seen.cost, kWarp)};
}

// The same of a block, of whole warps. A barrier must come before the next call.
template <typename A> __device__ Seen<A> block_seen(Seen<A> seen) {
  __shared__ A tops[kMaxWarps], sums[kMaxWarps], masses[kMaxWarps], costs[kMaxWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  seen = lanes_seen(seen);
  if (lane == 0)
    tops[warp] = seen.top, sums[warp] = seen.sum, masses[warp] = seen.mass, costs[warp] = seen.cost;
  __syncthreads();
  // each warp adds up all warps' parts for itself: no second barrier
  if (lane < warps)
    seen = {tops[lane], sums[lane], masses[lane], costs[lane]};
  else
    seen = nothing<A>();
  return lanes_seen(seen);
}

// What a thread sees of a row's packs from `begin` to `end`.
template <int N, typename T, typename Row>
__device__ Seen<accumulator_t<T>> scan(const T *x, const Row &row, int begin, int end) {
  using A = accumulator_t<T>;
  const bool weigh = row.counts && row.only() < 0;
  Seen<A> seen = nothing<A>();
#pragma unroll 2
  for (int p = begin + threadIdx.x; p < end; p += blockDim.x) {
    const Pack<T, N> pack = load<N>(x, p);
    A v[N], highest = lowest<A>();
#pragma unroll
    for (int i = 0; i < N; ++i) highest = fmax(highest, v[i] = A(pack.at[i]));
    seen.rise(highest);
#pragma unroll
    for (int i = 0; i < N; ++i) seen.sum += exp(v[i] - seen.top);
    if (!weigh) continue;
    A w[N];
    row.weights(p, w);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      seen.mass += w[i];
      seen.cost += weighted(w[i], seen.top - v[i]);
    }
  }
  return seen;
}

template <typename T, typename Row>
__device__ T loss_of(const T *x, const Row &row, Seen<accumulator_t<T>> seen) {
  using A = accumulator_t<T>;
  if (!row.counts) return row.other_loss;
  const int only = row.only();
  const A cost = only < 0 ? seen.cost : weighted(row.weight(only), seen.top - A(x[only]));
  return T(weighted(row.knows_mass() ? row.mass : seen.mass, log(seen.sum)) + cost);
}

// The gradient of a row's packs from `begin` to `end`, by all threads of a block.
template <int N, typename T, typename Row>
__device__ void write_gradient(const T *x, T *dx, const Row &row, Seen<accumulator_t<T>> seen,
                               int begin, int end) {
  using A = accumulator_t<T>;
  const A scale = (row.knows_mass() ? row.mass : seen.mass) / seen.sum;
  for (int p = begin + threadIdx.x; p < end; p += blockDim.x) {
    Pack<T, N> pack = load<N>(x, p);
    A w[N];
    row.weights(p, w);
#pragma unroll
    for (int i = 0; i < N; ++i)
      pack.at[i] = T(row.counts ? exp(A(pack.at[i]) - seen.top) * scale - w[i] : A(0));
    store<N>(dx, p, pack);
  }
}

// A block for each row in turn; N values a load.
template <typename T, int N, typename Target>
__device__ void row_a_block(const T *__restrict__ x, const Target target, T *__restrict__ loss,
                            T *__restrict__ dx, index_t rows, int columns) {
  for (index_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const T *xr = x + r * columns;
    const typename Target::Row row = target.row(r, columns);
    const auto seen = block_seen(scan<N>(xr, row, 0, columns / N));
    if (threadIdx.x == 0) loss[r] = loss_of(xr, row, seen);
    if (dx) write_gradient<N>(xr, dx + r * columns, row, seen, 0, columns / N);
    __syncthreads();  // before the next row overwrites the shared parts
  }
}

// ------------------------------------------------------------------ long rows, too few of them
// Several blocks for each row, in two launches: what each has seen of its slice; and then, of what
// all have seen, loss and gradient. gridDim = (slices of `each` packs, rows); parts[r, slice].
template <typename T, int N, typename Target>
__device__ void scan_slice(const T *__restrict__ x, const Target target,
                           Seen<accumulator_t<T>> *__restrict__ parts, int columns, int each) {
  const index_t r = blockIdx.y;
  const int packs = columns / N, begin = blockIdx.x * each;
  const int end = packs - begin < each ? packs : begin + each;
  const auto seen = block_seen(scan<N>(x + r * columns, target.row(r, columns), begin, end));
  if (threadIdx.x == 0) parts[r * gridDim.x + blockIdx.x] = seen;
}

// Without dx one warp a row is enough.
template <typename T, int N, typename Target>
__device__ void finish_slice(const T *__restrict__ x, const Target target,
                             const Seen<accumulator_t<T>> *__restrict__ parts,
                             T *__restrict__ loss, T *__restrict__ dx, int columns, int each,
                             int slices) {
  const index_t r = blockIdx.y;
  const int packs = columns / N, begin = blockIdx.x * each;
  const int end = packs - begin < each ? packs : begin + each;
  const typename Target::Row row = target.row(r, columns);
  auto seen = nothing<accumulator_t<T>>();  // each warp adds up all for itself: no barrier
  for (int slice = threadIdx.x % kWarp; slice < slices; slice += kWarp)
    seen.add(parts[r * slices + slice]);
  seen = lanes_seen(seen);
  if (blockIdx.x == 0 && threadIdx.x == 0) loss[r] = loss_of(x + r * columns, row, seen);
  if (dx) write_gradient<N>(x + r * columns, dx + r * columns, row, seen, begin, end);
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

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads<T>, 1) tapegrad_label_cross_entropy_scan(
    const T *x, const void *labels, Seen<accumulator_t<T>> *parts, int columns, int each,
    int label_bytes, int ignores, index_t ignored, accumulator_t<T> even,
    accumulator_t<T> at_label, const T *class_weights) {
  const Labels<T> target = {labels, label_bytes, ignores, ignored, even, at_label, class_weights};
  scan_slice<T, N>(x, target, parts, columns, each);
}

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads<T>, 1) tapegrad_label_cross_entropy_finish(
    const T *x, const void *labels, const Seen<accumulator_t<T>> *parts, T *loss, T *dx,
    int columns, int each, int slices, int label_bytes, int ignores, index_t ignored,
    accumulator_t<T> even, accumulator_t<T> at_label, const T *class_weights) {
  const Labels<T> target = {labels, label_bytes, ignores, ignored, even, at_label, class_weights};
  finish_slice<T, N>(x, target, parts, loss, dx, columns, each, slices);
}

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads<T>, 1)
    tapegrad_probability_cross_entropy_scan(const T *x, const T *probabilities,
                                            Seen<accumulator_t<T>> *parts, int columns, int each) {
  scan_slice<T, N>(x, Probabilities<T>{probabilities}, parts, columns, each);
}

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads<T>, 1)
    tapegrad_probability_cross_entropy_finish(const T *x, const T *probabilities,
                                              const Seen<accumulator_t<T>> *parts, T *loss, T *dx,
                                              int columns, int each, int slices) {
  finish_slice<T, N>(x, Probabilities<T>{probabilities}, parts, loss, dx, columns, each, slices);
}

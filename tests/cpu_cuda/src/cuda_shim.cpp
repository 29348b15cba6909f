// cuda_shim.cpp -- runs a CUDA grid on one OS thread: every CUDA thread is a fiber.
//
// Fibers change over only at barriers and warp intrinsics, so a run is deterministic and a deadlock
// is found, not waited for. This file is never itself instrumented; compiled with -DCUSHIM_ASAN or
// -DCUSHIM_TSAN it tells the sanitizer of the fibers. To ThreadSanitizer each CUDA thread is a
// thread and only the barriers that order memory on a GPU order it here.
#include "cuda_shim.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

#ifdef CUSHIM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef CUSHIM_TSAN
#include <sanitizer/tsan_interface.h>
#endif

extern const cushim::Entry cushim_kernels[];  // written by cpu_cuda.py

namespace cushim {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr size_t kAlignment = 256;  // _ALIGNMENT in cpu_cuda.py
// bytes a block (sm_90)
constexpr size_t kStaticSharedMax = 48 << 10, kDynamicSharedMax = 227 << 10;

uint3 g_thread, g_block;
dim3 g_block_dim, g_grid_dim;
unsigned g_lane;

// ------------------------------------------------------------------ context switch
#if defined(__x86_64__) && !defined(CUSHIM_UCONTEXT)
// Callee-saved registers go on the old stack and come off the new one; `ret` resumes the fiber.
extern "C" void cushim_switch(void **save_sp, void *load_sp);
asm(R"(
.text
.type cushim_switch, @function
cushim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cushim_switch, .-cushim_switch
)");
struct Context {
  void *sp = nullptr;
  void prepare(char *stack, void (*entry)()) {
    void **top = reinterpret_cast<void **>(stack + kStack);
    *--top = nullptr;                          // entry never returns; rsp % 16 == 8 at its start
    *--top = reinterpret_cast<void *>(entry);  // taken by `ret`
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // rbp, rbx, r12..r15
    sp = top;
  }
  static void swap(Context &from, Context &to) { cushim_switch(&from.sp, to.sp); }
};
#else
}  // namespace cushim
#include <ucontext.h>
namespace cushim {
struct Context {
  ucontext_t uc;
  void prepare(char *stack, void (*entry)()) {
    getcontext(&uc);
    uc.uc_stack.ss_sp = stack;
    uc.uc_stack.ss_size = kStack;
    uc.uc_link = nullptr;
    makecontext(&uc, entry, 0);
  }
  static void swap(Context &from, Context &to) { swapcontext(&from.uc, &to.uc); }
};
#endif

// ------------------------------------------------------------------ sanitizers: ordering of memory
// Two objects per barrier, used in turn: a fast thread's arrival at the next barrier must not count
// as ordering for a slow thread that only now leaves this one.
struct Order {
  char at[2];
  void release(unsigned long gen) {
#ifdef CUSHIM_TSAN
    __tsan_release(&at[gen & 1]);
#endif
    (void)gen;
  }
  void acquire(unsigned long gen) {
#ifdef CUSHIM_TSAN
    __tsan_acquire(&at[gen & 1]);
#endif
    (void)gen;
  }
};

// ------------------------------------------------------------------ threads, warps, blocks
struct Barrier {
  unsigned arrived = 0, votes[2] = {0, 0};
  unsigned long gen = 0;  // completed so many times
  int line = 0;
  Order order;
};

struct Meeting : Barrier {       // of the lanes of one mask
  unsigned mask = 0, lanes = 0;  // lanes: that wait
  unsigned came[2] = {0, 0};
  uint64_t value[2][kWarp];
};

struct Warp {
  unsigned alive = 0;
  std::vector<std::unique_ptr<Meeting>> meetings;
};

struct Block;
struct Fiber {
  uint3 thread{};
  unsigned lane = 0;
  Block *block = nullptr;
  Warp *warp = nullptr;
  const Barrier *waits = nullptr;
  unsigned long waits_gen = 0;
  const char *at = "its start";
  int line = 0;
  bool done = false;
  Context context;
  char *stack = nullptr;
  void *fake_stack = nullptr;  // ASan's
  void *tsan = nullptr;        // TSan's fiber
};

struct Block {
  uint3 index{};
  unsigned alive = 0;
  Barrier barrier;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<std::pair<int, size_t>, void *> shared;  // by declaration and size (templates)
  size_t shared_bytes = 0;
  void *dynamic = nullptr;
  ~Block() {
    for (auto &s : shared) free(s.second);
    free(dynamic);
  }
};
using Blocks = std::vector<std::unique_ptr<Block>>;

struct Config {  // _Config in cpu_cuda.py
  unsigned grid[3], block[3], shmem, resident;
  int order;
  unsigned long long skip;  // of the grid's first blocks
};

struct Launch {
  const Entry *kernel = nullptr;
  void **args = nullptr;
  dim3 grid, block;
  unsigned shmem = 0;
  unsigned alive = 0;  // threads of the grid that have not ended
  Barrier barrier;     // of the grid
  Order start, end;
  Context scheduler;
  void *fake_stack = nullptr, *tsan = nullptr;
  const void *stack_bottom = nullptr;
  size_t stack_size = 0;
  std::vector<char *> stacks;  // to be used again
  Blocks ended;
  bool failed = false;
  char error[512] = "";
};

static Launch *g_launch;
static Fiber *g_fiber;

static void to_scheduler(bool for_good = false) {
  Launch &l = *g_launch;
  Fiber &f = *g_fiber;
#ifdef CUSHIM_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &f.fake_stack, l.stack_bottom, l.stack_size);
#endif
#ifdef CUSHIM_TSAN
  __tsan_switch_to_fiber(l.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  (void)for_good;
  Context::swap(f.context, l.scheduler);
#ifdef CUSHIM_ASAN
  __sanitizer_finish_switch_fiber(f.fake_stack, &l.stack_bottom, &l.stack_size);
#endif
}

static void to_fiber(Fiber &f) {
  Launch &l = *g_launch;
  g_fiber = &f;
  g_thread = f.thread;
  g_block = f.block->index;
  g_lane = f.lane;
#ifdef CUSHIM_ASAN
  __sanitizer_start_switch_fiber(&l.fake_stack, f.stack, kStack);
#endif
#ifdef CUSHIM_TSAN
  __tsan_switch_to_fiber(f.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  Context::swap(l.scheduler, f.context);
#ifdef CUSHIM_ASAN
  __sanitizer_finish_switch_fiber(l.fake_stack, nullptr, nullptr);
#endif
  g_fiber = nullptr;
}

[[noreturn]] static void fail(const char *format, ...) {
  Launch &l = *g_launch;
  const Fiber &f = *g_fiber;
  int n = snprintf(l.error, sizeof l.error,
                   "%s, block (%u,%u,%u), thread (%u,%u,%u): ", l.kernel->name, f.block->index.x,
                   f.block->index.y, f.block->index.z, f.thread.x, f.thread.y, f.thread.z);
  va_list ap;
  va_start(ap, format);
  vsnprintf(l.error + n, sizeof l.error - n, format, ap);
  va_end(ap);
  l.failed = true;
  to_scheduler(true);
  abort();
}

// Arrive; the last of `needed` completes the barrier, the others wait for that.
static void arrive(Barrier &b, bool complete, const char *what, int line) {
  if (complete) {
    b.arrived = 0;
    ++b.gen;
    return;
  }
  Fiber &f = *g_fiber;
  f.waits = &b;
  f.waits_gen = b.gen;
  f.at = what;
  f.line = line;
  to_scheduler();
}

static void same_line(const Barrier &b, bool somebody_waits, const char *what, int line) {
  if (somebody_waits && b.line != line)
    fail("%s at line %d, while others wait at line %d", what, line, b.line);
}

// ------------------------------------------------------------------ what the kernel calls
int syncthreads_count(int predicate, int line) {
  Block &block = *g_fiber->block;
  Barrier &b = block.barrier;
  same_line(b, b.arrived, "__syncthreads()", line);
  b.line = line;
  const unsigned long gen = b.gen;
  unsigned &votes = b.votes[gen & 1];
  if (!b.arrived) votes = 0;
  votes += predicate != 0;
  b.order.release(gen);
  arrive(b, ++b.arrived == block.alive, "__syncthreads()", line);
  b.order.acquire(gen);
  return int(votes);
}

void grid_sync(int line) {
  Barrier &b = g_launch->barrier;
  const unsigned long gen = b.gen;
  b.order.release(gen);
  arrive(b, ++b.arrived == g_launch->alive, "a grid barrier", line);
  b.order.acquire(gen);
}

// Each lane of the mask leaves its bits and waits for the others.  `which` tells the buffer that
// holds them: no lane can be more than one meeting ahead of another, so two buffers are enough.
static Meeting &meet(unsigned mask, uint64_t bits, const char *what, int line, unsigned &which,
                     bool orders_memory) {
  Fiber &f = *g_fiber;
  Warp &w = *f.warp;
  if (!(mask >> f.lane & 1))
    fail("line %d: lane %u is not in its own mask 0x%08x", line, f.lane, mask);
  Meeting *m = nullptr;
  for (auto &e : w.meetings)
    if (e->mask == mask) m = e.get();
  if (!m) {
    w.meetings.emplace_back(new Meeting);
    m = w.meetings.back().get();
    m->mask = mask;
  }
  same_line(*m, m->lanes, what, line);
  m->line = line;
  const unsigned long gen = m->gen;
  which = gen & 1;
  if (!m->lanes) m->came[which] = 0;
  m->value[which][f.lane] = bits;
  m->came[which] |= 1u << f.lane;
  if (orders_memory) m->order.release(gen);
  m->lanes |= 1u << f.lane;
  const bool complete = m->lanes == (mask & w.alive);
  if (complete) m->lanes = 0;
  arrive(*m, complete, what, line);
  if (orders_memory) m->order.acquire(gen);
  return *m;
}

void syncwarp(unsigned mask, int line) {
  unsigned which;
  meet(mask, 0, "__syncwarp()", line, which, true);
}

uint64_t exchange(unsigned mask, uint64_t bits, unsigned source, int line) {
  unsigned which;
  const Meeting &m = meet(mask, bits, "a shuffle", line, which, false);
  if (!(m.came[which] >> source & 1))
    fail("line %d: shuffle from lane %u, which takes no part (those that do: 0x%08x)", line, source,
         m.came[which]);
  return m.value[which][source];
}

unsigned ballot(unsigned mask, bool predicate, int line) {
  unsigned which, out = 0;
  const Meeting &m = meet(mask, predicate, "a warp vote", line, which, false);
  for (unsigned i = 0; i < kWarp; ++i)
    if ((m.came[which] >> i & 1) && m.value[which][i]) out |= 1u << i;
  return out;
}

unsigned activemask() { return g_fiber->warp->alive; }

void *shared_static(int site, size_t bytes, size_t align) {
  Block &b = *g_fiber->block;
  void *&p = b.shared[{site, bytes}];
  if (!p) {
    b.shared_bytes += bytes;
    if (b.shared_bytes > kStaticSharedMax)
      fail("%zu bytes of static shared memory", b.shared_bytes);
    if (posix_memalign(&p, std::max<size_t>(align, 16), bytes)) abort();
    memset(p, 0xFF, bytes);  // not a value anybody left there
#ifdef CUSHIM_TSAN
    __tsan_release(p);
#endif
  }
#ifdef CUSHIM_TSAN
  __tsan_acquire(p);  // after the allocation; no order among the threads that use it
#endif
  return p;
}

void *shared_dynamic() { return g_fiber->block->dynamic; }

// ------------------------------------------------------------------ running the grid
static void fiber_main() {
  Launch &l = *g_launch;
  Fiber &f = *g_fiber;
#ifdef CUSHIM_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &l.stack_bottom, &l.stack_size);
#endif
  l.start.acquire(0);
  l.kernel->call(l.args);
  l.end.release(0);
  f.done = true;
  f.warp->alive &= ~(1u << f.lane);
  --f.block->alive;
  --l.alive;
  // Ended threads no longer count: the others may have been waiting for this one alone.
  auto release = [](Barrier &b, unsigned alive) {
    if (b.arrived && b.arrived == alive) b.arrived = 0, ++b.gen;
  };
  release(f.block->barrier, f.block->alive);
  release(l.barrier, l.alive);
  for (auto &m : f.warp->meetings)
    if (m->lanes && m->lanes == (m->mask & f.warp->alive)) m->lanes = 0, ++m->gen;
  to_scheduler(true);
  abort();
}

static void end_fibers(Launch &l) {
#ifdef CUSHIM_TSAN
  for (auto &b : l.ended)
    for (auto &f : b->fibers)
      if (f.tsan) {
        __tsan_destroy_fiber(f.tsan);
        munmap(f.stack, kStack);
        f.tsan = nullptr;
      }
#endif
  (void)l;
}

static char *take_stack(Launch &l) {
  if (l.stacks.empty()) {
    void *p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    return static_cast<char *>(p);
  }
  char *s = l.stacks.back();
  l.stacks.pop_back();
#ifdef CUSHIM_ASAN
  __asan_unpoison_memory_region(s, kStack);  // frames of a fiber are left, not returned from
#endif
  return s;
}

static std::unique_ptr<Block> make_block(Launch &l, size_t linear) {
  std::unique_ptr<Block> b(new Block);
  const size_t plane = size_t(l.grid.x) * l.grid.y;
  b->index = {unsigned(linear % l.grid.x), unsigned(linear % plane / l.grid.x),
              unsigned(linear / plane)};
  const unsigned n = l.block.x * l.block.y * l.block.z;
  b->alive = n;
  b->fibers.resize(n);
  b->warps.resize((n + kWarp - 1) / kWarp);
  if (l.shmem) {
    if (posix_memalign(&b->dynamic, 128, l.shmem)) abort();
    memset(b->dynamic, 0xFF, l.shmem);
  }
  for (unsigned i = 0; i < n; ++i) {
    Fiber &f = b->fibers[i];
    f.thread = {i % l.block.x, i / l.block.x % l.block.y, i / (l.block.x * l.block.y)};
    f.lane = i % kWarp;
    f.block = b.get();
    f.warp = &b->warps[i / kWarp];
    f.warp->alive |= 1u << f.lane;
    f.stack = take_stack(l);
    f.context.prepare(f.stack, &fiber_main);
#ifdef CUSHIM_TSAN
    f.tsan = __tsan_create_fiber(0);
#endif
  }
  return b;
}

static void drop_block(Launch &l, std::unique_ptr<Block> &b) {
#ifdef CUSHIM_TSAN
  // Kept until the launch ends, stacks and all: to ThreadSanitizer a thread number, a stack or
  // memory used again would tie together blocks that have no order. It has room for some 8000
  // threads.
  l.ended.push_back(std::move(b));
  if (l.ended.size() * l.ended[0]->fibers.size() > 4096) end_fibers(l);
#else
  for (auto &f : b->fibers) l.stacks.push_back(f.stack);
  b.reset();
#endif
}

static void report_deadlock(Launch &l, const Blocks &live) {
  const Fiber *first = nullptr;
  unsigned n = 0;
  for (auto &b : live)
    for (auto &f : b->fibers)
      if (!f.done) ++n, first = first ? first : &f;
  snprintf(l.error, sizeof l.error,
           "%s: deadlock, %u threads wait; block (%u,%u,%u), thread (%u,%u,%u) at %s, line %d",
           l.kernel->name, n, first->block->index.x, first->block->index.y, first->block->index.z,
           first->thread.x, first->thread.y, first->thread.z, first->at, first->line);
  l.failed = true;
}

// order: 0 as numbered, 1 reversed, otherwise the seed of a random order
static void arrange(std::vector<size_t> &v, int order, uint64_t &random) {
  if (order == 1) std::reverse(v.begin(), v.end());
  if (order > 1)
    for (size_t i = v.size(); i > 1; --i) {
      random ^= random << 13, random ^= random >> 7, random ^= random << 17;
      std::swap(v[i - 1], v[random % i]);
    }
}

static void run_grid(Launch &l, unsigned resident, int order, size_t skip) {
  const size_t in_grid = size_t(l.grid.x) * l.grid.y * l.grid.z;
  const size_t blocks = in_grid - std::min(skip, in_grid);
  const size_t threads = size_t(l.block.x) * l.block.y * l.block.z;
  if (!blocks || !threads || threads > 1024 || l.block.z > 64 || l.grid.x > 0x7fffffffu ||
      l.grid.y > 65535 || l.grid.z > 65535 || l.shmem > kDynamicSharedMax) {
    snprintf(l.error, sizeof l.error,
             "%s: no GPU launches %zu blocks of %zu threads with %u bytes of shared memory",
             l.kernel->name, blocks, threads, l.shmem);
    l.failed = true;
    return;
  }
#ifdef CUSHIM_TSAN
  l.tsan = __tsan_get_current_fiber();
#endif
  l.start.release(0);
  l.alive = unsigned(blocks * threads);
  uint64_t random = 0x9E3779B97F4A7C15ull * uint64_t(order + 1);
  std::vector<size_t> block_order(blocks), thread_order(threads);
  for (size_t i = 0; i < blocks; ++i) block_order[i] = skip + i;
  for (size_t i = 0; i < threads; ++i) thread_order[i] = i;
  arrange(block_order, order, random);
  arrange(thread_order, order, random);
  size_t next = 0;
  Blocks live;
  while (!l.failed && (next < blocks || !live.empty())) {
    while (live.size() < resident && next < blocks)
      live.push_back(make_block(l, block_order[next++]));
    bool moved = false;
    for (size_t b = 0; b < live.size() && !l.failed; ++b) {
      if (order > 1) arrange(thread_order, order, random);
      for (size_t i : thread_order) {
        Fiber &f = live[b]->fibers[i];
        if (f.done || (f.waits && f.waits->gen == f.waits_gen)) continue;
        f.waits = nullptr;
        moved = true;
        to_fiber(f);
        if (l.failed) break;
      }
    }
    if (!l.failed && !moved) report_deadlock(l, live);
    for (size_t b = live.size(); b-- > 0;)
      if (!live[b]->alive) {
        drop_block(l, live[b]);
        live.erase(live.begin() + b);
      }
  }
  for (auto &b : live) drop_block(l, b);  // left over after a failure
  l.end.acquire(0);
  end_fibers(l);
  l.ended.clear();
  for (char *s : l.stacks) munmap(s, kStack);
}

}  // namespace cushim

// ------------------------------------------------------------------ what cpu_cuda.py calls
extern "C" const char *cushim_signature(int kernel) { return cushim_kernels[kernel].signature; }

extern "C" int cushim_run(int kernel, const cushim::Config *c, void **args, char *error,
                          size_t error_size) {
  cushim::Launch l;
  l.kernel = &cushim_kernels[kernel];
  l.args = args;
  l.grid = dim3(c->grid[0], c->grid[1], c->grid[2]);
  l.block = dim3(c->block[0], c->block[1], c->block[2]);
  l.shmem = c->shmem;
  cushim::g_launch = &l;
  cushim::g_grid_dim = l.grid;
  cushim::g_block_dim = l.block;
  cushim::run_grid(l, c->resident ? c->resident : ~0u, c->order, c->skip);
  cushim::g_launch = nullptr;
  snprintf(error, error_size, "%s", l.error);
  return l.failed;
}

#if defined(CUSHIM_ASAN) || defined(CUSHIM_TSAN)
// A program: a sanitized library cannot be loaded into an ordinary Python.
// argv[1] holds the call (RawModule._run_child writes it), argv[2] gets the arrays after it.
int main(int, char **argv) {
  FILE *in = fopen(argv[1], "rb");
  auto get = [&](void *p, size_t n) {
    if (n && fread(p, n, 1, in) != 1) perror("cushim: input"), exit(3);
  };
  int kernel, n;
  cushim::Config c;
  get(&kernel, 4), get(&c, sizeof c), get(&n, 4);
  std::vector<void *> args(n), data(n);
  // kind: 0 a scalar, 1 an array, 2 + j the array of argument j again
  std::vector<uint64_t> kind(n), size(n);
  for (int i = 0; i < n; ++i) {
    uint64_t offset;
    get(&kind[i], 8), get(&size[i], 8), get(&offset, 8);
    if (kind[i] >= 2) {
      data[i] = data[kind[i] - 2];
    } else {
      // as misaligned as the caller's, and as large as the array and no larger: the sanitizer then
      // sees the first byte past its end
      void *base;
      if (posix_memalign(&base, cushim::kAlignment, std::max<uint64_t>(offset + size[i], 1)))
        exit(3);
#ifdef CUSHIM_ASAN
      __asan_poison_memory_region(base, offset);
#endif
      data[i] = static_cast<char *>(base) + offset;
      get(data[i], size[i]);
    }
    args[i] = kind[i] ? static_cast<void *>(&data[i]) : data[i];
  }
  fclose(in);
  char error[512];
  if (cushim_run(kernel, &c, args.data(), error, sizeof error)) {
    fprintf(stderr, "cushim: %s\n", error);
    return 2;
  }
  FILE *out = fopen(argv[2], "wb");
  for (int i = 0; i < n; ++i)
    if (kind[i] == 1 && size[i]) fwrite(data[i], size[i], 1, out);
  return fclose(out) ? 3 : 0;
}
#endif

#include "cuda_shim.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <random>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// With VQFAST_SHIM_RACES the kernels are built with ThreadSanitizer, this file without: what it does is no CUDA
// thread's doing. Memory of a block is then never used again, because another block's fibers would seem to race for it.
#ifdef VQFAST_SHIM_RACES
#include <sanitizer/tsan_interface.h>
#define WHEN_RACES(...) __VA_ARGS__
constexpr bool kRaces = true;
#else
#define WHEN_RACES(...)
constexpr bool kRaces = false;
#endif

#ifdef __x86_64__
// Not swapcontext: it makes a system call each time, which is most of the simulation's cost.
extern "C" void shim_switch(void **from, void *to);
asm(R"(
.text
.type shim_switch, @function
shim_switch:
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
.size shim_switch, . - shim_switch
)");
#else
#include <ucontext.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;
int shim_current_device = 0;

namespace shim {

Settings settings;
void (*block_begins)() = nullptr;
bool (*background)(bool) = nullptr;

namespace {

constexpr size_t kPlainSharedBytes = 48 << 10;
constexpr size_t kStackBytes = kRaces ? 16 << 10 : 256 << 10;

enum class State { ready, at_barrier, at_warp, waiting, done };

// Where a stack of execution stands while it does not run.
#ifdef __x86_64__
struct Context {
  void *stack_pointer;
};
void start_at(Context &context, void *stack, void (*entry)()) {
  void **top = reinterpret_cast<void **>(static_cast<char *>(stack) + kStackBytes) - 8;
  memset(top, 0, 8 * sizeof *top);
  top[6] = reinterpret_cast<void *>(entry);  // six registers are popped first
  context.stack_pointer = top;
}
void swap(Context &from, const Context &to) { shim_switch(&from.stack_pointer, to.stack_pointer); }
#else
typedef ucontext_t Context;
void start_at(Context &context, void *stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
void swap(Context &from, const Context &to) { swapcontext(&from, &to); }
#endif

struct Fiber {
  Context context;
  void *stack;
  State state;
  unsigned thread;
  int line;  // of the barrier
  unsigned barriers, barriers_or;
  const std::function<bool()> *passed;
  const std::function<void(char *, size_t)> *describe;
  void *fake_stack;
  void *tsan;
};

struct Warp {
  uint64_t values[2][32];  // two in turn: a lane may be one operation ahead of another that still reads
  unsigned arrived;
  unsigned generation;
  char *tags;
};

std::vector<Fiber *> fibers;
std::vector<Warp> warps;
Fiber *current;
Context scheduler;
[[maybe_unused]] const void *scheduler_stack;
[[maybe_unused]] size_t scheduler_stack_bytes;
const std::function<void()> *kernel_body;

struct SharedVariable {
  const char *file;
  int line;
  void *memory;
};
SharedVariable shared[32];
int shared_count;
size_t shared_total, shared_limit;
bool block_any[3];
// What ThreadSanitizer orders threads by: two of each in turn, as no thread is more than one barrier ahead.
char *block_tags;
[[maybe_unused]] char *end_tag;
[[maybe_unused]] void *main_fiber;
unsigned char *dynamic_shared;
size_t dynamic_bytes;
std::map<const void *, int> allowed;

// Never given back, and not through malloc, which ThreadSanitizer counts as a write of the calling thread.
char *arena(size_t bytes) {
  constexpr size_t kBytes = (size_t)8 << 30;
  static char *next = static_cast<char *>(
      mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  static char *const end = next + kBytes;
  if (next == MAP_FAILED || (size_t)(end - next) < bytes) fail("no memory for shared variables");
  char *memory = next;
  next += (bytes + 63) / 64 * 64;
  return memory;
}

void switch_to(Fiber *fiber) {
  current = fiber;
  WHEN_RACES(__tsan_switch_to_fiber(fiber->tsan, __tsan_switch_to_fiber_no_sync);)
  threadIdx = dim3(fiber->thread, 0, 0);
#ifdef __SANITIZE_ADDRESS__
  void *fake;
  __sanitizer_start_switch_fiber(&fake, fiber->stack, kStackBytes);
#endif
  swap(scheduler, fiber->context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void give_way(State state) {
  Fiber *own = current;
  own->state = state;
  WHEN_RACES(__tsan_switch_to_fiber(main_fiber, __tsan_switch_to_fiber_no_sync);)
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(state == State::done ? nullptr : &own->fake_stack, scheduler_stack,
                                 scheduler_stack_bytes);
#endif
  swap(own->context, scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(own->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void run_fiber() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  (*kernel_body)();
  WHEN_RACES(__tsan_release(end_tag);)
  give_way(State::done);
}

template <typename T>
void arrange(std::vector<T> &items, unsigned seed) {
  if (settings.order == 1) std::reverse(items.begin(), items.end());
  if (settings.order > 1) std::shuffle(items.begin(), items.end(), std::mt19937(settings.order + seed));
}

void run_block(unsigned threads, size_t own_dynamic_bytes) {
  dynamic_bytes = own_dynamic_bytes;
  shared_total = 0;
  shared_count = 0;
  std::fill_n(block_any, 3, false);
  dynamic_shared = static_cast<unsigned char *>(shared_memory("", 0, dynamic_bytes));
  if (block_begins) block_begins();
  while (fibers.size() < threads) {
    Fiber *fiber = new Fiber();
    fiber->stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fiber->stack == MAP_FAILED) fail("no memory for a stack");
    fibers.push_back(fiber);
  }
  warps.assign(threads / 32, Warp());
  for (Warp &warp : warps) warp.tags = kRaces ? arena(16) : nullptr;
  block_tags = kRaces ? arena(16) : nullptr;
  std::vector<Fiber *> order;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber *fiber = fibers[i];
    fiber->state = State::ready;
    fiber->thread = i;
    fiber->barriers = fiber->barriers_or = 0;
    fiber->fake_stack = nullptr;
    // Mapped anew, a stack has no past accesses by another block's thread.
    WHEN_RACES(mmap(fiber->stack, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);)
    WHEN_RACES(fiber->tsan = __tsan_create_fiber(0);)
    start_at(fiber->context, fiber->stack, run_fiber);
    order.push_back(fiber);
  }
  arrange(order, blockIdx.x);

  unsigned done = 0;
  while (done < threads) {
    bool moved = false;
    for (Fiber *fiber : order) {
      if (fiber->state != State::ready && !(fiber->state == State::waiting && (*fiber->passed)())) continue;
      switch_to(fiber);
      moved = true;
      done += fiber->state == State::done;
    }
    if ((background && background(!moved)) || moved) continue;
    // Everyone waits: for the barrier, or for ever.
    for (unsigned i = 0; i < threads; ++i) {
      const Fiber *fiber = fibers[i];
      if (fiber->state == State::waiting) {
        char what[200];
        (*fiber->describe)(what, sizeof what);
        fail("thread %u waits for ever: %s", i, what);
      }
    }
    for (unsigned i = 0; i < threads; ++i) {
      const Fiber *fiber = fibers[i];
      if (fiber->state == State::done) fail("thread %u ended while others wait", i);
      if (fiber->state == State::at_warp) fail("thread %u waits for its warp, the others do not come", i);
      if (fiber->line != fibers[0]->line)
        fail("threads 0 and %u wait at different barriers, lines %d and %d", i, fibers[0]->line, fiber->line);
    }
    for (Fiber *fiber : order) fiber->state = State::ready;
  }
  WHEN_RACES(for (unsigned i = 0; i < threads; ++i) __tsan_destroy_fiber(fibers[i]->tsan);)
  for (int i = 0; i < shared_count && !kRaces; ++i) free(shared[i].memory);
}

}  // namespace

void fail(const char *what, ...) {
  va_list arguments;
  va_start(arguments, what);
  fprintf(stderr, "cuda_shim: block (%u, %u): ", blockIdx.x, blockIdx.y);
  vfprintf(stderr, what, arguments);
  fprintf(stderr, "\n");
  va_end(arguments);
  _Exit(3);
}

void *shared_memory(const char *file, int line, size_t bytes) {
  for (int i = 0; i < shared_count; ++i)
    if (shared[i].line == line && shared[i].file == file) return shared[i].memory;
  shared_total += bytes;
  if (shared_total > shared_limit)
    fail("%zu bytes of shared memory, dynamic and the kernel's own, where %zu were allowed", shared_total,
         shared_limit);
  if (shared_count == 32) fail("too many shared variables");
  SharedVariable &variable = shared[shared_count++] = {file, line, nullptr};
  if (kRaces) return variable.memory = arena(bytes);
  if (posix_memalign(&variable.memory, 16, bytes)) fail("no memory");
  return memset(variable.memory, 0xff, bytes);
}

unsigned char *dynamic_shared_memory() { return dynamic_shared; }
size_t dynamic_shared_bytes() { return dynamic_bytes; }

void wait_until(const std::function<bool()> &passed, const std::function<void(char *, size_t)> &describe) {
  if (passed()) return;
  current->passed = &passed;
  current->describe = &describe;
  give_way(State::waiting);
}

void barrier(const char *, int line) {
  Fiber *own = current;
  own->line = line;
  WHEN_RACES(char *tag = block_tags + own->barriers++ % 2; __tsan_release(tag);)
  give_way(State::at_barrier);
  WHEN_RACES(__tsan_acquire(tag);)
}

void warp_barrier() {
  WHEN_RACES(Warp &warp = warps[current->thread / 32]; char *tag = warp.tags + warp.generation % 2;
             __tsan_release(tag);)
  exchange(0);
  WHEN_RACES(__tsan_acquire(tag);)
}

bool barrier_or(const char *file, int line, bool own) {
  // Three in turn: one is read, the next is set, the one after is made ready.
  bool &any = block_any[current->barriers_or % 3];
  block_any[++current->barriers_or % 3] = false;
  any |= own;
  barrier(file, line);
  return any;
}

unsigned lane() { return current->thread % 32; }

const uint64_t *exchange(uint64_t own) {
  Warp &warp = warps[current->thread / 32];
  const unsigned generation = warp.generation;
  uint64_t *values = warp.values[generation % 2];
  values[lane()] = own;
  warp.arrived |= 1u << lane();
  if (warp.arrived == 0xffffffffu) {
    warp.arrived = 0;
    ++warp.generation;
    const unsigned first = current->thread / 32 * 32;
    for (unsigned i = first; i < first + 32; ++i) fibers[i]->state = State::ready;
    return values;
  }
  give_way(State::at_warp);
  return values;
}

void allow_shared_bytes(const void *kernel, int bytes) {
  if (allowed.count(kernel) && bytes < allowed[kernel])
    fail("%d bytes of dynamic shared memory allowed instead of %d: another thread may launch with more", bytes,
         allowed[kernel]);
  allowed[kernel] = bytes;
}

int launch(dim3 grid, dim3 block, size_t shared_bytes, const void *kernel, const std::function<void()> &body) {
  // Without leave a block has 48 KB for dynamic memory and the kernel's own variables together.
  const bool more = allowed.count(kernel);
  const size_t most = more ? (size_t)allowed[kernel] : kPlainSharedBytes;
  shared_limit = std::min((size_t)settings.shared_bytes, more ? SIZE_MAX : kPlainSharedBytes);
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || block.x == 0 || block.x > 1024 ||
      block.x % 32 != 0 || block.y != 1 || block.z != 1 || grid.z != 1 || shared_bytes > most)
    return cudaErrorInvalidConfiguration;
  gridDim = grid;
  blockDim = block;
  kernel_body = &body;
  WHEN_RACES(main_fiber = __tsan_get_current_fiber(); end_tag = arena(8);)
  std::vector<std::pair<unsigned, unsigned>> blocks;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y});
  arrange(blocks, 0);
  for (const auto &at : blocks) {
    blockIdx = dim3(at.first, at.second, 0);
    run_block(block.x, shared_bytes);
  }
  WHEN_RACES(__tsan_acquire(end_tag);)
  return cudaSuccess;
}

}  // namespace shim

#include "hopper_shim.h"

#include <stdio.h>

#include <algorithm>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "cuda_shim.h"

#ifdef VQFAST_SHIM_RACES
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read_range(void *at, size_t bytes);
void __tsan_write_range(void *at, size_t bytes);
void AnnotateIgnoreReadsBegin(const char *file, int line);
void AnnotateIgnoreReadsEnd(const char *file, int line);
void AnnotateIgnoreWritesBegin(const char *file, int line);
void AnnotateIgnoreWritesEnd(const char *file, int line);
}
#define WHEN_RACES(...) __VA_ARGS__
#else
#define WHEN_RACES(...)
#endif

namespace shim {
namespace {

struct Phases {
  int arrivals, pending;
  int64_t bytes;  // expected and not yet there
  unsigned ended;
  bool published;
  char *tags;  // two in turn, what ThreadSanitizer orders by; never used again
};
std::map<const uint64_t *, Phases> barriers;

// While it lives, ThreadSanitizer does not look: what the C library does for these books is no CUDA thread's doing.
struct Unwatched {
  Unwatched() { WHEN_RACES(AnnotateIgnoreReadsBegin("", 0); AnnotateIgnoreWritesBegin("", 0);) }
  ~Unwatched() { WHEN_RACES(AnnotateIgnoreWritesEnd("", 0); AnnotateIgnoreReadsEnd("", 0);) }
};

struct Copy {
  unsigned char *to;
  const void *from;
  size_t bytes;
  uint64_t *arrival;
};
std::vector<Copy> copies;

struct Product {
  float *sums;
  uint64_t a, b;
  bool add;
};
struct Group {
  std::vector<Product> products;
  bool made;
};
struct Thread {
  std::deque<Group> groups;                    // the last one is still open
  std::map<float *, std::vector<float>> made;  // what sums become once they are waited for
  std::set<float *> fenced;
  size_t issued;
};
std::vector<Thread> threads;
// The products of each warpgroup, as its first thread to come has issued them.
std::vector<std::vector<std::pair<uint64_t, uint64_t>>> issued;
std::mt19937 chance;

// Of arrivals and of bytes, in a phase of a barrier.
constexpr int kMostCounted = (1 << 20) - 1;

// Shared memory that was declared static comes first; dynamic memory need not start at a multiple of more than 16.
constexpr uint32_t kDynamicStart = 0x7c10;

Phases &phases(const uint64_t *barrier) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) fail("a barrier that was not initialised");
  return found->second;
}

void end_if_complete(Phases &state) {
  if (state.pending > 0 || state.bytes != 0) return;
  state.pending = state.arrivals;
  ++state.ended;
}

void land(size_t which) {
  const Copy copy = copies[which];
  copies.erase(copies.begin() + (ptrdiff_t)which);
  memcpy(copy.to, copy.from, copy.bytes);
  Phases &state = phases(copy.arrival);
  state.bytes -= (int64_t)copy.bytes;
  end_if_complete(state);
}

bool happens(bool idle) {
  const Unwatched unwatched;
  const size_t under_way = copies.size();
  if (settings.order == 0) {
    if (idle && under_way) land(0);
  } else if (settings.order == 1) {
    while (!copies.empty()) land(copies.size() - 1);
  } else {
    for (size_t i = copies.size(); i-- > 0;)
      if (chance() % 4 == 0) land(i);
    if (idle && under_way && copies.size() == under_way) land(chance() % copies.size());
  }
  return copies.size() != under_way;
}

void begin_block() {
  const Unwatched unwatched;
  if (!copies.empty()) fail("the block before ended with copies under way");
  for (const Thread &thread : threads)
    for (const Group &group : thread.groups)
      if (!group.products.empty()) fail("the block before ended with products under way");
  barriers.clear();
  threads.assign(blockDim.x, Thread());
  for (Thread &thread : threads) thread.groups.push_back({});
  issued.assign((blockDim.x + 127) / 128, {});
  chance.seed(settings.order + 7919 * blockIdx.x);
}
const bool installed = (block_begins = begin_block, background = happens, true);

// 16 bytes of a row: chunk 0 or 1 of the sixteen features that an operand names.
const unsigned char *operand(uint64_t descriptor, unsigned row, unsigned chunk) {
  constexpr uint64_t kUsed = 0xc000000000000000ull | 0x3fffull << 32 | 0x3fffull << 16 | 0x3fffull;
  if (descriptor & ~kUsed) fail("descriptor %016llx has bits set that must be 0", (unsigned long long)descriptor);
  const unsigned mode = (unsigned)(descriptor >> 62);
  if (mode == 0)
    fail("descriptor %016llx: rows without a permutation are not modelled", (unsigned long long)descriptor);
  const uint32_t row_bytes = mode == 1 ? 128 : mode == 2 ? 64 : 32;
  const uint32_t start = (uint32_t)(descriptor & 0x3fff) * 16, step = (uint32_t)(descriptor >> 32 & 0x3fff) * 16;
  uint32_t at = start + row / 8 * step + row % 8 * row_bytes + chunk * 16;
  at ^= (at >> 7 & (row_bytes / 16 - 1)) << 4;
  if (at < kDynamicStart || at + 16 > kDynamicStart + dynamic_shared_bytes())
    fail("descriptor %016llx leads out of shared memory", (unsigned long long)descriptor);
  return dynamic_shared_memory() + (at - kDynamicStart);
}

void widen_row(uint64_t descriptor, unsigned row, float (&values)[16]) {
  for (unsigned chunk = 0; chunk < 2; ++chunk) {
    uint16_t bits[8];
    memcpy(bits, operand(descriptor, row, chunk), 16);
    for (int i = 0; i < 8; ++i) values[8 * chunk + i] = __uint_as_float((uint32_t)bits[i] << 16);
  }
}

// The reads of a warp, as its first lane's.
void note_reads([[maybe_unused]] uint64_t a, [[maybe_unused]] uint64_t b) {
  WHEN_RACES(if (lane() != 0) return; for (unsigned chunk = 0; chunk < 2; ++chunk) {
    for (unsigned row = 0; row < 16; ++row)
      __tsan_read_range((void *)operand(a, threadIdx.x / 32 % 4 * 16 + row, chunk), 16);
    for (unsigned row = 0; row < 128; ++row) __tsan_read_range((void *)operand(b, row, chunk), 16);
  })
}

// Any order of the sum and any rounding of it that keeps the bound would do.
void make(Thread &thread, const Product &product) {
  std::vector<float> &sums = thread.made.at(product.sums);
  const unsigned first = threadIdx.x / 32 % 4 * 16 + lane() / 4;
  float a[2][16], b[16];
  for (unsigned r = 0; r < 2; ++r) widen_row(product.a, first + 8 * r, a[r]);
  for (unsigned j = 0; j < 16; ++j)
    for (unsigned e = 0; e < 2; ++e) {
      widen_row(product.b, 8 * j + 2 * (lane() % 4) + e, b);
      for (unsigned r = 0; r < 2; ++r) {
        float &sum = sums[4 * j + 2 * r + e];
        if (!product.add) sum = 0;
        for (int k = 0; k < 16; ++k) sum += a[r][k] * b[k];
      }
    }
}

void make(Thread &thread, Group &group) {
  if (group.made) return;
  for (const Product &product : group.products) make(thread, product);
  group.made = true;
}

bool under_way(const Thread &thread, const float *sums) {
  for (const Group &group : thread.groups)
    for (const Product &product : group.products)
      if (product.sums == sums) return true;
  return false;
}

}  // namespace

uint32_t shared_address(const void *shared) {
  const ptrdiff_t offset = static_cast<const unsigned char *>(shared) - dynamic_shared_memory();
  if (offset < 0 || offset >= (ptrdiff_t)dynamic_shared_bytes()) fail("an address outside of dynamic shared memory");
  return kDynamicStart + (uint32_t)offset;
}

void initialise(uint64_t *barrier, int arrivals) {
  const Unwatched unwatched;
  if (arrivals < 1 || arrivals > kMostCounted) fail("a barrier for %d arrivals", arrivals);
  if ((uintptr_t)barrier % 8 != 0) fail("a barrier at %p", (void *)barrier);
  Phases state = {};
  state.arrivals = state.pending = arrivals;
  WHEN_RACES(state.tags = new char[2];)
  if (!barriers.emplace(barrier, state).second) fail("a barrier that is initialised twice");
}

void publish_barriers() {
  for (auto &entry : barriers) entry.second.published = true;
}

void arrive(uint64_t *barrier, int expected_bytes) {
  Phases &state = phases(barrier);
  if (state.pending < 1) fail("one arrival too many at a barrier for %d", state.arrivals);
  WHEN_RACES(__tsan_release(state.tags + state.ended % 2);)
  state.bytes += expected_bytes;
  if (state.bytes > kMostCounted) fail("a barrier that expects %lld bytes", (long long)state.bytes);
  --state.pending;
  end_if_complete(state);
}

void wait(uint64_t *barrier, int parity) {
  Phases &state = phases(barrier);
  if (parity != 0 && parity != 1) fail("a wait for parity %d", parity);
  wait_until([&] { return (int)(state.ended % 2) != parity; },
             [&](char *what, size_t room) {
               snprintf(what, room, "for parity %d of a barrier after %u phases; %d of %d arrivals and %lld bytes lack",
                        parity, state.ended, state.pending, state.arrivals, (long long)state.bytes);
             });
  WHEN_RACES(__tsan_acquire(state.tags + parity);)
}

void copy_in_bulk(void *shared, const void *global, int bytes, uint64_t *arrival) {
  if (bytes <= 0 || bytes % 16 != 0 || (uintptr_t)global % 16 != 0 || shared_address(shared) % 16 != 0)
    fail("a copy of %d bytes from %p to %#x", bytes, global, shared_address(shared));
  shared_address(static_cast<unsigned char *>(shared) + bytes - 1);
  if (!phases(arrival).published) fail("a copy counts on a barrier that was not published");
  WHEN_RACES(__tsan_read_range((void *)global, (size_t)bytes); __tsan_write_range(shared, (size_t)bytes);
             __tsan_release(phases(arrival).tags + phases(arrival).ended % 2);)
  const Unwatched unwatched;
  memset(shared, 0xff, (size_t)bytes);
  copies.push_back({static_cast<unsigned char *>(shared), global, (size_t)bytes, arrival});
}

void begin_products(float (&sums)[64]) {
  const Unwatched unwatched;
  threads[threadIdx.x].fenced.insert(sums);
}

void product(float (&sums)[64], uint64_t a, uint64_t b, bool add) {
  note_reads(a, b);
  const Unwatched unwatched;
  Thread &thread = threads[threadIdx.x];
  if (!thread.fenced.count(sums)) fail("products without the fence before their sums");
  auto &own = issued[threadIdx.x / 128];
  if (own.size() == thread.issued) own.push_back({a, b});
  if (own[thread.issued] != std::make_pair(a, b)) fail("the threads of a warpgroup issue different products");
  ++thread.issued;
  thread.made.emplace(sums, std::vector<float>(sums, sums + 64));
  std::fill_n(sums, 64, NAN);
  thread.groups.back().products.push_back({sums, a, b, add});
}

void end_product_group() {
  const Unwatched unwatched;
  Thread &thread = threads[threadIdx.x];
  // In the order of their issue.
  if (settings.order == 1 || (settings.order > 1 && chance() % 2))
    for (Group &group : thread.groups) make(thread, group);
  thread.groups.push_back({});
}

void wait_for_products(int most) {
  Thread &thread = threads[threadIdx.x];
  for (size_t i = 0; (int)(thread.groups.size() - i) - 1 > most; ++i)
    for (const Product &product : thread.groups[i].products) note_reads(product.a, product.b);
  const Unwatched unwatched;
  while ((int)thread.groups.size() - 1 > most) {
    make(thread, thread.groups.front());
    thread.groups.pop_front();
  }
  for (auto made = thread.made.begin(); made != thread.made.end();) {
    if (under_way(thread, made->first)) {
      ++made;
      continue;
    }
    std::copy(made->second.begin(), made->second.end(), made->first);
    thread.fenced.erase(made->first);
    made = thread.made.erase(made);
  }
  exchange(0);  // of the whole warp
}

}  // namespace shim

#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <string>

namespace vqfast {

namespace generic {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512bf16::bf16_pairs {
extern const ScoreEngine engine;
}
namespace amx::amx_tiles {
extern const ScoreEngine engine;
}
#endif

namespace {

struct Choice {
  Kernels kernels;
  std::string error;
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() {
  unsigned a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
// The processor has the tiles, and the kernel lets this process use them.
bool has_amx() {
  unsigned a, b, c, d;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Kernels named(const char *name, Kernels kernels, const ScoreEngine *second, const ScoreEngine *third = nullptr) {
  kernels.name = name;
  kernels.engines[1] = second;
  kernels.engines[2] = third;
  return kernels;
}

// The widest set, or the one named; false if this processor has none such.
bool find(const char *name, Kernels &found) {
  const auto wanted = [&](const char *set) { return !name || std::strcmp(name, set) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (wanted("amx") && has_amx()) {
    found = named("amx", avx512::table, &amx::amx_tiles::engine,
                  has_avx512bf16() ? &avx512bf16::bf16_pairs::engine : nullptr);
    return true;
  }
  // Not chosen on its own on Intel's cores: measured on a Xeon with AMX, these scores took twice the time of float32's
  // and left more rows open.
  if (wanted("avx512bf16") && has_avx512bf16() && (name || !__builtin_cpu_is("intel"))) {
    found = named("avx512bf16", avx512::table, &avx512bf16::bf16_pairs::engine);
    return true;
  }
  if (wanted("avx512") && has_avx512()) {
    found = avx512::table;
    return true;
  }
  if (wanted("avx2") && has_avx2()) {
    found = avx2::table;
    return true;
  }
#endif
  if (wanted("generic")) found = generic::table;
  return wanted("generic");
}

const Choice &choice() {
  static const Choice made = [] {
    Choice c;
    const char *name = std::getenv("VQFAST_ISA");
    if (name && *name && find(name, c.kernels)) return c;
    find(nullptr, c.kernels);
    if (name && *name)
      c.error = std::string("VQFAST_ISA=") + name +
                " is not an instruction set of this processor (amx, avx512bf16, avx512, avx2, generic); using " +
                c.kernels.name;
    return c;
  }();
  return made;
}

}  // namespace

const Kernels &kernels() { return choice().kernels; }
const char *isa_error() { return choice().error.empty() ? nullptr : choice().error.c_str(); }

}  // namespace vqfast

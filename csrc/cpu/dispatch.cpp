#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <string>

namespace vqfast {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
#endif
namespace generic {
extern const Kernels table;
}

namespace {

struct Choice {
  const Kernels *kernels;
  std::string error;
};

// Widest first.
const Kernels *widest_at_most(const char *name) {
  [[maybe_unused]] const auto wanted = [&](const char *set) { return !name || std::strcmp(name, set) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (wanted("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return &avx512::table;
  if (wanted("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return &avx2::table;
#endif
  return wanted("generic") ? &generic::table : nullptr;
}

const Choice &choice() {
  static const Choice made = [] {
    const char *name = std::getenv("VQFAST_ISA");
    if (const Kernels *found = widest_at_most(name && *name ? name : nullptr)) return Choice{found, ""};
    const Kernels *fallback = widest_at_most(nullptr);
    return Choice{fallback, std::string("VQFAST_ISA=") + name +
                                " is not an instruction set of this processor (avx512, avx2, generic); using " +
                                fallback->name};
  }();
  return made;
}

}  // namespace

const Kernels &kernels() { return *choice().kernels; }
const char *isa_error() { return choice().error.empty() ? nullptr : choice().error.c_str(); }

}  // namespace vqfast

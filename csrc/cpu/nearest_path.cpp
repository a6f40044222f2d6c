#include "nearest_path.h"

#include <cstdlib>
#include <cstring>

#include "dispatch.h"
#include "nearest_paths.h"

namespace vqfast {
namespace {

constexpr int64_t kGroups[] = {1, 2, 4};

// For an instruction set without a row in the table: bfloat16 from the size on that fills its steps; and the more codes
// and the shorter they are, the larger the group, for comparing a cell's codes costs most where they are long or few.
SearchPath by_rule(int64_t K, int64_t D, int engine) {
  const Kernels &isa = kernels();
  if (engine == kAnyEngine) engine = isa.engines[1] && D >= isa.engines[1]->least_features ? 1 : 0;
  return {engine, K < 64 * isa.engines[engine]->panel_codes || D >= 128 ? 1 : D >= 32 ? 2 : 4};
}

// False where this processor has no such path.
bool read_path(const char *name, SearchPath &path) {
  const char *slash = std::strchr(name, '/');
  if (!slash || !slash[1] || slash[2]) return false;
  const auto is = [&](const char *engine) {
    return !std::strncmp(engine, name, slash - name) && !engine[slash - name];
  };
  for (int engine = 0; engine < kMostEngines && kernels().engines[engine]; ++engine)
    for (const int64_t group : kGroups)
      if (is(kernels().engines[engine]->name) && slash[1] == '0' + group) {
        path = {engine, group};
        return true;
      }
  return false;
}

bool is_unfused(const char *name) { return std::strcmp(name, kUnfused) == 0; }

// What the table says of this instruction set, read once.
class Table {
 public:
  Table() : shapes_(kernels().name) {
    for (int i = 0; i < shapes_.count(); ++i) {
      Fastest fastest = {};
      for (int engine = kAnyEngine; engine < kMostEngines; ++engine) fastest.by[engine + 1] = fastest_by(i, engine);
      SearchPath path;
      const char *name = shapes_.fastest(i, [&](const char *n) { return is_unfused(n) || read_path(n, path); });
      fastest.unfused = name && is_unfused(name);
      fastest_.push_back(fastest);
    }
  }

  // False: not measured.
  bool find(int64_t N, int64_t K, int64_t D, int engine, SearchPath &path) const {
    const int i = shapes_.nearest(N, K, D);
    if (i < 0 || fastest_[i].by[engine + 1].group == 0) return false;
    path = fastest_[i].by[engine + 1];
    return true;
  }
  bool unfused(int64_t N, int64_t K, int64_t D) const {
    const int i = shapes_.nearest(N, K, D);
    return i >= 0 && fastest_[i].unfused;
  }

 private:
  struct Fastest {
    SearchPath by[1 + kMostEngines];  // any engine, each engine; without a group where it was not measured
    bool unfused;                     // is faster than any of them
  };

  SearchPath fastest_by(int i, int engine) const {
    SearchPath path;
    const char *name = shapes_.fastest(
        i, [&](const char *n) { return read_path(n, path) && (engine == kAnyEngine || path.engine == engine); });
    return name && read_path(name, path) ? path : SearchPath{};
  }

  MeasuredShapes shapes_;
  std::vector<Fastest> fastest_;
};

const Table &table() {
  static const Table read;
  return read;
}

// VQFAST_CPU_SCORES, or null.
const char *forced() {
  const char *name = std::getenv("VQFAST_CPU_SCORES");
  return name && *name ? name : nullptr;
}

}  // namespace

bool choose_path(int64_t N, int64_t K, int64_t D, int engine, SearchPath &path) {
  const char *name = forced();
  if (name && !is_unfused(name)) {
    if (!read_path(name, path)) return false;
    // A codebook that is packed for another engine stays with that one.
    if (engine != kAnyEngine) path.engine = engine;
    return true;
  }
  if (!table().find(N, K, D, engine, path)) path = by_rule(K, D, engine);
  return true;
}

bool choose_unfused(int64_t N, int64_t K, int64_t D) {
  const char *name = forced();
  return name ? is_unfused(name) : table().unfused(N, K, D);
}

std::string path_name(const SearchPath &path) {
  return std::string(kernels().engines[path.engine]->name) + "/" + std::to_string(path.group);
}

std::vector<std::string> path_names() {
  std::vector<std::string> names;
  for (int engine = 0; engine < kMostEngines && kernels().engines[engine]; ++engine)
    for (const int64_t group : kGroups) names.push_back(path_name({engine, group}));
  names.push_back(kUnfused);
  return names;
}

}  // namespace vqfast

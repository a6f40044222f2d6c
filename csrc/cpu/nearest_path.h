// How a search goes through its codebook: by which score engine, and how many panels share a maximum.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

namespace vqfast {

struct SearchPath {
  int engine;  // of Kernels::engines
  int64_t
      group;  // panels whose maxima are one: the more, the fewer are written, and the more codes each leaves to compare
};

constexpr int kAnyEngine = -1;
constexpr int64_t kManyRows = 8192;  // that a prepared codebook is taken to be searched for

constexpr const char *kUnfused = "unfused";  // a library's product, which whoever calls this library has to make

// The path that VQFAST_CPU_SCORES names; else the fastest of the measured size next to this one; else, where nothing
// was measured on this instruction set, what the rule in nearest_path.cpp says. With an engine given, for which a
// codebook is packed already, only the group is chosen. False: VQFAST_CPU_SCORES names no path.
bool choose_path(int64_t N, int64_t K, int64_t D, int engine, SearchPath &path);
// Whether the unfused way is faster than that path, or is the one named.
bool choose_unfused(int64_t N, int64_t K, int64_t D);

// "float32/2": the engine's name and the group. All of them are those of the instruction set in use, and "unfused".
std::string path_name(const SearchPath &path);
std::vector<std::string> path_names();

}  // namespace vqfast

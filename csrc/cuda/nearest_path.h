// What the scores of a search are made of.
#pragma once

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "launch.h"
#include "nearest_paths.h"

namespace vqfast {

enum class Scores { by_size, float32, bfloat16, hopper };

// False where `name` is no kind of scores.
inline bool named_scores(const char *name, Scores &scores) {
  const auto is = [&](const char *kind) { return std::strcmp(name, kind) == 0; };
  if (is("float32"))
    scores = Scores::float32;
  else if (is("bfloat16"))
    scores = Scores::bfloat16;
  else if (is("hopper"))
    scores = Scores::hopper;
  else
    return false;
  return true;
}

// VQFAST_CUDA_SCORES; false where it names no kind of scores.
inline bool read_scores(Scores &wanted) {
  const char *name = std::getenv("VQFAST_CUDA_SCORES");
  wanted = Scores::by_size;
  return !name || !*name || named_scores(name, wanted);
}

// The lines of a compute capability, read once, not in each search.
inline const MeasuredShapes &measured_shapes(int capability) {
  static std::mutex one_at_a_time;
  static std::map<int, MeasuredShapes> known;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  return known.try_emplace(capability, ("sm_" + std::to_string(capability)).c_str()).first->second;
}

// What is wanted where it can serve, else the next best. If nothing is wanted, the fastest that can serve of the
// measured size next to this one. Where nothing was measured on this compute capability: tensor cores from the size on
// that could fill their tiles, which is a guess; and no products of warpgroups, until a device has shown that they are
// right.
inline Scores choose_scores(Scores wanted, int64_t N, int64_t K, int64_t D, const TensorPlan &tensor,
                            const HopperPlan &hopper, bool hopper_built, const MeasuredShapes &shapes) {
  const auto serves = [&](Scores scores) {
    if (scores == Scores::hopper) return hopper_built && hopper.groups > 0;
    return scores != Scores::bfloat16 || tensor.stages > 0;
  };
  if (wanted == Scores::by_size) {
    const int next = shapes.nearest(N, K, D);
    const auto can = [&](const char *name) { return named_scores(name, wanted) && serves(wanted); };
    const char *name = next >= 0 ? shapes.fastest(next, can) : nullptr;
    if (!name || !named_scores(name, wanted)) wanted = N >= 512 && K >= 512 ? Scores::bfloat16 : Scores::float32;
  }
  if (serves(wanted)) return wanted;
  return serves(Scores::bfloat16) ? Scores::bfloat16 : Scores::float32;
}

}  // namespace vqfast

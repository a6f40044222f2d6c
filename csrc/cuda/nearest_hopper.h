// The kernel of nearest_hopper.cuh is compiled for sm_90a alone, so in a file of its own; where that target was not
// asked for, VQFAST_HOPPER is not defined and the file is left out.
#pragma once

#include "nearest_candidates.cuh"
#include "runtime.h"

namespace vqfast {

#ifdef VQFAST_HOPPER
constexpr bool kHopperBuilt = true;
#else
constexpr bool kHopperBuilt = false;
#endif

// x: room for whole tiles of rows. plan.groups must not be 0.
void launch_hopper_scores(Launcher &launch, const HopperPlan &plan, const PackedVectors &x, int64_t n,
                          const PackedVectors &codes, const float *bias, const float *reaches,
                          const KeptCandidates &out);

}  // namespace vqfast

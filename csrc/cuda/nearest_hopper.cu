#include "nearest_hopper.h"

#include "nearest_hopper.cuh"

namespace vqfast {

void launch_hopper_scores(Launcher &launch, const HopperPlan &plan, const PackedVectors &x, int64_t n,
                          const PackedVectors &codes, const float *bias, const float *reaches,
                          const KeptCandidates &out) {
  const auto kernel = plan.groups == 2  ? nearest_hopper_scores<2, 7>
                      : plan.panel == 7 ? nearest_hopper_scores<3, 7>
                      : plan.panel == 6 ? nearest_hopper_scores<3, 6>
                                        : nearest_hopper_scores<3, 5>;
  launch(kernel, hopper_scores_plan(plan, n, launch.limits()), plan, x, n, codes, bias, reaches, out);
}

}  // namespace vqfast

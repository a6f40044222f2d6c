"""All ops, for the tests and the benchmarks."""

from vqfast.kernels.codebook_stats.spec import SPEC as CODEBOOK_STATS
from vqfast.kernels.diffusion_loss.spec import SPEC as DIFFUSION_LOSS
from vqfast.kernels.dynamic_lookup.spec import BACKWARD_SPEC as DYNAMIC_LOOKUP_BACKWARD
from vqfast.kernels.dynamic_lookup.spec import SPEC as DYNAMIC_LOOKUP
from vqfast.kernels.grain_entropy.spec import SPEC as GRAIN_ENTROPY
from vqfast.kernels.lookup.spec import BACKWARD_SPEC as LOOKUP_BACKWARD
from vqfast.kernels.lookup.spec import SPEC as LOOKUP
from vqfast.kernels.matrix_loss.spec import SPEC as MATRIX_LOSS
from vqfast.kernels.matrix_sample.spec import SPEC as MATRIX_SAMPLE
from vqfast.kernels.nearest.spec import SPEC as NEAREST
from vqfast.kernels.p_sample.spec import SPEC as P_SAMPLE
from vqfast.kernels.pack.spec import SPEC as PACK
from vqfast.kernels.position_mask.spec import SPEC as POSITION_MASK
from vqfast.kernels.posterior.spec import BACKWARD_SPEC as POSTERIOR_BACKWARD
from vqfast.kernels.posterior.spec import SPEC as POSTERIOR
from vqfast.kernels.q_sample.spec import SPEC as Q_SAMPLE
from vqfast.kernels.residual_nearest.spec import SPEC as RESIDUAL_NEAREST
from vqfast.kernels.transition_matmul.spec import SPEC as TRANSITION_MATMUL
from vqfast.kernels.unpack.spec import BACKWARD_SPEC as UNPACK_BACKWARD
from vqfast.kernels.unpack.spec import SPEC as UNPACK

SPECS = (
    NEAREST,
    RESIDUAL_NEAREST,
    LOOKUP,
    LOOKUP_BACKWARD,
    CODEBOOK_STATS,
    Q_SAMPLE,
    POSTERIOR,
    POSTERIOR_BACKWARD,
    DIFFUSION_LOSS,
    P_SAMPLE,
    TRANSITION_MATMUL,
    MATRIX_LOSS,
    MATRIX_SAMPLE,
    PACK,
    UNPACK,
    UNPACK_BACKWARD,
    DYNAMIC_LOOKUP,
    DYNAMIC_LOOKUP_BACKWARD,
    POSITION_MASK,
    GRAIN_ENTROPY,
)

"""Benchmarks of residual search: codes and their sum, as tokenisers encode a data set."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from bench.backends import vqfast_backends
from bench.case import PEER, VQFAST, YARDSTICK, Case, Contender, Run, Verdict, judge_indices, relative_error
from bench.exact import exact_nearest
from bench.installed import missing, version_of
from bench.search import addmm_argmax
from vqfast.kernels.residual_nearest.reference import residual_nearest as by_stages
from vqfast.kernels.specs import RESIDUAL_NEAREST
from vqfast.ops import nearest_code, residual_nearest


class ResidualProblem:
    """x (N, D), codebooks (Q, K, D), and what the definition makes of them."""

    def __init__(self, shape: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int):
        self.x, self.codebooks = RESIDUAL_NEAREST.inputs(shape, dtype, device, seed)

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor]:
        return by_stages(self.x, self.codebooks, None, lambda x, codebook, mask: exact_nearest(x, codebook))


def _fused(problem: ResidualProblem):
    def encode() -> tuple[Tensor, Tensor]:
        codes = residual_nearest(problem.x, problem.codebooks)
        return codes.indices, codes.quantized

    return encode


def _searches(problem: ResidualProblem) -> Run:
    """vqfast's search, a stage after the other: what keeping residuals saves."""
    return Run(
        lambda: by_stages(problem.x, problem.codebooks, None, lambda x, codebook, mask: nearest_code(x, codebook))
    )


def _plain(problem: ResidualProblem) -> Run:
    def encode() -> tuple[Tensor, Tensor]:
        left, quantized, indices = problem.x, torch.zeros_like(problem.x), []
        for codebook in problem.codebooks:
            indices.append(addmm_argmax(left, codebook))
            code = embedding(indices[-1], codebook)
            left, quantized = left - code, quantized + code
        return torch.stack(indices, -1), quantized

    return Run(encode)


def _peer(problem: ResidualProblem) -> Run:
    from vector_quantize_pytorch import ResidualVQ

    Q, K, D = problem.codebooks.shape
    module = ResidualVQ(dim=D, num_quantizers=Q, codebook_size=K, rotation_trick=False).to(problem.x.device).eval()
    for layer, codebook in zip(module.layers, problem.codebooks, strict=True):
        layer.codebook = codebook

    @torch.no_grad()
    def encode() -> tuple[Tensor, Tensor]:
        quantized, indices, _ = module(problem.x[None])
        return indices[0], quantized[0]

    return Run(encode)


def _judge(contender: Contender, run: Run, problem: ResidualProblem) -> Verdict:
    indices, quantized = run.call()
    verdict = judge_indices(contender, indices, problem.exact[0])
    error = relative_error(quantized, problem.exact[1].double())
    # A code that differs moves the sum by about its own length.
    wrong = f"quantized is off by {error:.1e}" if error > (0 if contender.role == VQFAST else 3e-2) else ""
    return Verdict(verdict.mismatches, error, verdict.wrong or wrong)


def residual_nearest_case(shape: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    return Case(
        op="residual_nearest",
        shape=shape,
        dtype=dtype,
        device=device,
        problem=lambda seed: ResidualProblem(shape, dtype, device, seed),
        judge=_judge,
        contenders=(
            *vqfast_backends(device, ("residual_nearest",), _fused, reference=False),
            Contender("a search a stage", YARDSTICK, _searches),
            Contender("torch addmm + argmax a stage", PEER, _plain, torch.__version__),
            Contender(
                "vector-quantize-pytorch (eval)",
                PEER,
                _peer,
                version_of("vector-quantize-pytorch"),
                missing("vector_quantize_pytorch"),
                captured=False,
            ),
        ),
        bytes_moved=RESIDUAL_NEAREST.bytes_moved(shape, dtype),
        flops=RESIDUAL_NEAREST.flops(shape),
        matmul=True,
    )

"""Benchmarks of a quantiser's training step, and of the codebook statistics in it."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.backends import vqfast_backends
from bench.case import PEER, Case, Contender, Run, Verdict, judge_indices, judge_values, relative_error
from bench.installed import missing, version_of
from bench.search import DECAY, EPS, REFERENCE_ELEMENTS, SearchProblem, addmm_argmax, peer_quantizer
from vqfast.kernels.specs import CODEBOOK_STATS, LOOKUP, LOOKUP_BACKWARD, NEAREST
from vqfast.nn import VectorQuantize
from vqfast.ops import codebook_stats

# ---- training step ---------------------------------------------------------------------------------------------------


class EagerQuantizer(nn.Module):
    """A VQ-VAE quantiser as one writes it in plain torch when one knows better than one-hot products."""

    def __init__(self, codebook: Tensor):
        super().__init__()
        self.register_buffer("codebook", codebook.clone())
        self.register_buffer("cluster_size", codebook.new_ones(len(codebook)))
        self.register_buffer("embed_avg", codebook.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            indices = addmm_argmax(x, self.codebook)
            codes = F.embedding(indices, self.codebook)
            counts = torch.zeros_like(self.cluster_size).index_add_(0, indices, x.new_ones(len(x)))
            sums = torch.zeros_like(self.embed_avg).index_add_(0, indices, x)
            self.cluster_size.lerp_(counts, 1 - DECAY)
            self.embed_avg.lerp_(sums, 1 - DECAY)
            self.codebook.copy_(_averaged(self.cluster_size, self.embed_avg))
        return x + (codes - x).detach(), indices, F.mse_loss(x, codes)


def _averaged(cluster_size: Tensor, embed_avg: Tensor) -> Tensor:
    """The codes of the moving averages, counts smoothed (van den Oord et al. 2017, appendix A.1)."""
    total = cluster_size.sum()
    return embed_avg / ((cluster_size + EPS) / (total + len(cluster_size) * EPS) * total)[:, None]


def _step(module, x: Tensor, grad: Tensor):
    """One training step: (indices, loss, gradient of x). `grad` is what arrives from the decoder."""
    x = x.detach().requires_grad_()

    def step() -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = module(x)
        (grad_x,) = torch.autograd.grad((quantized, loss), x, (grad, torch.ones_like(loss)))
        return indices, loss.detach(), grad_x

    return step


def _resetting(module: nn.Module, codebook: Tensor):
    @torch.no_grad()
    def reset() -> None:
        module.codebook.copy_(codebook)
        module.embed_avg.copy_(codebook)
        module.cluster_size.fill_(1)

    reset()
    return reset


def _vqfast_step(problem: SearchProblem) -> Run:
    K, D = problem.codebook.shape
    module = VectorQuantize(dim=D, codebook_size=K, decay=DECAY, eps=EPS, commitment_weight=1.0).to(problem.x.device)
    reset = _resetting(module, problem.codebook)
    return Run(_step(module, problem.x, problem.grad), reset, lambda: module.codebook)


def _eager_step(problem: SearchProblem, compiled: bool) -> Run:
    module = EagerQuantizer(problem.codebook)
    reset = _resetting(module, problem.codebook)
    forward = torch.compile(module, dynamic=False) if compiled else module
    return Run(_step(forward, problem.x, problem.grad), reset, lambda: module.codebook)


def _peer_step(problem: SearchProblem) -> Run:
    module, reset = peer_quantizer(problem)
    module.train()
    step = _step(module, problem.x[None], problem.grad[None])

    def rows() -> tuple[Tensor, Tensor, Tensor]:
        indices, loss, grad_x = step()
        return indices[0], loss, grad_x[0]

    return Run(rows, reset, lambda: module.codebook)


def _judge_step(contender: Contender, run: Run, problem: SearchProblem) -> Verdict:
    run.reset()
    indices, loss, grad_x = run.call()
    verdict = judge_indices(contender, indices, problem.exact)
    if verdict.wrong:
        return verdict
    x, codes = problem.x.double(), problem.codebook.double()
    difference = x - codes[problem.exact]
    counts, sums = CODEBOOK_STATS.reference(x, problem.exact, None, len(codes))
    averaged = _averaged(torch.ones_like(counts).lerp(counts, 1 - DECAY), codes.lerp(sums, 1 - DECAY))
    errors = {
        "loss": relative_error(loss.reshape(()), difference.square().mean()),
        "gradient": relative_error(grad_x, problem.grad.double() + 2 * difference / x.numel()),
        "codebook": relative_error(run.evidence(), averaged),
    }
    run.reset()
    values = judge_values(contender, errors, ours=1e-5, theirs=1e-2)
    return Verdict(verdict.mismatches, values.error, values.wrong)


def quantize_step_case(shape: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    """Forward, backward and moving averages of a quantiser: what one training step of a VQ-VAE asks of it."""
    ops = ("nearest", "lookup", "lookup_backward", "codebook_stats")
    reference = shape["N"] * shape["K"] * shape["D"] <= REFERENCE_ELEMENTS
    version = torch.__version__
    specs = (NEAREST, LOOKUP, LOOKUP_BACKWARD, CODEBOOK_STATS)
    contenders = vqfast_backends(device, ops, _vqfast_step, reference=reference) + [
        Contender("torch addmm, embedding, index_add_", PEER, lambda p: _eager_step(p, compiled=False), version),
        Contender(
            "torch.compile(addmm, embedding, index_add_)",
            PEER,
            lambda p: _eager_step(p, compiled=True),
            version,
            compiled=True,
        ),
        Contender(
            "vector-quantize-pytorch",
            PEER,
            _peer_step,
            version_of("vector-quantize-pytorch"),
            missing("vector_quantize_pytorch"),
            captured=False,
        ),
    ]
    return Case(
        op="quantize_step",
        shape=shape,
        dtype=dtype,
        device=device,
        problem=lambda seed: SearchProblem(shape, dtype, device, seed),
        judge=_judge_step,
        contenders=tuple(contenders),
        bytes_moved=sum(spec.bytes_moved(shape, dtype) for spec in specs),
        flops=sum(spec.flops(shape) for spec in specs),
        matmul=True,
    )


# ---- statistics ------------------------------------------------------------------------------------------------------


def _vqfast_stats(args: tuple):
    x, indices, _, K = args
    return lambda: codebook_stats(x, indices, K)


# N x K beyond which a one-hot product takes ten seconds of a CPU.
_ONEHOT_ELEMENTS = 1e8


def _onehot_stats(args: tuple) -> Run:
    x, indices, _, K = args

    def stats() -> tuple[Tensor, Tensor]:
        onehot = F.one_hot(indices, K).to(x.dtype)
        return onehot.sum(0), onehot.T @ x

    return Run(stats)


def _index_add_stats(args: tuple) -> Run:
    x, indices, _, K = args

    def stats() -> tuple[Tensor, Tensor]:
        counts = x.new_zeros(K).index_add_(0, indices, x.new_ones(len(x)))
        return counts, x.new_zeros(K, x.shape[1]).index_add_(0, indices, x)

    return Run(stats)


def _judge_stats(contender: Contender, run: Run, args: tuple) -> Verdict:
    counts, sums = CODEBOOK_STATS.reference(args[0].double(), *args[1:])
    got_counts, got_sums = run.call()
    errors = {"counts": relative_error(got_counts, counts), "sums": relative_error(got_sums, sums)}
    return judge_values(contender, errors, ours=1e-6, theirs=1e-5)


def codebook_stats_case(shape: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    version = torch.__version__
    contenders = vqfast_backends(device, ("codebook_stats",), _vqfast_stats) + [
        Contender("torch index_add_", PEER, _index_add_stats, version)
    ]
    if torch.device(device).type == "cuda" or shape["N"] * shape["K"] <= _ONEHOT_ELEMENTS:
        contenders.append(Contender("torch one-hot product", PEER, _onehot_stats, version))
    return Case(
        op="codebook_stats",
        shape=shape,
        dtype=dtype,
        device=device,
        problem=lambda seed: CODEBOOK_STATS.inputs(shape, dtype, device, seed),
        judge=_judge_stats,
        contenders=tuple(contenders),
        bytes_moved=CODEBOOK_STATS.bytes_moved(shape, dtype),
        flops=CODEBOOK_STATS.flops(shape),
    )

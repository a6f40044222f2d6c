"""Benchmarks around the grain map: the entropy of patches that it is taken from, and the mask of the next position."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bench.backends import vqfast_backends
from bench.case import PEER, Case, Contender, Run, Verdict, judge_indices, judge_values, relative_error
from vqfast import ops
from vqfast.kernels.grain_entropy.reference import EPSILON, GREY
from vqfast.kernels.specs import GRAIN_ENTROPY, POSITION_MASK

# ---- entropy ---------------------------------------------------------------------------------------------------------


def dense_entropy(images: Tensor, patch: int, num_bins: int, sigma: float, lowest: float, highest: float) -> Tensor:
    """The published form: the weight of every pixel in every bin, (patches, pixels, bins)."""
    weights = torch.tensor(GREY, device=images.device)
    grey = (images * weights[:, None, None]).sum(1)
    patches = grey.unfold(1, patch, patch).unfold(2, patch, patch).flatten(3)
    bins = torch.linspace(lowest, highest, num_bins, device=images.device)
    density = torch.exp(-0.5 * ((patches[..., None] - bins) / sigma).square()).mean(-2)
    p = density / (density.sum(-1, keepdim=True) + EPSILON) + EPSILON
    return -(p * p.log()).sum(-1)


def _vqfast_entropy(args: tuple):
    images, patch, num_bins, sigma, *value_range = args
    return lambda: ops.grain_entropy(images, patch, num_bins=num_bins, sigma=sigma, value_range=tuple(value_range))


def _judge_entropy(contender: Contender, run: Run, args: tuple) -> Verdict:
    exact = GRAIN_ENTROPY.reference(args[0].double(), *args[1:])
    return judge_values(contender, {"entropy": relative_error(run.call(), exact)}, ours=1e-5, theirs=1e-3)


def grain_entropy_case(shape: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    version = torch.__version__
    compiled = torch.compile(dense_entropy, dynamic=False)
    return Case(
        op="grain_entropy",
        shape=shape,
        dtype=dtype,
        device=device,
        problem=lambda seed: GRAIN_ENTROPY.inputs(shape, dtype, device, seed),
        judge=_judge_entropy,
        contenders=(
            *vqfast_backends(device, ("grain_entropy",), _vqfast_entropy),
            Contender("torch, all weights", PEER, lambda args: Run(lambda: dense_entropy(*args)), version),
            Contender(
                "torch.compile(all weights)", PEER, lambda args: Run(lambda: compiled(*args)), version, compiled=True
            ),
        ),
        bytes_moved=GRAIN_ENTROPY.bytes_moved(shape, dtype),
        flops=GRAIN_ENTROPY.flops(shape),
    )


# ---- position mask ---------------------------------------------------------------------------------------------------


def _covered(Hc: int, Wc: int, device: torch.device) -> Tensor:
    """(Hc Wc, 4) int64: the fine positions in each cell, of two grains."""
    return torch.arange(4 * Hc * Wc, device=device).reshape(Hc, 2, Wc, 2).transpose(1, 2).reshape(Hc * Wc, 4)


def looped_mask(
    positions: Tensor, grain_ids: Tensor, grain: Tensor, Hc: int, Wc: int, num_grains: int, vocab_size: int
) -> Tensor:
    """The published way for two grains, an image after the other; but what it allows is what can be drawn."""
    cells, covered = Hc * Wc, _covered(Hc, Wc, positions.device)
    cell_of = torch.empty(4 * cells, dtype=torch.int64, device=positions.device)
    cell_of[covered.flatten()] = torch.arange(cells, device=positions.device).repeat_interleave(4)
    mask = torch.zeros(len(positions), vocab_size, dtype=torch.bool, device=positions.device)
    for drawn, ids, g, row in zip(positions, grain_ids, grain.tolist(), mask, strict=True):
        coarse, fine = drawn[ids == 0], drawn[ids == 1]
        count, own = (4 * cells, fine) if g else (cells, coarse)
        if (own == count + 1).any():
            row[count] = True
            continue
        row[:count] = True
        row[own[own < count]] = False
        row[covered[coarse[coarse < cells]] if g else cell_of[fine[fine < 4 * cells]]] = False
        row[count + 1] = True if g == 0 else not row[:count].any()
    return mask


def _vqfast_mask(args: tuple):
    *tensors, Hc, Wc, num_grains, vocab_size = args
    return lambda: ops.position_mask(*tensors, cells=(Hc, Wc), num_grains=num_grains, vocab_size=vocab_size)


def _judge_mask(contender: Contender, run: Run, args: tuple) -> Verdict:
    return judge_indices(contender, run.call(), POSITION_MASK.reference(*args))


def position_mask_case(shape: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    return Case(
        op="position_mask",
        shape=shape,
        dtype=dtype,
        device=device,
        problem=lambda seed: POSITION_MASK.inputs(shape, dtype, device, seed),
        judge=_judge_mask,
        contenders=(
            *vqfast_backends(device, ("position_mask",), _vqfast_mask),
            Contender(
                "loop over images",
                PEER,
                lambda args: Run(lambda: looped_mask(*args)),
                torch.__version__,
                captured=False,
            ),
        ),
        bytes_moved=POSITION_MASK.bytes_moved(shape, dtype),
        flops=0,
    )

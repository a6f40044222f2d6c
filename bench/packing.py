"""Benchmarks of variable-length codes: packing, unpacking, the masked quantiser and a training step of it."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.backends import vqfast_backends
from bench.case import PEER, YARDSTICK, Case, Contender, Run, Verdict, judge_values, relative_error
from vqfast import ops
from vqfast.kernels.pack.reference import on_fine_grid
from vqfast.kernels.pack.spec import random_grains
from vqfast.kernels.specs import LOOKUP, LOOKUP_BACKWARD, NEAREST, PACK, UNPACK

# ---- sequences and back ----------------------------------------------------------------------------------------------


def _problem(shape: Mapping[str, Any], device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Codes equal over what each covers, and grains in equal parts."""
    codes, grains, region, capacity = PACK.inputs(shape, torch.int64, device, seed)
    packed = ops.pack(codes.remainder(1024), grains)
    return ops.unpack(packed, grains, num_grains=shape["G"]), grains


def _listed(codes: Tensor, grains: Tensor) -> tuple[Tensor, ...]:
    """The published form for two grains: an image at a time, boolean indices, then padding."""
    B, Hf, Wf = codes.shape
    fine_positions = torch.arange(Hf * Wf, device=codes.device).reshape(Hf, Wf)
    coarse_positions = torch.arange(grains[0].numel(), device=codes.device).reshape(grains.shape[1:])
    coarse, fine = [grain == 0 for grain in grains], [on_fine_grid(grain[None] == 1, 2)[0] for grain in grains]
    sequences = (
        [image[::2, ::2][where] for image, where in zip(codes, coarse, strict=True)],
        [image[where] for image, where in zip(codes, fine, strict=True)],
        [coarse_positions[where] for where in coarse],
        [fine_positions[where] for where in fine],
    )
    return tuple(torch.nn.utils.rnn.pad_sequence(s, batch_first=True, padding_value=-1) for s in sequences)


def _looped(sequences: tuple[Tensor, ...], size: torch.Size) -> Tensor:
    """The published inverse: a loop over images and tokens, each read from the tensor."""
    coarse, fine, coarse_positions, fine_positions = sequences
    grid = torch.zeros(size, dtype=torch.int64, device=coarse.device)
    width = size[2]
    for b in range(size[0]):
        for code, position in zip(coarse[b], coarse_positions[b], strict=True):
            if position < 0:
                break
            y, x = 2 * (position // (width // 2)), 2 * (position % (width // 2))
            grid[b, y : y + 2, x : x + 2] = code
        for code, position in zip(fine[b], fine_positions[b], strict=True):
            if position < 0:
                break
            grid[b, position // width, position % width] = code
    return grid


def _judge_pack(contender: Contender, run: Run, problem: tuple[Tensor, Tensor]) -> Verdict:
    """Both forms, put back, give the codes."""
    codes, grains = problem
    result = run.call()
    if isinstance(result, ops.Packed):
        back = ops.unpack(result, grains)
    else:
        # Token by token: on a GPU each would be waited for.
        back = _looped(tuple(part.cpu() for part in result), codes.shape).to(codes.device)
    wrong = int((back != codes).sum())
    return Verdict(mismatches=wrong, wrong=f"{wrong} codes differ" if wrong else "")


def _judge_grid(contender: Contender, run: Run, problem: tuple[Tensor, Tensor]) -> Verdict:
    wrong = int((run.call() != problem[0]).sum())
    return Verdict(mismatches=wrong, wrong=f"{wrong} codes differ" if wrong else "")


def pack_case(shape: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    """Codes of two grains as sequences."""
    return Case(
        op="pack",
        shape=shape,
        dtype=dtype,
        device=device,
        problem=lambda seed: _problem(shape, device, seed),
        judge=_judge_pack,
        contenders=(
            *vqfast_backends(device, ("pack",), lambda p: lambda: ops.pack(*p)),
            Contender(
                "list comprehension, pad_sequence",
                PEER,
                lambda p: Run(lambda: _listed(*p)),
                torch.__version__,
                captured=False,
            ),
        ),
        bytes_moved=PACK.bytes_moved(shape, dtype),
        flops=0,
    )


def unpack_case(shape: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    """Sequences of two grains as a grid of codes."""

    def ours(problem: tuple[Tensor, Tensor]):
        packed = ops.pack(*problem)
        return lambda: ops.unpack(packed, problem[1])

    def theirs(problem: tuple[Tensor, Tensor]) -> Run:
        sequences = _listed(*problem)
        return Run(lambda: _looped(sequences, problem[0].shape))

    return Case(
        op="unpack",
        shape=shape,
        dtype=dtype,
        device=device,
        problem=lambda seed: _problem(shape, device, seed),
        judge=_judge_grid,
        contenders=(
            *vqfast_backends(device, ("unpack",), ours),
            Contender("loop over tokens", PEER, theirs, torch.__version__, captured=False),
        ),
        bytes_moved=UNPACK.bytes_moved(shape, dtype),
        flops=0,
    )


# ---- quantiser -------------------------------------------------------------------------------------------------------


class _QuantizeProblem:
    """features equal over what each code covers, grains, codebook and the gradient that arrives."""

    def __init__(self, shape: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int):
        g = torch.Generator(device=device).manual_seed(seed)
        B, H, W, K, D = (shape[key] for key in "BHWKD")
        self.grains = random_grains(dict(shape, G=2), device, seed + 1)
        features = torch.randn(B, 2 * H, 2 * W, D, generator=g, device=device)
        self.features = ops.unpack(ops.pack(features, self.grains), self.grains).to(dtype)
        self.codebook = torch.randn(K, D, generator=g, device=device).to(dtype)
        self.grad = torch.randn(features.shape, generator=g, device=device).to(dtype)
        self.weights = 4.0 ** (on_fine_grid(self.grains, 2) - 1)


def _dense(problem: _QuantizeProblem, train: bool) -> Run:
    """The published form: all distances, one-hot statistics, weights of 1/4 and 1 in the loss."""
    codebook, K = problem.codebook, len(problem.codebook)
    cluster_size, embed_sum = codebook.new_ones(K), codebook.clone()

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            rows = x.reshape(-1, x.shape[-1])
            distance = rows.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * rows @ codebook.T
            indices = distance.argmin(1)
            onehot = F.one_hot(indices, K).to(x.dtype)
            cluster_size.lerp_(onehot.sum(0), 0.01)
            embed_sum.lerp_(onehot.T @ rows, 0.01)
            codes = F.embedding(indices, codebook).reshape(x.shape)
        weights = problem.weights[..., None]
        loss = 0.25 * (weights * (codes - x).square()).mean() + (weights * (codes - x.detach()).square()).mean()
        return x + (codes - x).detach(), loss

    return _quantizer_run(problem, forward, train)


def _packed(problem: _QuantizeProblem, train: bool) -> Run:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        out = ops.dynamic_quantize(x, problem.grains, problem.codebook, normalise="cells")
        ops.codebook_stats(x, out.chosen, len(problem.codebook))
        return out.quantized, out.loss

    return _quantizer_run(problem, forward, train)


def _replicated(problem: _QuantizeProblem, train: bool) -> Run:
    """vqfast's own quantiser on the replicated grid: what packing saves."""

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        out = ops.quantize(x, problem.codebook)
        ops.codebook_stats(x, out.indices, len(problem.codebook))
        return out.quantized, out.loss

    return _quantizer_run(problem, forward, train)


def _quantizer_run(problem: _QuantizeProblem, forward, train: bool) -> Run:
    x = problem.features.detach().requires_grad_()

    def call() -> tuple[Tensor, Tensor]:
        quantized, loss = forward(x)
        if train:
            torch.autograd.grad((quantized, loss), x, (problem.grad, torch.ones_like(loss)))
        return quantized.detach(), loss.detach()

    return Run(call)


def _judge_quantizer(contender: Contender, run: Run, problem: _QuantizeProblem) -> Verdict:
    quantized, loss = run.call()
    x, codebook = problem.features.double(), problem.codebook.double()
    codes = codebook[NEAREST.reference(x, codebook)]
    errors = {"quantized": relative_error(quantized, codes)}
    if contender.role != YARDSTICK:
        exact = 1.25 * (problem.weights[..., None].double() * (codes - x).square()).mean()
        errors["loss"] = relative_error(loss, exact)
    return judge_values(contender, errors, ours=1e-5, theirs=1e-2)


def _quantizer_case(op: str, train: bool, shape: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    needed = ("pack", "nearest", "lookup", "codebook_stats", "unpack")
    needed += ("lookup_backward", "unpack_backward") if train else ()
    rows = dict(N=4 * shape["B"] * shape["H"] * shape["W"], K=shape["K"], D=shape["D"])
    specs = (NEAREST, LOOKUP, *((LOOKUP_BACKWARD,) if train else ()))
    return Case(
        op=op,
        shape=shape,
        dtype=dtype,
        device=device,
        problem=lambda seed: _QuantizeProblem(shape, dtype, device, seed),
        judge=_judge_quantizer,
        contenders=(
            *vqfast_backends(device, needed, lambda p: _packed(p, train), reference=False),
            Contender("quantize on the replicated grid", YARDSTICK, lambda p: _replicated(p, train)),
            Contender("torch, one-hot and weights", PEER, lambda p: _dense(p, train), torch.__version__),
        ),
        bytes_moved=sum(spec.bytes_moved(rows, dtype) for spec in specs),
        flops=sum(spec.flops(rows) for spec in specs),
        matmul=True,
    )


def dynamic_quantize_case(shape: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    """Training forward of a quantiser of two grains, moving averages included."""
    return _quantizer_case("dynamic_quantize", False, shape, dtype, device)


def dynamic_quantize_step_case(shape: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    """The same with the backward pass."""
    return _quantizer_case("dynamic_quantize_step", True, shape, dtype, device)

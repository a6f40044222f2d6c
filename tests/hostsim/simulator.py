"""The CUDA launchers on a simulated device, built with the host compiler and its sanitizers.

Each run is a process of its own. Tensors go in and come out as buffers of exactly their size, so that AddressSanitizer
sees the first byte beyond.
"""

import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vqfast.ops.backends.layout import DTYPE, METRIC, as_heads, as_rows

ROOT = Path(__file__).resolve().parents[2]
# Not contracted: exact_distance.h. No aliasing rules: kernels read elements in vectors of 16 bytes.
FLAGS = (
    "-std=c++17 -DVQFAST_HOPPER -O1 -g1 -fno-strict-aliasing -ffp-contract=off "
    "-Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-unused-function -Wno-tsan"
).split()
SANITIZERS = {
    "memory": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "races": ("-fsanitize=thread", "-DVQFAST_SHIM_RACES"),
}


def _hash(paths: Sequence[Path], seed: str = "") -> str:
    digest = hashlib.sha256(seed.encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(sanitizer: str = "memory") -> Path:
    """The driver's path. Compiles what has changed; skips the test where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or CXX)")
    folder = ROOT / "build" / "hostsim" / sanitizer
    headers = sorted([*ROOT.glob("csrc/include/*"), *ROOT.glob("csrc/cuda/*.h"), *ROOT.glob("csrc/cuda/*.cuh")])
    headers += sorted(ROOT.glob("tests/hostsim/*.h"))
    sources = sorted([*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("tests/hostsim/*.cpp")])
    flags = [*FLAGS, *SANITIZERS[sanitizer]]
    common = _hash(headers, " ".join([compiler, *flags]))
    includes = [f"-I{ROOT / name}" for name in ("csrc/include", "csrc/cuda", "tests/hostsim")]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = [folder / f"{source.stem}-{_hash([source], common)}.o" for source in sources]
        driver = folder / f"driver-{hashlib.sha256(str(objects).encode()).hexdigest()[:16]}"
        if not driver.exists():
            for old in folder.glob("*-*"):
                if old not in objects:
                    old.unlink()
            for source, target in zip(sources, objects, strict=True):
                if target.exists():
                    continue
                # The shims keep the threads' books themselves.
                own = "-fno-sanitize=thread" if source.stem.endswith("_shim") and sanitizer == "races" else "-g1"
                command = [compiler, *flags, own, *includes, "-x", "c++", "-c", str(source), "-o", str(target)]
                subprocess.run(command, check=True)
            new = driver.with_suffix(".new")
            subprocess.run([compiler, *flags, *map(str, objects), "-o", str(new)], check=True)
            os.replace(new, driver)
    return driver


@dataclass
class Written:
    """An output: a tensor to be made. With `start`, the launcher changes that tensor's values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: Tensor | None = None


@dataclass
class Call:
    launcher: str
    integers: Sequence[int] = ()
    reals: Sequence[float] = ()
    buffers: Sequence[Tensor | Written | None] = field(default_factory=tuple)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _pack(call: Call) -> bytes:
    name = call.launcher.encode()
    out = [struct.pack("<q", len(name)), name]
    out.append(struct.pack(f"<q{len(call.integers)}q", len(call.integers), *call.integers))
    out.append(struct.pack(f"<q{len(call.reals)}d", len(call.reals), *call.reals))
    out.append(struct.pack("<q", len(call.buffers)))
    for buffer in call.buffers:
        if buffer is None:
            out.append(struct.pack("<qq", 0, 0))
        elif isinstance(buffer, Written):
            size = torch.Size(buffer.shape).numel() * buffer.dtype.itemsize
            out.append(struct.pack("<qq", 2 if buffer.start is None else 3, size))
            if buffer.start is not None:
                out.append(_bytes(buffer.start))
        else:
            data = _bytes(buffer)
            out.append(struct.pack("<qq", 1, len(data)) + data)
    return b"".join(out)


def run(
    calls: Sequence[Call],
    *,
    sanitizer: str = "memory",
    multiprocessors: int = 2,
    shared_bytes: int = 227 << 10,
    grid_x: int = 2**31 - 1,
    order: int = 0,
    capability: int = 90,
) -> list[list[Tensor]]:
    """The written buffers of each call, on a device with these limits.

    Args:
        order: in which threads and blocks run: 0 by their numbers, 1 backwards, above shuffled. What goes on beside the
            threads (hopper_shim.h) is done with as late as can be (0), as early (1), or at random.

    Raises:
        RuntimeError: what a sanitizer, the shim or a launcher found, with its text.
    """
    driver = build(sanitizer)
    with tempfile.TemporaryDirectory() as folder:
        given, results = Path(folder) / "calls", Path(folder) / "results"
        given.write_bytes(struct.pack("<q", len(calls)) + b"".join(map(_pack, calls)))
        settings = [str(multiprocessors), str(shared_bytes), str(grid_x), str(order), str(capability)]
        environment = {
            **os.environ,
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            # Names stay mangled: a report is written on a fiber's stack, which demangling can overflow.
            "TSAN_OPTIONS": "halt_on_error=1 history_size=2 report_atomic_races=1 demangle=0",
        }
        done = subprocess.run(
            [str(driver), str(given), str(results), *settings],
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=600,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{driver.name} ended with {done.returncode}:\n{done.stderr[-6000:]}")
        data = bytearray(results.read_bytes())
    outputs, at = [], 0
    for call in calls:
        outputs.append([])
        for buffer in call.buffers:
            if isinstance(buffer, Written):
                size = torch.Size(buffer.shape).numel() * buffer.dtype.itemsize
                raw = torch.frombuffer(data[at : at + size] or bytearray(1), dtype=torch.uint8)[:size]
                outputs[-1].append(raw.clone().view(buffer.dtype).reshape(buffer.shape))
                at += size
    assert at == len(data)
    return outputs


def view(x: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """The six integers of a (batch, rows, D) view, and the memory from its first to its last element."""
    rows = as_rows(x)
    _, batch, count, stride_batch, stride_row, stride_feature = rows.view
    extent = 0
    if rows.tensor.numel() > 0:
        extent = 1 + sum(s * (n - 1) for n, s in zip(rows.tensor.shape, rows.tensor.stride(), strict=True))
    memory = torch.as_strided(rows.tensor, (extent,), (1,))
    return (batch, count, stride_batch, stride_row, stride_feature, 0), memory


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def nearest(
    x: Tensor, codebook: Tensor, mask: Tensor | None = None, prepared: None = None, metric: str = "l2",
    exact: bool = True,
) -> Call:  # fmt: skip
    """Writes indices and how many rows were decided exactly. Heads are read from contiguous x (..., H, D)."""
    heads, stride_head = 1, 0
    if codebook.ndim == 3:
        (rows, heads, stride_head), memory = as_heads(x), x.reshape(-1)
        place = (*rows.view[1:], 0)
    else:
        place, memory = view(x)
    outputs = [Written(x.shape[:-1], torch.int64), Written((1,), torch.int64)]
    sizes = [x.shape[-1], codebook.shape[-2], METRIC[metric], int(exact), heads, stride_head]
    return Call("nearest", [DTYPE[x.dtype], *place, *sizes], [], [memory, codebook, mask, *outputs])


def lookup(x: Tensor, codebook: Tensor, indices: Tensor) -> Call:
    place, memory = view(x)
    outputs = [
        Written(x.shape, x.dtype),
        Written(x.shape[:-1], _wide(x.dtype)),
        Written(codebook.shape[:1], torch.int64),
    ]
    integers = [DTYPE[x.dtype], *place, x.shape[-1], codebook.shape[0]]
    return Call("lookup", integers, [], [memory, codebook, indices, *outputs])


def lookup_backward(grad_quantized: Tensor, grad_error: Tensor, x: Tensor, codebook: Tensor, indices: Tensor) -> Call:
    grad_place, grad_memory = view(grad_quantized)
    place, memory = view(x)
    integers = [DTYPE[x.dtype], *grad_place, *place, x.shape[-1], codebook.shape[0]]
    buffers = [grad_memory, grad_error, memory, codebook, indices, Written(x.shape, x.dtype)]
    return Call("lookup_backward", integers, [], buffers)


def codebook_stats(x: Tensor, indices: Tensor, weights: Tensor | None, codebook_size: int) -> Call:
    place, memory = view(x)
    outputs = [
        Written((codebook_size,), _wide(x.dtype)),
        Written((codebook_size, x.shape[-1]), _wide(x.dtype)),
    ]
    integers = [DTYPE[x.dtype], *place, x.shape[-1], codebook_size]
    return Call("codebook_stats", integers, [], [memory, indices, weights, *outputs])


def _levels(levels: Tensor, noise: Tensor | None) -> tuple[list[int], list[Tensor | None]]:
    """T and columns; levels, noise and the noise's running sum."""
    return [levels.shape[0] - 1, levels.shape[1]], [levels, noise, None if noise is None else noise.cumsum(0)]


def q_sample(x0: Tensor, t: Tensor, levels: Tensor, noise: Tensor | None, codebook_size: int, key: Tensor) -> Call:
    sizes, tables = _levels(levels, noise)
    buffers = [x0, t, *tables, key, Written(x0.shape, torch.int64)]
    return Call("q_sample", [*sizes, *x0.shape, codebook_size], [], buffers)


def posterior(
    logits: Tensor, x_t: Tensor, t: Tensor, s: Tensor, levels: Tensor, noise: Tensor | None, marginal: bool
) -> Call:
    sizes, tables = _levels(levels, noise)
    integers = [DTYPE[logits.dtype], *sizes, *logits.shape, marginal]
    shape = (*logits.shape[:2], logits.shape[2] + levels.shape[1] - 1)
    return Call("posterior", integers, [], [logits, x_t, t, s, *tables[:2], Written(shape, logits.dtype)])


def posterior_backward(
    grad: Tensor, logits: Tensor, x_t: Tensor, t: Tensor, s: Tensor, levels: Tensor, noise: Tensor | None,
    marginal: bool,
) -> Call:  # fmt: skip
    sizes, tables = _levels(levels, noise)
    integers = [DTYPE[logits.dtype], *sizes, *logits.shape, marginal]
    buffers = [grad, logits, x_t, t, s, *tables[:2], Written(logits.shape, logits.dtype)]
    return Call("posterior_backward", integers, [], buffers)


def diffusion_loss(
    logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor, levels: Tensor, noise: Tensor | None,
    scale: Tensor, marginal: bool, aux_weight: float, with_grad: bool,
) -> Call:  # fmt: skip
    outputs = [
        Written(x0.shape, _wide(logits.dtype)),
        Written(logits.shape, logits.dtype) if with_grad else None,
    ]
    sizes, tables = _levels(levels, noise)
    integers = [DTYPE[logits.dtype], *sizes, *logits.shape, marginal]
    buffers = [logits, x0, x_t, t, s, *tables[:2], scale.contiguous(), *outputs]
    return Call("diffusion_loss", integers, [aux_weight], buffers)


def scale_rows_(rows: Tensor, scale: Tensor) -> Call:
    """scale: one value, or one a row."""
    K = rows.shape[-1]
    integers = [DTYPE[rows.dtype], rows.numel() // K, K, int(scale.numel() > 1)]
    return Call("scale_rows", integers, [], [Written(rows.shape, rows.dtype, start=rows), scale])


def p_sample(
    logits: Tensor, unconditional: Tensor | None, x_t: Tensor, t: Tensor, s: Tensor, levels: Tensor,
    noise: Tensor | None, known: Tensor | None, marginal: bool, temperature: float, guidance: float, top_k: int,
    top_p: float, key: Tensor,
) -> Call:  # fmt: skip
    sizes, tables = _levels(levels, noise)
    integers = [DTYPE[logits.dtype], *sizes, *logits.shape, marginal, top_k]
    buffers = [logits, unconditional, x_t, t, s, *tables, known, key, Written(x_t.shape, torch.int64)]
    return Call("p_sample", integers, [temperature, guidance, top_p], buffers)


def _step(prior: Tensor, likelihood: Tensor, transposed: bool) -> tuple[list[int], list[Tensor | None]]:
    """Strides between samples; prior, likelihood and the transposed prior."""
    strides = [0 if m.stride(0) == 0 else m.shape[1] ** 2 for m in (prior, likelihood)]
    prior, likelihood = (m[:1] if stride == 0 else m for m, stride in zip((prior, likelihood), strides, strict=True))
    return strides, [prior, likelihood, prior.mT.contiguous() if transposed else None]


def matrix_loss(
    logits: Tensor, x0: Tensor, x_t: Tensor, s: Tensor, prior: Tensor, likelihood: Tensor, scale: Tensor,
    marginal: bool, aux_weight: float, with_grad: bool,
) -> Call:  # fmt: skip
    strides, matrices = _step(prior, likelihood, marginal or with_grad)
    outputs = [Written(x0.shape, _wide(logits.dtype)), Written(logits.shape, logits.dtype) if with_grad else None]
    integers = [DTYPE[logits.dtype], *strides, *logits.shape, marginal]
    return Call("matrix_loss", integers, [aux_weight], [logits, x0, x_t, s, *matrices, scale, *outputs])


def matrix_sample(
    logits: Tensor, unconditional: Tensor | None, x_t: Tensor, s: Tensor, prior: Tensor, likelihood: Tensor,
    known: Tensor | None, marginal: bool, temperature: float, guidance: float, top_k: int, top_p: float, key: Tensor,
) -> Call:  # fmt: skip
    strides, matrices = _step(prior, likelihood, marginal)
    buffers = [logits, unconditional, x_t, s, *matrices, known, key, Written(x_t.shape, torch.int64)]
    integers = [DTYPE[logits.dtype], *strides, *logits.shape, marginal, top_k]
    return Call("matrix_sample", integers, [temperature, guidance, top_p], buffers)


def pack(values: Tensor, grains: Tensor, region: bool, capacity: int) -> Call:
    rows = values if values.ndim == 4 else values[..., None]
    place, memory = view(rows)
    num_grains = (values.shape[1] // grains.shape[1]).bit_length()
    outputs = [
        Written((capacity, *values.shape[3:]), values.dtype),
        Written((grains.shape[0] + 1,), torch.int32),
        Written((capacity,), torch.int64),
        Written((capacity,), torch.int64),
    ]
    sizes = [rows.shape[-1], *grains.shape, num_grains, int(region), capacity]
    return Call("pack", [values.element_size(), *place, *sizes], [], [memory, grains, *outputs])


def unpack(
    values: Tensor, cu_seqlens: Tensor, positions: Tensor, grain_ids: Tensor, grains: Tensor, num_grains: int,
    replicate: bool,
) -> Call:  # fmt: skip
    rows = values if values.ndim == 2 else values[:, None]
    place, memory = view(rows)
    (B, Hc, Wc), factor = grains.shape, 2 ** (num_grains - 1)
    grid = Written((B, Hc * factor, Wc * factor, *values.shape[1:]), values.dtype)
    integers = [values.element_size(), *place, rows.shape[-1], B, Hc, Wc, num_grains, int(replicate)]
    return Call("unpack", integers, [], [memory, cu_seqlens, positions, grain_ids, grains, grid])


def unpack_backward(
    grad: Tensor, cu_seqlens: Tensor, positions: Tensor, grain_ids: Tensor, grains: Tensor, num_grains: int
) -> Call:
    rows = grad if grad.ndim == 4 else grad[..., None]
    place, memory = view(rows)
    T = positions.shape[0]
    integers = [DTYPE[grad.dtype], *place, rows.shape[-1], T, *grains.shape, num_grains]
    outputs = [Written((T, *grad.shape[3:]), grad.dtype)]
    return Call("unpack_backward", integers, [], [memory, cu_seqlens, positions, grain_ids, grains, *outputs])


def position_mask(
    positions: Tensor, grain_ids: Tensor, grain: Tensor, Hc: int, Wc: int, num_grains: int, vocab_size: int
) -> Call:
    integers = [*positions.shape, Hc, Wc, num_grains, vocab_size]
    mask = Written((positions.shape[0], vocab_size), torch.bool)
    return Call("position_mask", integers, [], [positions, grain_ids, grain, mask])


def grain_entropy(images: Tensor, patch_size: int, num_bins: int, sigma: float, lowest: float, highest: float) -> Call:
    B, _, H, W = images.shape
    integers = [DTYPE[images.dtype], *images.shape, *images.stride(), patch_size, num_bins]
    entropy = Written((B, H // patch_size, W // patch_size), _wide(images.dtype))
    return Call("grain_entropy", integers, [sigma, lowest, highest], [images, entropy])


CALLS = {
    "nearest": nearest,
    "lookup": lookup,
    "lookup_backward": lookup_backward,
    "codebook_stats": codebook_stats,
    "q_sample": q_sample,
    "posterior": posterior,
    "posterior_backward": posterior_backward,
    "diffusion_loss": diffusion_loss,
    "p_sample": p_sample,
    "matrix_loss": matrix_loss,
    "matrix_sample": matrix_sample,
    "pack": pack,
    "unpack": unpack,
    "unpack_backward": unpack_backward,
    "position_mask": position_mask,
    "grain_entropy": grain_entropy,
}


def result(op: str, written: list[Tensor]):
    """What `torch.ops.vqfast.<op>` would return."""
    if op == "nearest":
        return written[0]
    return written[0] if len(written) == 1 else tuple(written)

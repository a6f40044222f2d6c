"""Every operator's schema and its fake kernel (shapes and dtypes for tracing)."""

import torch
from torch import Tensor

LIBRARY = torch.library.Library("vqfast", "DEF")

OPS: tuple[str, ...] = ()


def _define(schema: str, fake) -> None:
    global OPS
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"vqfast::{name}", fake, lib=LIBRARY)
    OPS += (name,)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _nearest(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None = None,
    prepared: Tensor | None = None,
    metric: str = "l2",
    exact: bool = True,
) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


def _nearest_counted(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None = None,
    prepared: Tensor | None = None,
    metric: str = "l2",
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:-1], dtype=torch.int64), x.new_empty((), dtype=torch.int64)


def _nearest_prepare(codebook: Tensor, metric: str) -> Tensor:
    return codebook.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


def _residual_nearest(x: Tensor, codebooks: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], codebooks.shape[0]), dtype=torch.int64), x.new_empty(x.shape)


def _lookup(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[:-1], dtype=_accumulator(x)),
        x.new_empty(codebook.shape[:1], dtype=torch.int64),
    )


def _lookup_backward(
    grad_quantized: Tensor, grad_error: Tensor, x: Tensor, codebook: Tensor, indices: Tensor
) -> Tensor:
    return x.new_empty(x.shape)


def _codebook_stats(x: Tensor, indices: Tensor, weights: Tensor | None, codebook_size: int) -> tuple[Tensor, Tensor]:
    dtype = _accumulator(x)
    return x.new_empty(codebook_size, dtype=dtype), x.new_empty(codebook_size, x.shape[-1], dtype=dtype)


def _q_sample(x0: Tensor, t: Tensor, levels: Tensor, noise: Tensor | None, codebook_size: int, key: Tensor) -> Tensor:
    return x0.new_empty(x0.shape)


def _posterior(
    logits: Tensor, x_t: Tensor, t: Tensor, s: Tensor, levels: Tensor, noise: Tensor | None, marginal: bool
) -> Tensor:
    B, L, K = logits.shape
    return logits.new_empty(B, L, K + levels.shape[1] - 1)


def _posterior_backward(
    grad: Tensor,
    logits: Tensor,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    levels: Tensor,
    noise: Tensor | None,
    marginal: bool,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _diffusion_loss(
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    levels: Tensor,
    noise: Tensor | None,
    scale: Tensor,
    marginal: bool,
    aux_weight: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    return (
        logits.new_empty(x0.shape, dtype=_accumulator(logits)),
        logits.new_empty(logits.shape if with_grad else (0,)),
    )


def _scale_rows_(rows: Tensor, scale: Tensor) -> None:
    return None


def _p_sample(
    logits: Tensor,
    unconditional: Tensor | None,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    levels: Tensor,
    noise: Tensor | None,
    known: Tensor | None,
    marginal: bool,
    temperature: float,
    guidance: float,
    top_k: int,
    top_p: float,
    key: Tensor,
) -> Tensor:
    return x_t.new_empty(x_t.shape)


def _transition_matmul(
    rows: Tensor,
    s: Tensor | None,
    t: Tensor,
    steps: Tensor,
    diagonal: Tensor | None,
    cumulative: Tensor,
    blocks: Tensor,
    stride: int,
    transpose: bool,
    span: int,
) -> Tensor:
    return steps.new_empty(*rows.shape[:2], steps.shape[-1])


def _matrix_loss(
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    s: Tensor,
    prior: Tensor,
    likelihood: Tensor,
    scale: Tensor,
    marginal: bool,
    aux_weight: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    return (
        logits.new_empty(x0.shape, dtype=_accumulator(logits)),
        logits.new_empty(logits.shape if with_grad else (0,)),
    )


def _matrix_sample(
    logits: Tensor,
    unconditional: Tensor | None,
    x_t: Tensor,
    s: Tensor,
    prior: Tensor,
    likelihood: Tensor,
    known: Tensor | None,
    marginal: bool,
    temperature: float,
    guidance: float,
    top_k: int,
    top_p: float,
    key: Tensor,
) -> Tensor:
    return x_t.new_empty(x_t.shape)


def _pack(values: Tensor, grains: Tensor, region: bool, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        values.new_empty((capacity, *values.shape[3:])),
        grains.new_empty(grains.shape[0] + 1, dtype=torch.int32),
        grains.new_empty(capacity),
        grains.new_empty(capacity),
    )


def _unpack(
    values: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor,
    grain_ids: Tensor,
    grains: Tensor,
    num_grains: int,
    replicate: bool,
) -> Tensor:
    B, Hc, Wc = grains.shape
    factor = 2 ** (num_grains - 1)
    return values.new_empty((B, Hc * factor, Wc * factor, *values.shape[1:]))


def _unpack_backward(
    grad: Tensor, cu_seqlens: Tensor, positions: Tensor, grain_ids: Tensor, grains: Tensor, num_grains: int
) -> Tensor:
    return grad.new_empty((positions.shape[0], *grad.shape[3:]))


def _dynamic_lookup(
    features: Tensor, codebook: Tensor, indices: Tensor, grains: Tensor, num_grains: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        features.new_empty(features.shape),
        features.new_empty(features.shape[:3], dtype=_accumulator(features)),
        features.new_empty(codebook.shape[:1], dtype=torch.int64),
    )


def _dynamic_lookup_backward(
    grad_quantized: Tensor,
    grad_error: Tensor,
    features: Tensor,
    codebook: Tensor,
    indices: Tensor,
    grains: Tensor,
    num_grains: int,
) -> Tensor:
    return features.new_empty(features.shape)


def _position_mask(
    positions: Tensor, grain_ids: Tensor, grain: Tensor, Hc: int, Wc: int, num_grains: int, vocab_size: int
) -> Tensor:
    return positions.new_empty((positions.shape[0], vocab_size), dtype=torch.bool)


def _grain_entropy(
    images: Tensor, patch_size: int, num_bins: int, sigma: float, lowest: float, highest: float
) -> Tensor:
    B, _, H, W = images.shape
    return images.new_empty((B, H // patch_size, W // patch_size), dtype=_accumulator(images))


_SEARCH = 'Tensor x, Tensor codebook, Tensor? mask=None, Tensor? prepared=None, str metric="l2", bool exact=True'
_define(f"nearest({_SEARCH}) -> Tensor", _nearest)
_define(f"nearest_counted({_SEARCH}) -> (Tensor, Tensor)", _nearest_counted)
_define("nearest_prepare(Tensor codebook, str metric) -> Tensor", _nearest_prepare)
_define("residual_nearest(Tensor x, Tensor codebooks, Tensor? mask=None) -> (Tensor, Tensor)", _residual_nearest)
_define("lookup(Tensor x, Tensor codebook, Tensor indices) -> (Tensor, Tensor, Tensor)", _lookup)
_define(
    "lookup_backward(Tensor grad_quantized, Tensor grad_error, Tensor x, Tensor codebook, Tensor indices) -> Tensor",
    _lookup_backward,
)
_define(
    "codebook_stats(Tensor x, Tensor indices, Tensor? weights, SymInt codebook_size) -> (Tensor, Tensor)",
    _codebook_stats,
)
# levels: (T + 1, 1) alpha_bar; (T + 1, 2) alpha_bar and gamma_bar where there is a mask state. noise: (K,) or None.
_define(
    "q_sample(Tensor x0, Tensor t, Tensor levels, Tensor? noise, SymInt codebook_size, Tensor key) -> Tensor",
    _q_sample,
)
_PREDICTION = "Tensor logits, Tensor x_t, Tensor t, Tensor s, Tensor levels, Tensor? noise, bool marginal"
_define(f"posterior({_PREDICTION}) -> Tensor", _posterior)
_define(f"posterior_backward(Tensor grad, {_PREDICTION}) -> Tensor", _posterior_backward)
_define(
    "diffusion_loss(Tensor logits, Tensor x0, Tensor x_t, Tensor t, Tensor s, Tensor levels, Tensor? noise, "
    "Tensor scale, bool marginal, float aux_weight, bool with_grad) -> (Tensor, Tensor)",
    _diffusion_loss,
)
_define("scale_rows_(Tensor(a!) rows, Tensor scale) -> ()", _scale_rows_)
_define(
    "p_sample(Tensor logits, Tensor? unconditional, Tensor x_t, Tensor t, Tensor s, Tensor levels, Tensor? noise, "
    "Tensor? known, bool marginal, float temperature, float guidance, SymInt top_k, float top_p, Tensor key) -> Tensor",
    _p_sample,
)
# steps, diagonal: (T, K, K) matrices and None, or (T, K) bands and (T, K). rows: (B, L, K), or (B, L) codes.
_define(
    "transition_matmul(Tensor rows, Tensor? s, Tensor t, Tensor steps, Tensor? diagonal, Tensor cumulative, "
    "Tensor blocks, int stride, bool transpose, int span) -> Tensor",
    _transition_matmul,
)
# prior: (B, K, K) of x_s given x_0. likelihood: (B, K, K), row x_t of x_t given x_s. One matrix may serve all samples.
_define(
    "matrix_loss(Tensor logits, Tensor x0, Tensor x_t, Tensor s, Tensor prior, Tensor likelihood, Tensor scale, "
    "bool marginal, float aux_weight, bool with_grad) -> (Tensor, Tensor)",
    _matrix_loss,
)
_define(
    "matrix_sample(Tensor logits, Tensor? unconditional, Tensor x_t, Tensor s, Tensor prior, Tensor likelihood, "
    "Tensor? known, bool marginal, float temperature, float guidance, SymInt top_k, float top_p, Tensor key) "
    "-> Tensor",
    _matrix_sample,
)
_define("pack(Tensor values, Tensor grains, bool region, SymInt capacity) -> (Tensor, Tensor, Tensor, Tensor)", _pack)
_define(
    "unpack(Tensor values, Tensor cu_seqlens, Tensor positions, Tensor grain_ids, Tensor grains, int num_grains, "
    "bool replicate) -> Tensor",
    _unpack,
)
_define(
    "unpack_backward(Tensor grad, Tensor cu_seqlens, Tensor positions, Tensor grain_ids, Tensor grains, "
    "int num_grains) -> Tensor",
    _unpack_backward,
)
_GRID = "Tensor features, Tensor codebook, Tensor indices, Tensor grains, int num_grains"
_define(f"dynamic_lookup({_GRID}) -> (Tensor, Tensor, Tensor)", _dynamic_lookup)
_define(
    f"dynamic_lookup_backward(Tensor grad_quantized, Tensor grad_error, {_GRID}) -> Tensor", _dynamic_lookup_backward
)
_define(
    "position_mask(Tensor positions, Tensor grain_ids, Tensor grain, SymInt Hc, SymInt Wc, int num_grains, "
    "SymInt vocab_size) -> Tensor",
    _position_mask,
)
_define(
    "grain_entropy(Tensor images, SymInt patch_size, SymInt num_bins, float sigma, float lowest, float highest) "
    "-> Tensor",
    _grain_entropy,
)

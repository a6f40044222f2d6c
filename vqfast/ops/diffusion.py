"""Discrete diffusion over K categories: forward noise, loss, reverse step."""

import torch
from torch import Tensor

from vqfast.ops.checks import check_device, check_float, check_int64, describe
from vqfast.ops.reduction import ordered_sum
from vqfast.ops.transitions import Uniform

_q_sample = torch.ops.vqfast.uniform_q_sample.default
_diffusion_loss = torch.ops.vqfast.uniform_diffusion_loss.default
_scale_rows_ = torch.ops.vqfast.scale_rows_.default
_p_sample = torch.ops.vqfast.uniform_p_sample.default


def _key(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """(2,) int64 Philox key on `device`, drawn from the generator: no host read, and a CUDA graph replays it anew."""
    source = device if generator is None else generator.device
    return torch.randint(1 << 62, (2,), generator=generator, device=source).to(device)


def _level(name: str, value: int | Tensor, batch: int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        check_int64(name, value, (batch,), "(B,)")
        return value
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int or an int64 tensor (B,), got {describe(value)}")
    return torch.full((batch,), value, dtype=torch.int64, device=device)


def _check_transition(transition: object) -> None:
    if not isinstance(transition, Uniform):
        raise TypeError(f"transition: expected vqfast.ops.Uniform, got {type(transition).__name__}")


def _check_logits(logits: Tensor, transition: Uniform) -> tuple[int, int]:
    """(B, L) of logits (B, L, K)."""
    check_float("logits", logits)
    _check_transition(transition)
    if logits.ndim != 3:
        raise ValueError(f"logits: expected three dimensions (B, L, K), got {describe(logits)}")
    if logits.shape[-1] != transition.codebook_size:
        raise ValueError(f"logits: expected K = {transition.codebook_size} of {transition}, got {describe(logits)}")
    return logits.shape[0], logits.shape[1]


def q_sample(x0: Tensor, t: int | Tensor, transition: Uniform, *, generator: torch.Generator | None = None) -> Tensor:
    """Noise clean codes to level t: x_t ~ q(x_t | x_0).

    Hoogeboom et al. 2021 (Multinomial Diffusion), eq. 12.

    Args:
        x0: (B, L) int64 codes in [0, K).
        t: noise level in 0..T, an int or (B,) int64; 0 returns x0.
        transition: the forward chain.
        generator: source of the random key (default: torch's own for the device). The same key gives the same sample
            on every backend.

    Returns:
        (B, L) int64.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or values other than these.
    """
    _check_transition(transition)
    if not isinstance(x0, Tensor) or x0.dtype != torch.int64 or x0.ndim != 2:
        error = ValueError if isinstance(x0, Tensor) and x0.dtype == torch.int64 else TypeError
        raise error(f"x0: expected an int64 tensor of shape (B, L), got {describe(x0)}")
    level = _level("t", t, x0.shape[0], x0.device)
    check_device("x0", x0, t=level)
    alpha_bar = transition.alpha_bar_on(x0.device)
    return _q_sample(x0, level, alpha_bar, transition.codebook_size, _key(generator, x0.device))


class _DiffusionLoss(torch.autograd.Function):
    """Loss per token; its gradient, already times `scale`, is written in the forward pass that reads the logits."""

    @staticmethod
    def forward(ctx, logits, x0, x_t, t, s, alpha_bar, scale, aux_weight, reduce, with_grad):
        loss, grad = _diffusion_loss(logits, x0, x_t, t, s, alpha_bar, scale, aux_weight, with_grad)
        ctx.save_for_backward(grad)
        ctx.tokens = x0.shape
        loss = loss * scale.to(loss.dtype)[:, None]
        return ordered_sum(loss) if reduce else loss

    @staticmethod
    def backward(ctx, grad_loss):
        (grad,) = ctx.saved_tensors
        # In place, and without a pass over memory where the incoming gradient is 1. A second backward through the
        # same graph is refused by autograd, which sees that the saved tensor has changed.
        _scale_rows_(grad, grad_loss.expand(ctx.tokens))
        return grad, None, None, None, None, None, None, None, None, None


def diffusion_loss(
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: int | Tensor,
    transition: Uniform,
    *,
    s: int | Tensor | None = None,
    aux_weight: float = 0.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Variational loss of the step from t to s, in nats per token, with its gradient in the same pass.

    KL(q(x_s | x_t, x_0) || p(x_s | x_t)), p the plug-in posterior of the predicted x_0; at s = 0 this is
    -log p(x_0 | x_t). Hoogeboom et al. 2021, eqs. 13-15. With aux_weight, plus aux_weight * (-log p(x_0)) (D3PM,
    Austin et al. 2021, eq. 5).

    Args:
        logits: (B, L, K) float scores of x_0.
        x0, x_t: (B, L) int64 codes in [0, K).
        t: noise level in 1..T, int or (B,) int64.
        transition: the forward chain.
        s: level in 0..t-1 that the step goes to; default t - 1.
        aux_weight: weight of the cross-entropy of x_0.
        weights: (B,) float weight of each sample, such as 1 / p(t).
        reduction: "mean" over all B * L tokens, "sum", or "none".

    Returns:
        Scalar, or (B, L) for "none"; float32 (float64 for float64 logits). Gradient to logits only; the graph can be
        gone through once.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or values other than these.
    """
    B, L = _check_logits(logits, transition)
    check_int64("x0", x0, (B, L), "(B, L)")
    check_int64("x_t", x_t, (B, L), "(B, L)")
    t = _level("t", t, B, logits.device)
    s = t - 1 if s is None else _level("s", s, B, logits.device)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if weights is not None:
        check_float("weights", weights)
        if weights.shape != (B,):
            raise ValueError(f"weights: expected shape (B,) = ({B},), got {describe(weights)}")
    check_device("logits", logits, x0=x0, x_t=x_t, t=t, s=s, weights=weights)
    share = 1.0 / max(B * L, 1) if reduction == "mean" else 1.0
    if weights is None:
        scale = torch.full((B,), share, dtype=torch.float64, device=logits.device)
    else:
        scale = weights.detach().double() * share
    alpha_bar = transition.alpha_bar_on(logits.device)
    # Asked here: inside the function the gradient mode is off, and needs_input_grad does not know of no_grad.
    with_grad = torch.is_grad_enabled() and logits.requires_grad
    return _DiffusionLoss.apply(
        logits, x0, x_t, t, s, alpha_bar, scale, float(aux_weight), reduction != "none", with_grad
    )


def p_sample(
    logits: Tensor,
    x_t: Tensor,
    t: int | Tensor,
    s: int | Tensor,
    transition: Uniform,
    *,
    temperature: float = 1.0,
    known: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One reverse step from level t to any lower level s: x_s ~ p(x_s | x_t).

    The exact posterior of the plug-in rule for the composite step, alpha_{t|s} = alpha_bar_t / alpha_bar_s
    (Hoogeboom et al. 2021, eq. 14).

    Args:
        logits: (B, L, K) float scores of x_0.
        x_t: (B, L) int64 codes in [0, K).
        t, s: levels, 0 <= s < t <= T, int or (B,) int64.
        transition: the forward chain.
        temperature: divides the logits; above 0.
        known: (B, L) int64, a clean code where one is given and -1 elsewhere. Given positions are drawn from
            q(x_s | known), so that at s = 0 they are the given codes: inpainting without training for it.
        generator: source of the random key (default: torch's own for the device).

    Returns:
        (B, L) int64.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or values other than these.
    """
    B, L = _check_logits(logits, transition)
    check_int64("x_t", x_t, (B, L), "(B, L)")
    t, s = _level("t", t, B, logits.device), _level("s", s, B, logits.device)
    if known is not None:
        check_int64("known", known, (B, L), "(B, L)")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature!r}")
    check_device("logits", logits, x_t=x_t, t=t, s=s, known=known)
    alpha_bar = transition.alpha_bar_on(logits.device)
    key = _key(generator, logits.device)
    return _p_sample(logits.detach(), x_t, t, s, alpha_bar, known, float(temperature), key)

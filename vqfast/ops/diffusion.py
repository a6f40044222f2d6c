"""Discrete diffusion over K categories: forward noise, posterior, loss, reverse step."""

import torch
from torch import Tensor

from vqfast.kernels.posterior.reference import noise_vector, shares
from vqfast.ops import matrix_diffusion
from vqfast.ops.checks import check_chain_values, check_device, check_float, check_int64, describe
from vqfast.ops.matrix_transitions import MatrixTransition
from vqfast.ops.reduction import ordered_sum
from vqfast.ops.transforms import Function, kept_for_transforms, once_differentiable, scaled_rows, wants_gradient
from vqfast.ops.transitions import Transition

RULES = ("joint", "marginal")

_q_sample = torch.ops.vqfast.q_sample.default
_posterior = torch.ops.vqfast.posterior.default
_posterior_backward = torch.ops.vqfast.posterior_backward.default
_diffusion_loss = torch.ops.vqfast.diffusion_loss.default
_p_sample = torch.ops.vqfast.p_sample.default


def _key(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """(2,) int64 Philox key on `device`, drawn from the generator: no host read, and a CUDA graph replays it anew."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {describe(generator)}")
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
    if not isinstance(transition, Transition):
        raise TypeError(
            "transition: expected a family of vqfast.ops (Uniform, Absorbing, MaskAndReplace, Marginal, Gaussian, "
            f"Nearest, SymmetricRate, Dense), got {type(transition).__name__}"
        )


def _check_logits(logits: Tensor, transition: Transition, name: str = "logits") -> tuple[int, int]:
    """(B, L) of logits (B, L, K)."""
    check_float(name, logits)
    _check_transition(transition)
    if logits.ndim != 3:
        raise ValueError(f"{name}: expected three dimensions (B, L, K), got {describe(logits)}")
    if logits.shape[-1] != transition.codebook_size:
        raise ValueError(f"{name}: expected K = {transition.codebook_size} of {transition}, got {describe(logits)}")
    return logits.shape[0], logits.shape[1]


def _span(t: int | Tensor, s: int | Tensor | None) -> int:
    """t - s where it is known without a look at a device, else 0."""
    if s is None:
        return 1
    return t - s if isinstance(t, int) and isinstance(s, int) else 0


def _are_numbers(t: int | Tensor, s: int | Tensor | None) -> bool:
    """Whether all samples are known to be at one level, without a look at a device."""
    return isinstance(t, int) and not isinstance(s, Tensor)


def _is_marginal(rule: str) -> bool:
    if rule not in RULES:
        raise ValueError(f"rule: expected 'joint' or 'marginal', got {rule!r}")
    return rule == "marginal"


def q_sample(
    x0: Tensor, t: int | Tensor, transition: Transition, *, generator: torch.Generator | None = None
) -> Tensor:
    """Noise clean codes to level t: x_t ~ q(x_t | x_0).

    Hoogeboom et al. 2021 (Multinomial Diffusion), eq. 12; Austin et al. 2021 (D3PM); Gu et al. 2022 (VQ-Diffusion),
    eq. 8.

    Args:
        x0: (B, L) int64 codes in [0, K).
        t: noise level in 0..T, an int or (B,) int64; 0 returns x0.
        transition: the forward chain.
        generator: source of the random key (default: torch's own for the device). The same key gives the same sample
            on every backend.

    Returns:
        (B, L) int64; K is the mask state of a family that has one.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or values other than these.
    """
    _check_transition(transition)
    if not isinstance(x0, Tensor) or x0.dtype != torch.int64 or x0.ndim != 2:
        error = ValueError if isinstance(x0, Tensor) and x0.dtype == torch.int64 else TypeError
        raise error(f"x0: expected an int64 tensor of shape (B, L), got {describe(x0)}")
    level = _level("t", t, x0.shape[0], x0.device)
    check_device("x0", x0, t=level)
    key = _key(generator, x0.device)
    if isinstance(transition, MatrixTransition):
        check_chain_values(transition.T, transition.codebook_size, level, x0=x0)
        return matrix_diffusion.q_sample(x0, level, transition, key)
    levels, noise = transition.tables_on(x0.device)
    return _q_sample(x0, level, levels, noise, transition.codebook_size, key)


class _Posterior(Function):
    @staticmethod
    def forward(logits, x_t, t, s, levels, noise, marginal):
        return _posterior(logits, x_t, t, s, levels, noise, marginal)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.marginal = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_p):
        return _posterior_backward(grad_log_p, *ctx.saved_tensors, ctx.marginal), *([None] * 6)


def posterior(
    logits: Tensor, x_t: Tensor, t: int | Tensor, s: int | Tensor, transition: Transition, *, rule: str = "joint"
) -> Tensor:
    """log p(x_s | x_t) of the predicted scores of x_0; with the logarithm of a one-hot, the true log q(x_s | x_t, x_0).

    "joint": proportional to sum_k q(x_s, x_t | x_0 = k) p_k (D3PM, Austin et al. 2021, eq. 4; Hoogeboom et al. 2021,
    eq. 14). "marginal": sum_k q(x_s | x_t, x_0 = k) p_k (VQ-Diffusion, Gu et al. 2022, eq. 11). They are different
    distributions: train and sample with the same one.

    Args:
        logits: (B, L, K) float scores of x_0.
        x_t: (B, L) int64 codes in [0, K), or K for the mask state.
        t: noise level in 1..T, int or (B,) int64.
        s: level in 0..t-1.
        transition: the forward chain.
        rule: "joint" or "marginal".

    Returns:
        (B, L, transition.states), dtype of logits. Gradient to logits.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or values other than these.
    """
    B, L = _check_logits(logits, transition)
    marginal = _is_marginal(rule)
    check_int64("x_t", x_t, (B, L), "(B, L)")
    span = _span(t, s)
    t, s = _level("t", t, B, logits.device), _level("s", s, B, logits.device)
    check_device("logits", logits, x_t=x_t, t=t, s=s)
    if isinstance(transition, MatrixTransition):
        check_chain_values(transition.T, transition.codebook_size, t, s, logits=logits, x_t=x_t)
        return matrix_diffusion.posterior(logits, x_t, t, s, transition, marginal, span).to(logits.dtype)
    return _Posterior.apply(logits, x_t, t, s, *transition.tables_on(logits.device), marginal)


class _DiffusionLoss(Function):
    """Loss per token; its gradient, already times `scale`, is written in the forward pass that reads the logits."""

    @staticmethod
    def forward(logits, x0, x_t, t, s, levels, noise, scale, marginal, aux_weight, reduce, with_grad):
        loss, grad = _diffusion_loss(logits, x0, x_t, t, s, levels, noise, scale, marginal, aux_weight, with_grad)
        loss = loss * scale.to(loss.dtype)
        return ordered_sum(loss) if reduce else loss, grad

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.tokens = inputs[1].shape
        ctx.save_for_backward(output[1], *kept_for_transforms(inputs[0]))
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # else there would be zeros for the second output, as large as the logits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return (None,) * 12
        grad, *_ = ctx.saved_tensors
        # In place: a second backward through the same graph is refused by autograd, which sees that the saved tensor
        # has changed.
        return scaled_rows(grad, grad_loss.expand(ctx.tokens)), *([None] * 11)


def _scale(
    x0: Tensor, weights: Tensor | None, class_weights: Tensor | None, mask: Tensor | None, reduction: str
) -> Tensor:
    """(B, L) float64: what each token's loss is multiplied by."""
    B, L = x0.shape
    scale = torch.ones((), dtype=torch.float64, device=x0.device)
    if weights is not None:
        weights = weights.detach().double()
        scale = scale * (weights[:, None] if weights.ndim == 1 else weights)
    if class_weights is not None:
        scale = scale * class_weights.detach().double()[x0.clamp(0, class_weights.shape[0] - 1)]
    if mask is not None:
        scale = torch.where(mask, scale, 0.0)
    if reduction == "mean":
        scale = scale / (max(B * L, 1) if mask is None else mask.sum().clamp(min=1))
    return scale.expand(B, L)


def diffusion_loss(
    logits: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: int | Tensor,
    transition: Transition,
    *,
    s: int | Tensor | None = None,
    rule: str = "joint",
    aux_weight: float = 0.0,
    weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Variational loss of the step from t to s, in nats per token, with its gradient in the same pass.

    KL(q(x_s | x_t, x_0) || p(x_s | x_t)), p the `posterior` of the predicted x_0; at s = 0 this is -log p(x_0 | x_t).
    Hoogeboom et al. 2021, eqs. 13-15. With aux_weight, plus aux_weight * (-log p(x_0)) (D3PM, Austin et al. 2021,
    eq. 5). In absorbing diffusion only masked tokens have a KL, and only they are read unless aux_weight is set.

    Args:
        logits: (B, L, K) float scores of x_0.
        x0: (B, L) int64 codes in [0, K). x_t: (B, L) int64 codes, or K for the mask state.
        t: noise level in 1..T, int or (B,) int64.
        transition: the forward chain.
        s: level in 0..t-1 that the step goes to; default t - 1.
        rule: "joint" or "marginal", see `posterior`.
        aux_weight: weight of the cross-entropy of x_0.
        weights: (B,) float weight of each sample, such as 1 / p(t), or (B, L) of each token.
        class_weights: (K,) float weight of each code of x_0.
        mask: (B, L) bool, true where a token counts; the others are not read.
        reduction: "mean" over the tokens that count, each times its weights, "sum", or "none".

    Returns:
        Scalar, or (B, L) for "none"; float32 (float64 for float64 logits). Gradient to logits only; the graph can be
        gone through once.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or values other than these.
    """
    B, L = _check_logits(logits, transition)
    marginal = _is_marginal(rule)
    check_int64("x0", x0, (B, L), "(B, L)")
    check_int64("x_t", x_t, (B, L), "(B, L)")
    span, one = _span(t, s), _are_numbers(t, s)
    t = _level("t", t, B, logits.device)
    s = t - 1 if s is None else _level("s", s, B, logits.device)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if weights is not None:
        check_float("weights", weights)
        if weights.shape not in ((B,), (B, L)):
            raise ValueError(f"weights: expected shape (B,) = ({B},) or (B, L) = ({B}, {L}), got {describe(weights)}")
    if class_weights is not None:
        check_float("class_weights", class_weights)
        if class_weights.shape != (transition.codebook_size,):
            raise ValueError(
                f"class_weights: expected shape (K,) = ({transition.codebook_size},), got {describe(class_weights)}"
            )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor of shape (B, L), got {describe(mask)}")
        if mask.shape != (B, L):
            raise ValueError(f"mask: expected shape (B, L) = ({B}, {L}), got {describe(mask)}")
    check_device("logits", logits, x0=x0, x_t=x_t, t=t, s=s, weights=weights, class_weights=class_weights, mask=mask)
    scale = _scale(x0, weights, class_weights, mask, reduction)
    if isinstance(transition, MatrixTransition):
        check_chain_values(transition.T, transition.codebook_size, t, s, logits=logits, x0=x0, x_t=x_t)
        loss = matrix_diffusion.token_loss(
            logits, x0, x_t, t, s, transition, scale, marginal, float(aux_weight), span, one
        )
        return ordered_sum(loss) if reduction != "none" else loss
    levels, noise = transition.tables_on(logits.device)
    with_grad = wants_gradient(logits)
    return _DiffusionLoss.apply(
        logits, x0, x_t, t, s, levels, noise, scale, marginal, float(aux_weight), reduction != "none", with_grad
    )[0]


def _check_truncation(top_k: int | None, top_p: float | None) -> tuple[int, float]:
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
        raise ValueError(f"top_k: expected a whole number of at least 1, or None, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a share above 0 and at most 1, or None, got {top_p!r}")
    return top_k or 0, 1.0 if top_p is None else float(top_p)


def p_sample(
    logits: Tensor,
    x_t: Tensor,
    t: int | Tensor,
    s: int | Tensor,
    transition: Transition,
    *,
    rule: str = "joint",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float | None = None,
    unconditional: Tensor | None = None,
    known: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One reverse step, from level t to any level s < t: x_s ~ p(x_s | x_t).

    Hoogeboom et al. 2021, eq. 14, with the composite transition from s to t. Logits are read only where they can
    matter: in absorbing diffusion, of the masked tokens that this step reveals.

    Args:
        logits: (B, L, K) float scores of x_0.
        x_t: (B, L) int64 codes in [0, K), or K for the mask state.
        t: noise level in 1..T, int or (B,) int64.
        s: level in 0..t-1.
        transition: the forward chain.
        rule: "joint" or "marginal", see `posterior`.
        temperature: divides the scores; above 0.
        top_k: draw x_0 among this many codes of the largest probability only.
        top_p: and of these among the smallest set of the largest that holds at least this share.
        guidance: scores are unconditional + guidance * (logits - unconditional) (Ho and Salimans 2022).
        unconditional: (B, L, K) scores of x_0 without the condition, of the dtype of logits; needs `guidance`.
        known: (B, L) int64, a clean code where one is given, -1 elsewhere. Given tokens are noised anew to level s,
            q(x_s | known), so that at s = 0 they are the given codes: inpainting without training for it.
        generator: source of the random key (default: torch's own for the device).

    Returns:
        (B, L) int64, always a state of the chain. Where the scores are no distribution (NaN) a code stays, and a
        masked token takes a code of the noise.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or values other than these.
    """
    B, L = _check_logits(logits, transition)
    marginal = _is_marginal(rule)
    check_int64("x_t", x_t, (B, L), "(B, L)")
    span, one = _span(t, s), _are_numbers(t, s)
    t, s = _level("t", t, B, logits.device), _level("s", s, B, logits.device)
    if known is not None:
        check_int64("known", known, (B, L), "(B, L)")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature!r}")
    top_k, top_p = _check_truncation(top_k, top_p)
    if (guidance is None) != (unconditional is None):
        missing = "guidance" if guidance is None else "unconditional"
        raise ValueError(f"{missing}: missing; guidance and unconditional go together")
    if unconditional is not None:
        check_float("unconditional", unconditional)
        if unconditional.shape != logits.shape or unconditional.dtype != logits.dtype:
            raise ValueError(f"unconditional: expected {describe(logits)} as logits is, got {describe(unconditional)}")
        unconditional = unconditional.detach()
    check_device("logits", logits, unconditional=unconditional, x_t=x_t, t=t, s=s, known=known)
    key = _key(generator, logits.device)
    options = marginal, float(temperature), 1.0 if guidance is None else float(guidance), top_k, top_p, key
    if isinstance(transition, MatrixTransition):
        check_chain_values(
            transition.T, transition.codebook_size, t, s, logits=logits, unconditional=unconditional, known=known,
            x_t=x_t,
        )  # fmt: skip
        return matrix_diffusion.p_sample(
            logits.detach(), unconditional, x_t, t, s, transition, known, *options, span, one
        )
    levels, noise = transition.tables_on(logits.device)
    return _p_sample(logits.detach(), unconditional, x_t, t, s, levels, noise, known, *options)


def transition_matmul(p: Tensor, t: int | Tensor, transition: Transition) -> Tensor:
    """Distributions of codes sent through the chain to level t: p Q_1 ... Q_t, for any family.

    q(x_t) = sum_k q(x_t | x_0 = k) p(x_0 = k) (D3PM, Austin et al. 2021, eq. 3). O(K) a row in closed form, products
    with (K, K) matrices else; never a matrix for each sample's level.

    Args:
        p: (B, L, K) float; its rows need not sum to 1.
        t: noise level in 0..T, an int or (B,) int64; 0 returns p.
        transition: the forward chain.

    Returns:
        (B, L, transition.states), dtype of p; computed in float64 through matrices. Gradient to p.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or values other than these.
    """
    B, L = _check_logits(p, transition, "p")
    t = _level("t", t, B, p.device)
    check_device("p", p, t=t)
    check_chain_values(transition.T, transition.codebook_size, t)
    if isinstance(transition, MatrixTransition):
        return transition.product(p, None, t).to(p.dtype)
    levels, noise = transition.tables_on(p.device)
    wide = p.to(torch.promote_types(p.dtype, torch.float32))
    alpha, rho, gamma = (v[:, None, None].to(wide.dtype) for v in shares(levels, t.clamp(0, transition.T)))
    total = wide.sum(-1, keepdim=True)
    codes = alpha * wide + rho * total * noise_vector(noise, transition.codebook_size, levels).to(wide.dtype)
    return (codes if transition.mask_id is None else torch.cat([codes, gamma * total], dim=-1)).to(p.dtype)


def prior_kl(transition: Transition) -> Tensor:
    """KL(q(x_T | x_0 = k) || prior) of one token for each code k, in nats: (K,) float64 on the family's device.

    The prior is `transition.prior()`. Infinite where q(x_T | x_0) has what the prior has not: absorbing diffusion
    whose alpha_bar does not end at 0.
    """
    _check_transition(transition)
    if isinstance(transition, MatrixTransition):
        return matrix_diffusion.prior_kl(transition)
    alpha = transition.alpha_bar[-1]
    prior = transition.prior()[: transition.codebook_size]
    # The prior is q(x_T | x_0) / (1 - alpha) away from x_0: a ratio of 1 - alpha there, of `more` at x_0. In log1p
    # both, as at the end of a chain they are logarithms of 1 + tiny and the sum is a difference of the two.
    here = alpha + (1 - alpha) * prior
    more = torch.log1p(torch.where(alpha > 0, alpha * (1 - prior) / prior, 0.0))
    less = torch.where(here < 1, (1 - here) * torch.log1p(-alpha), 0.0)
    return torch.where(here > 0, here * more, 0.0) + less

"""What differs while torch.func (grad, vmap, ...) transforms the function that calls an op."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable as _once_differentiable

_scale_rows_ = torch.ops.vqfast.scale_rows_.default


def transformed() -> bool:
    """Whether a transform is at work: then values may be those of many examples, and must not be looked at."""
    return torch._C._are_functorch_transforms_active()  # what autograd.Function itself asks at every call


def wants_gradient(x: Tensor) -> bool:
    """Whether a gradient to x may be asked for. To be called outside of an autograd.Function: inside the gradient mode
    is off, and needs_input_grad does not know of no_grad."""
    # An example of vmap does not tell what its batch requires.
    return torch.is_grad_enabled() and (x.requires_grad or (transformed() and x.is_floating_point()))


class Function(torch.autograd.Function):
    """One that transforms can go through: forward without ctx, and setup_context."""

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *args: Any) -> Any:
        try:
            if transformed():
                return super().apply(*args)
            # torch's own first binds the arguments to the signature of forward, which takes longer than a small op.
            return super(torch.autograd.Function, cls).apply(*args)
        except NotImplementedError as error:
            if "jvp" not in str(error):
                raise
            raise NotImplementedError(
                "the ops of vqfast have no derivative in forward mode (torch.func.jvp, jacfwd, hessian); they have one "
                "in reverse mode (torch.func.grad, vjp, jacrev)"
            ) from error


class _Final(Function):
    """The first argument, whose derivative by any of the others is asked for in vain."""

    @staticmethod
    def forward(gradient, *origins):
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("the ops of vqfast have a first derivative only, and a second one was asked for")


def once_differentiable(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """A backward whose result has no derivative: torch's own decorator, which under transforms would make it zero."""
    plain = _once_differentiable(backward)

    def run(ctx: Any, *grads: Tensor | None) -> tuple:
        if not transformed():
            return plain(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        origins = *ctx.saved_tensors, *grads
        return tuple(None if result is None else _Final.apply(result, *origins) for result in results)

    return run


def kept_for_transforms(x: Tensor) -> tuple[Tensor, ...]:
    """What else a function saves whose gradient to x is made in the forward pass, so that a derivative of that gradient
    is known to be asked for; nothing where no transform is at work."""
    return (x,) if transformed() else ()


def scaled_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """rows (..., K) times scale (...), in their own memory, and without a pass over it where the scale is 1.

    Under a transform it is a new tensor: the rows may be those of many examples of which only the scale differs.
    """
    if transformed():
        return (rows * scale[..., None]).to(rows.dtype)
    _scale_rows_(rows, scale)
    return rows

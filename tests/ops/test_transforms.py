"""torch.func: vmap of every op, and gradients of the public functions that are those of autograd."""

import warnings

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, vmap

from vqfast.diffusion import schedules
from vqfast.kernels.specs import SPECS
from vqfast.nn import VectorQuantize
from vqfast.ops import (
    Absorbing,
    Dense,
    Uniform,
    diffusion_loss,
    dynamic_quantize,
    nearest_code,
    p_sample,
    pack,
    posterior,
    q_sample,
    quantize,
    transition_matmul,
    unpack,
)

B, L, K, T, D = 2, 3, 6, 10, 4
ALPHA = schedules.cosine(T=T)
DRAW = torch.Generator().manual_seed(0)
FAMILIES = {
    "uniform": Uniform(K, ALPHA),
    "absorbing": Absorbing(K, ALPHA),
    "dense": Dense(torch.rand(T, K, K, generator=DRAW, dtype=torch.float64).softmax(-1)),
}


def together(*results):
    """Results of several examples, or tuples of such, stacked."""
    return (
        tuple(map(torch.stack, zip(*results, strict=True))) if isinstance(results[0], tuple) else torch.stack(results)
    )


def assert_equal(got, want):
    got, want = (value if isinstance(value, tuple) else (value,) for value in (got, want))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op)
def test_an_op_is_mapped_to_what_it_gives_one_by_one(spec):
    op = getattr(torch.ops.vqfast, spec.op)
    first, second = (spec.inputs(spec.test_shapes[0], spec.dtypes[0], "cpu", seed=seed) for seed in (1, 2))
    tensors = [i for i, value in enumerate(first) if isinstance(value, torch.Tensor)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = [torch.stack([a, b]) if i in tensors else a for i, (a, b) in enumerate(zip(first, second, strict=True))]
        dims = tuple(0 if i in tensors else None for i in range(len(first)))
        assert_equal(vmap(op, dims)(*args), together(op(*first), op(*second)))
        for batched in tensors:
            args = [torch.stack([a, a], -1) if i == batched else a for i, a in enumerate(first)]
            dims = tuple(-1 if i == batched else None for i in range(len(first)))
            assert_equal(vmap(op, dims)(*args), together(op(*first), op(*first)))


def of_a_diffusion(family, name):
    """A function of the ops of diffusion, of logits (B, L, K)."""
    transition, t = FAMILIES[family], torch.tensor([3, 9])
    x0 = torch.randint(K, (B, L), generator=torch.Generator().manual_seed(1))
    x_t = q_sample(x0, t, transition, generator=torch.Generator().manual_seed(2))
    if name == "posterior":
        return lambda logits: posterior(logits, x_t, t, t - 1, transition).exp().square().sum()
    if name == "transition_matmul":
        return lambda logits: transition_matmul(logits.softmax(-1), t, transition).square().sum()
    return lambda logits: diffusion_loss(logits, x0, x_t, t, transition, aux_weight=0.1)


def of_a_quantiser(**options):
    codebook = torch.randn(7, D, generator=torch.Generator().manual_seed(3))

    def function(x):
        quantized, _, loss, _ = quantize(x, codebook, **options)
        return quantized.square().sum() + loss

    return function


def of_codes_of_variable_length(name):
    grains = torch.tensor([[[0, 1], [1, 0]]])
    codebook = torch.randn(7, D, generator=torch.Generator().manual_seed(3))

    def function(features):
        if name == "pack":
            return unpack(pack(features, grains), grains).square().sum()
        out = dynamic_quantize(features, grains, codebook)
        return out.quantized.square().sum() + out.loss

    return function


X, LOGITS, FEATURES = (5, D), (B, L, K), (1, 4, 4, D)
CODEBOOK = torch.randn(5, D, generator=DRAW)
FUNCTIONS = {
    "quantize": (of_a_quantiser(), X),
    "quantize, rotation": (of_a_quantiser(estimator="rotation"), X),
    "quantize, none": (of_a_quantiser(estimator="none"), X),
    "quantize, cosine": (of_a_quantiser(metric="cosine"), X),
    "quantize, its codebook": (lambda codebook: quantize(CODEBOOK + 0.1, codebook).loss, X),
    "pack": (of_codes_of_variable_length("pack"), FEATURES),
    "dynamic_quantize": (of_codes_of_variable_length("dynamic_quantize"), FEATURES),
} | {
    f"{name}, {family}": (of_a_diffusion(family, name), LOGITS)
    for family in FAMILIES
    for name in ("diffusion_loss", "posterior", "transition_matmul")
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_autograd(name):
    function, shape = FUNCTIONS[name]
    batch = torch.randn(3, *shape, generator=torch.Generator().manual_seed(4))

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(function(x), x)[0]

    want = together(*map(gradient, batch))
    assert want.abs().sum() > 0
    one, each = grad(function)(batch[0]), vmap(grad(function))(batch)
    whole = grad(lambda batch: vmap(function)(batch).sum())(batch)
    for got, expected in ((one, want[0]), (each, want), (whole, want)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_derivative_in_forward_mode_says_that_it_is_not_there():
    for name in ("quantize", "diffusion_loss, uniform", "posterior, dense", "pack"):
        function, shape = FUNCTIONS[name]
        with pytest.raises(NotImplementedError, match="no derivative in forward mode .torch.func.jvp.*in reverse mode"):
            jvp(function, (torch.ones(shape),), (torch.ones(shape),))


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name[:17] != "transition_matmul"])
def test_a_second_derivative_is_refused_and_never_zero(name):
    function, shape = FUNCTIONS[name]
    with pytest.raises(RuntimeError, match="have a first derivative only"):
        grad(lambda x: grad(function)(x).square().sum())(torch.randn(shape))


def test_the_jacobian_of_a_loss_has_a_row_for_each_token():
    transition, x0, t = FAMILIES["uniform"], torch.zeros(B, L, dtype=torch.int64), torch.tensor([3, 9])
    logits = torch.randn(B, L, K, generator=torch.Generator().manual_seed(4))
    losses = lambda logits: diffusion_loss(logits, x0, x0, t, transition, reduction="none")
    jacobian = jacrev(losses)(logits)  # (B, L, B, L, K)
    own = grad(lambda logits: losses(logits).sum())(logits)
    torch.testing.assert_close(jacobian.sum((0, 1)), own)
    assert jacobian[0, 0, 1].abs().sum() == 0, "a token's loss depends on its own logits"


def test_draws_of_examples_are_alike_or_not_as_vmap_is_told():
    logits = torch.randn(1, 50, K, generator=torch.Generator().manual_seed(4)).expand(2, 1, 50, K)
    x_t, transition = torch.zeros(1, 50, dtype=torch.int64), FAMILIES["uniform"]
    draw = lambda logits: p_sample(logits, x_t, 9, 8, transition)
    same, different = (vmap(draw, randomness=how)(logits) for how in ("same", "different"))
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])


def test_a_search_is_exact_under_vmap_and_counts_each_examples_rows():
    x, codebook = torch.randn(2, 5, D), torch.randn(7, D)
    indices, left_open = vmap(lambda x: nearest_code(x, codebook, return_certificate=True))(x)
    assert torch.equal(indices, nearest_code(x, codebook)) and left_open.shape == (2,)


def test_the_gradient_of_each_example_through_a_frozen_quantiser():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(D, D), torch.randn(3, 5, D)
    vq = VectorQuantize(dim=D, codebook_size=7)
    parameters = dict(model.named_parameters())
    loss = lambda parameters, x: vq(functional_call(model, parameters, (x[None],)), freeze_codebook=True)[2]
    each = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        one = torch.autograd.grad(vq(model(x[i][None]), freeze_codebook=True)[2], model.weight)[0]
        torch.testing.assert_close(each["weight"][i], one)

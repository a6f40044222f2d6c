"""What residual_nearest promises beside its definition: shapes, views, errors."""

import pytest
import torch

from vqfast.ops import nearest_code, residual_nearest


def problem(*leading, D=6, Q=3, K=20):
    torch.manual_seed(0)
    return torch.randn(*leading, D), torch.randn(Q, K, D)


def test_vectors_of_any_layout_and_masks():
    x, codebooks = problem(2, 5, 4)
    mask = torch.rand(2, 5, 4) < 0.5
    quantized, indices = residual_nearest(x, codebooks, mask=mask)
    assert quantized.shape == x.shape and indices.shape == (2, 5, 4, 3)
    assert (indices[~mask] == -1).all() and (quantized[~mask] == 0).all() and (indices[mask] >= 0).all()
    first_channel = x.movedim(-1, 1).contiguous().movedim(1, -1)
    assert torch.equal(residual_nearest(first_channel, codebooks, mask=mask).indices, indices)
    assert torch.equal(indices[..., 0], nearest_code(x, codebooks[0], mask=mask))


def test_one_codebook_for_all_stages():
    x, codebooks = problem(300, D=40, K=70)
    shared = codebooks[0].expand(5, -1, -1)
    once, copied = residual_nearest(x, shared), residual_nearest(x, shared.contiguous())
    assert torch.equal(once.indices, copied.indices) and torch.equal(once.quantized, copied.quantized)


def test_any_number_of_threads_gives_the_same_codes():
    x, codebooks = problem(3000, D=16, K=64)
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(residual_nearest(x, codebooks))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_the_result_has_no_gradient():
    x, codebooks = problem(4)
    quantized, indices = residual_nearest(x.requires_grad_(), codebooks.requires_grad_())
    assert not quantized.requires_grad and not indices.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            dict(codebooks=torch.zeros(20, 6)),
            ValueError,
            r"codebooks: expected shape \(Q, K, D\) .* got float32 tensor",
        ),
        (dict(codebooks=torch.zeros(0, 20, 6)), ValueError, "with at least one stage"),
        (dict(codebooks=torch.zeros(3, 0, 6)), ValueError, "at least one code"),
        (dict(codebooks=torch.zeros(3, 20, 5)), ValueError, "expected D = 6"),
        (dict(codebooks=torch.zeros(3, 20, 6, dtype=torch.float64)), TypeError, "expected the dtype of x"),
        (dict(codebooks=[torch.zeros(20, 6)]), TypeError, "codebooks: expected a float64"),
        (dict(x=torch.zeros(4, 6, dtype=torch.int64)), TypeError, "x: expected a float64"),
        (dict(mask=torch.ones(4)), TypeError, "mask: expected a bool tensor"),
        (dict(mask=torch.ones(5, dtype=torch.bool)), ValueError, r"mask: expected shape \(4,\)"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    x, codebooks = problem(4)
    with pytest.raises(error, match=message):
        residual_nearest(**dict(x=x, codebooks=codebooks, mask=None) | change)

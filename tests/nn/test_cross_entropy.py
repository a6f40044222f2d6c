"""What `code_cross_entropy` promises: the softmax over all codes, tile by tile."""

import pytest
import torch

from vqfast.nn import cross_entropy
from vqfast.nn.cross_entropy import code_cross_entropy


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("cosine", [False, True])
def test_cross_entropy_has_the_gradient_of_the_softmax_over_all_codes(cosine, monkeypatch):
    for tile in ("_ROWS", "_CODES"):
        monkeypatch.setattr(cross_entropy, tile, 4)
    x, codebook = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (9, 11))
    indices = torch.randint(-1, 11, (9,))
    loss = code_cross_entropy(x, codebook, indices, cosine=cosine)
    score = x @ codebook.T if cosine else -torch.cdist(x, codebook)
    expected = torch.nn.functional.cross_entropy(score, indices, ignore_index=-1, reduction="none")
    torch.testing.assert_close(loss, expected)
    weight = torch.randn(9, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((loss * weight).sum(), (x, codebook)),
        torch.autograd.grad((expected * weight).sum(), (x, codebook)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_a_vector_on_its_code_has_a_finite_cross_entropy_gradient():
    x = torch.ones(1, 2, requires_grad=True)
    code_cross_entropy(x, torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([0])).sum().backward()
    assert x.grad.isfinite().all()

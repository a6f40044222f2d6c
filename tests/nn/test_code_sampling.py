"""What `sample_code` promises: draws from the softmax over all codes, tile by tile."""

import pytest
import torch
import torch.nn.functional as F

from vqfast.nn import code_sampling
from vqfast.nn.code_sampling import sample_code


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_codes_are_drawn_by_the_softmax_of_their_scores(cosine, temperature, monkeypatch):
    for tile, size in (("_ROWS", 4096), ("_CODES", 5)):
        monkeypatch.setattr(code_sampling, tile, size)
    x, codebook, draws = torch.randn(3), torch.randn(12, 3), 20_000
    if cosine:
        x, codebook = F.normalize(x, dim=0), F.normalize(codebook, dim=1)
    indices = sample_code(x.expand(draws, 3), codebook, temperature, cosine=cosine)
    score = codebook @ x if cosine else -(codebook - x).norm(dim=1)
    expected = (score / temperature).softmax(0)
    share = indices.bincount(minlength=12) / draws
    # Five standard errors of a frequency.
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_each_vector_draws_by_its_own_scores(monkeypatch):
    for tile in ("_ROWS", "_CODES"):
        monkeypatch.setattr(code_sampling, tile, 5)
    codebook = 100 * torch.randn(23, 3)
    x, nearest = codebook.repeat(2, 1).view(2, 23, 3), torch.arange(23).expand(2, 23)
    assert torch.equal(sample_code(x, codebook, 0.1), nearest)


def test_the_same_generator_gives_the_same_codes():
    x, codebook = torch.randn(50, 3), torch.randn(12, 3)
    first, second, other = (
        sample_code(x, codebook, 1.0, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_no_vectors_draw_no_codes():
    assert sample_code(torch.zeros(0, 3), torch.randn(12, 3), 1.0).shape == (0,)

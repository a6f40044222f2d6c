"""What `orthogonal_loss` promises: the mean squared cosine between codes, without forming it."""

import pytest
import torch

from vqfast.nn.orthogonal import orthogonal_loss


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def mean_squared_cosine(codes):
    units = codes / codes.norm(dim=1, keepdim=True)
    return ((units @ units.T) ** 2).mean() - 1 / len(codes)


def test_is_the_mean_squared_cosine_of_the_codes_that_are_active():
    codes, active = torch.randn(2, 20, 6), torch.rand(2, 20) < 0.5
    expected = sum(mean_squared_cosine(codes[head][active[head]]) for head in range(2)) / 2
    torch.testing.assert_close(orthogonal_loss(codes, active), expected)
    assert orthogonal_loss(torch.eye(6)) == 0


def test_max_codes_draws_among_the_active():
    codes, active = torch.randn(8, 4), torch.arange(8) < 4
    pairs = {round(float(mean_squared_cosine(codes[[i, j]])), 4) for i in range(4) for j in range(i)}
    drawn = {round(float(orthogonal_loss(codes, active, 2)), 4) for _ in range(100)}
    assert drawn == pairs
    torch.testing.assert_close(orthogonal_loss(codes, active, 6), mean_squared_cosine(codes[:4]))

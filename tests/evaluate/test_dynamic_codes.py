"""The comparison of dynamic with fixed codes: equal numbers of codes, honest verdicts, grain maps that can be read."""

import numpy as np
import pytest
import torch

from vqfast.evaluate.dynamic_codes import FixedGrid, Result, compare, contestants, fit, measure
from vqfast.evaluate.figures import FINE, draw_grains
from vqfast.models.dqvae import DQVAEConfig

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
CONFIG = DQVAEConfig(
    image_size=16,
    channels=32,
    mults=(1, 1, 1),
    num_res_blocks=1,
    attention_resolutions=(),
    codebook_size=16,
    code_dim=8,
    z_channels=32,
    disc_weight=0.0,
)


def result(name, errors):
    return Result(name, torch.tensor(errors), torch.full((len(errors),), 10), [])


@pytest.mark.parametrize(
    ("one", "other", "verdict", "wins"),
    [
        ([0.1, 0.2, 0.3], [0.2, 0.31, 0.4], "holds", 1.0),
        ([0.2, 0.31, 0.4], [0.1, 0.2, 0.3], "fails", 0.0),
        ([0.1, 0.2, 0.3], [0.2, 0.1, 0.31], "undecided", 2 / 3),
    ],
)
def test_a_verdict_needs_two_standard_errors(one, other, verdict, wins):
    claim = compare("one is better", result("one", one), result("other", other))
    assert claim.verdict == verdict and claim.wins == pytest.approx(wins)
    difference = np.array(other) - np.array(one)
    assert claim.difference == pytest.approx(difference.mean(), abs=1e-6)
    assert claim.deviation == pytest.approx(difference.std(ddof=1) / 3**0.5, abs=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_all_are_compared_at_one_number_of_codes(device):
    torch.manual_seed(0)
    players = contestants(CONFIG, side=7)
    assert [player.codes for player in players] == [16, 49, 64, 49, 49, 49]
    data = np.random.default_rng(0).integers(0, 256, (4, 20, 20, 3), dtype=np.uint8)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    for player in players:
        ticks = []
        model = fit(player.make().to(device), data, 16, 1, 2, 1e-3, 0, lambda ticks=ticks: ticks.append(1))
        found, output, grains = measure(player, model, images)
        assert len(ticks) == 1 and output.shape == images.shape
        assert found.lengths.tolist() == [player.codes] * 3
        assert isinstance(model, FixedGrid) == (grains is None)
        assert output.is_cpu and next(model.parameters()).device.type == device
        expected = (output.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(found.errors, expected)
        assert [n for n, _ in found.curve] == list(player.target_codes)


def test_a_network_is_trained_where_it_is():
    class Seen(torch.nn.Linear):
        def training_step(self, batch, step):
            assert batch["image"].device == self.weight.device
            return {"loss": self(batch["image"]).sum()}

        def part_parameters(self, part):
            return list(self.parameters())

    images = np.zeros((2, 4, 4, 1), dtype=np.uint8)
    fit(Seen(4, 1, device="meta"), images, 4, 2, 2, 1e-3, 0, lambda: None)


def test_a_fixed_grid_has_as_many_codes_as_it_says():
    model = FixedGrid(CONFIG, side=7).train()
    model.quantizer.decay = 0.0
    model.quantizer.threshold_ema_dead_code = 0.0
    model.training_step({"image": torch.rand(2, 3, 16, 16)}, 0)
    assert model.quantizer.cluster_size.sum() == 2 * 49


def test_a_side_that_two_grains_cannot_reach_is_refused():
    with pytest.raises(ValueError, match=r"side: expected one of \[5, 7\], whose square two grains can reach, got 6"):
        contestants(CONFIG, side=6)


def test_grain_maps_tint_the_finer_cells_and_outline_large_codes():
    images = np.full((1, 32, 32, 1), 100, dtype=np.uint8)
    drawn = draw_grains(images, np.array([[[0, 1], [0, 0]]]))
    assert drawn.shape == (1, 32, 32, 3)
    assert (drawn[0, 20, 20] == 100).all(), "coarse cells keep their colour"
    assert np.abs(drawn[0, 4, 20] - (55 + 0.45 * np.array(FINE))).max() <= 1
    assert (drawn[0, 0] < drawn[0, 1].max(0)).all(), "a code of 16 pixels has an edge"
    assert (drawn[0, 8, 17:] < drawn[0, 4, 20]).all() and (drawn[0, 8, 1:15] == 100).all(), "so do codes of 8"
    small = draw_grains(images[:, :8, :8], np.array([[[0, 1], [0, 0]]]))
    assert (small[0, :, :4] == 100).all(), "smaller ones have none"

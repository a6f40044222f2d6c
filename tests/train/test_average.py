"""What the average of the weights promises."""

import pytest
import torch

from vqfast.train.average import WeightAverage


def test_it_warms_up_to_its_decay():
    weight = torch.nn.Parameter(torch.zeros(1))
    average = WeightAverage([weight], 0.5)
    expected = 0.0
    for step in range(1, 20):
        torch.nn.init.constant_(weight, float(step))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert average.values[0].item() == pytest.approx(expected, rel=1e-6)


def test_it_can_be_tried_on():
    weight = torch.nn.Parameter(torch.zeros(2))
    average = WeightAverage([weight], 0.5)
    torch.nn.init.ones_(weight)
    with average.applied():
        assert weight.tolist() == [0, 0]
    assert weight.tolist() == [1, 1]
    average.apply()
    assert weight.tolist() == [0, 0]

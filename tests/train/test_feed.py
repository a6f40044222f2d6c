"""What the feed promises: by its place alone a batch is known, whoever takes it."""

import numpy as np
import torch

from vqfast.train import TrainConfig
from vqfast.train.feed import Feed

CONFIG = TrainConfig(steps=12, batch_size=4, accumulation=2)


def feed(processes, rank=0):
    return Feed(range(30), CONFIG, rank, processes, torch.device("cpu"))


def test_processes_share_the_batches_that_one_would_take_in_turn():
    alone, together = feed(1), feed(3)
    taken = np.concatenate([together.positions(step) for step in range(4)])
    assert sorted(taken) == sorted(np.concatenate([alone.positions(step) for step in range(12)]))
    noise = {feed(3, rank).noise_seed(step, number, 0) for rank in range(3) for step in range(4) for number in range(2)}
    assert noise == {alone.noise_seed(step, number, 0) for step in range(12) for number in range(2)}


def test_positions_are_places_in_the_data_however_often_it_was_gone_through():
    several = feed(1)
    seen = np.concatenate([several.positions(step) for step in range(15)])  # 120 images of 30
    np.testing.assert_array_equal(np.bincount(seen, minlength=30), np.full(30, 4))


def test_another_number_of_processes_goes_on_behind_what_was_taken():
    alone, resumed = feed(1), feed(1)
    resumed.go_on(4, feed(3).batches(4))  # four steps of three processes
    for step in range(4, 8):
        np.testing.assert_array_equal(resumed.positions(step), alone.positions(step + 8))
        assert resumed.noise_seed(step, 1, 0) == alone.noise_seed(step + 8, 1, 0)
    again = feed(3)
    again.go_on(8, resumed.batches(8))
    np.testing.assert_array_equal(
        np.sort(again.positions(8)), np.sort(np.concatenate([alone.positions(s) for s in (16, 17, 18)]))
    )

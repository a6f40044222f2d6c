"""What batches promise: pixels that come back, and an order that depends on seed and step alone."""

import numpy as np
import pytest
import torch

from vqfast.data import CodeBatches, ImageBatches, ShuffledSteps, open_dataset, read_ahead, to_float, to_uint8


def test_pixels_survive_the_way_to_float_and_back():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    values = to_float(images)
    assert values.shape == (3, 3, 4, 5) and values.dtype == torch.float32
    assert values.min() >= -1 and values.max() <= 1
    assert np.array_equal(to_uint8(values), images)
    assert to_uint8(torch.full((1, 2, 2), 7.0)).max() == 255


def test_batches_of_a_split_hold_its_images_and_labels():
    data = open_dataset("digits")
    batches = ImageBatches(data, "held-out")
    positions = np.array([3, 0])
    batch = batches[positions]
    chosen = data.indices("held-out")[positions]
    assert np.array_equal(to_uint8(batch["image"]), data.images[chosen])
    assert batch["label"].tolist() == data.labels[chosen].tolist()
    codes = CodeBatches(torch.arange(8, dtype=torch.int32).view(2, 2, 2), torch.tensor([5, 6]))
    assert codes[np.array([1])]["codes"].tolist() == [[[4, 5], [6, 7]]]
    assert codes[np.array([1])]["label"].tolist() == [6] and len(codes) == 2


def test_each_image_is_seen_once_before_any_is_seen_twice():
    seen = np.concatenate(list(ShuffledSteps(10, 4, range(5), seed=0)))
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10, 20))
    assert list(seen[:10]) != list(seen[10:] - 10)


def test_the_batch_of_a_step_does_not_depend_on_where_the_run_started():
    whole = list(ShuffledSteps(7, 3, range(12), seed=1))
    resumed = list(ShuffledSteps(7, 3, range(5, 12), seed=1))
    assert all(np.array_equal(a, b) for a, b in zip(whole[5:], resumed, strict=True))
    assert not np.array_equal(whole[0], next(iter(ShuffledSteps(7, 3, range(12), seed=2))))


def test_processes_share_a_step():
    alone = list(ShuffledSteps(11, 6, range(4), seed=0))
    shared = [list(ShuffledSteps(11, 3, range(4), seed=0, rank=rank, world=2)) for rank in range(2)]
    for step in range(4):
        assert np.array_equal(alone[step], np.concatenate([shared[0][step], shared[1][step]]))


def test_a_batch_larger_than_the_set():
    assert [len(batch) for batch in ShuffledSteps(2, 5, range(3), seed=0)] == [5, 5, 5]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_read_ahead_are_those_of_the_dataset(workers):
    images = ImageBatches(open_dataset("digits"), crop=6, augment=True, flip=True)
    visits = list(ShuffledSteps(len(images), 8, range(5), seed=0))
    for read, own in zip(read_ahead(images, visits, workers), visits, strict=True):
        direct = images[own]
        assert read.keys() == direct.keys() and all(torch.equal(read[name], direct[name]) for name in read)


def test_pixels_travel_as_bytes_and_are_scaled_where_they_arrive():
    images = ImageBatches(open_dataset("digits"))
    assert images.stored(np.arange(3))["image"].shape == (3, 8, 8, 1)
    assert images.stored(np.arange(3))["image"].dtype == torch.uint8
    batch = next(read_ahead(images, [np.arange(3)], device=torch.device("meta")))
    assert batch["image"].device.type == "meta" and batch["label"].device.type == "meta"
    assert batch["image"].shape == (3, 1, 8, 8) and batch["image"].dtype == torch.float32

"""What augmentation promises: windows and mirror images that depend on the visit alone."""

import numpy as np
import pytest
import torch

from vqfast.data import DataError, ImageBatches, open_dataset, to_uint8
from vqfast.data.augment import Augmentation, middle, windows

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 9, 9, 3), dtype=np.uint8)


def test_windows_reach_every_place_and_no_further():
    places = np.array([[0, 0], [0.999, 0.999], [0.5, 0.5], [0, 0.999], [0.25, 0], [0.9, 0.1]])
    cut = windows(IMAGES, 7, places)
    assert cut.shape == (6, 7, 7, 3)
    assert np.array_equal(cut[0], IMAGES[0, :7, :7]) and np.array_equal(cut[1], IMAGES[1, 2:, 2:])
    assert np.array_equal(cut[2], middle(IMAGES, 7)[2]) and np.array_equal(cut[3], IMAGES[3, :7, 2:])
    assert np.array_equal(windows(IMAGES, 9, places), IMAGES)


def test_every_window_and_both_mirrors_come_up_alike():
    visits = np.arange(3000)
    marked = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1).repeat(3000, axis=0)
    cut = Augmentation(crop=2, flip=True, seed=3)(marked, visits)
    corners, counts = np.unique(cut[:, 0, 0, 0], return_counts=True)
    # Nine windows; a mirrored one shows its upper right corner first: columns 0..3, rows 0..2.
    assert set(corners) == {row * 4 + column for row in range(3) for column in range(4)}
    mirrored = (cut[:, 0, 0, 0] > cut[:, 0, 1, 0]).mean()
    assert abs(mirrored - 0.5) < 0.04 and counts.min() > 100


def test_a_visit_looks_the_same_in_any_batch():
    data = open_dataset("digits")
    batches = ImageBatches(data, crop=6, augment=True, flip=True, seed=1)
    visits = np.array([5, 2, 5 + len(batches), 9])
    together = batches[visits]["image"]
    for i in range(len(visits)):
        assert torch.equal(batches[visits[i : i + 1]]["image"][0], together[i])
    later = np.concatenate([[5 + n * len(batches)] for n in range(20)])
    assert len({image.tobytes() for image in to_uint8(batches[later]["image"])}) > 5, "later visits look different"


def test_without_augmentation_the_middle_is_cut():
    data = open_dataset("digits")
    got = ImageBatches(data, crop=6)[np.array([0])]["image"]
    assert np.array_equal(to_uint8(got), middle(data.images[data.indices("train")[:1]], 6))


def test_a_crop_larger_than_the_images_is_refused():
    with pytest.raises(DataError, match="crop of 9 pixels from images of 8x8"):
        ImageBatches(open_dataset("digits"), crop=9)

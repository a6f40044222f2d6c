"""What the measures promise: the values of torchmetrics, and sense at the edges."""

import math

import numpy as np
import pytest
import torch

from vqfast.evaluate import codebook_usage, perplexity, psnr, ssim
from vqfast.evaluate.classes import Reader
from vqfast.evaluate.codes import copied
from vqfast.evaluate.figures import save_grid


@pytest.fixture
def pair():
    torch.manual_seed(0)
    images = torch.rand(4, 3, 24, 32) * 2 - 1
    return images, (images + 0.2 * torch.randn_like(images)).clamp(-1, 1)


def test_psnr_is_that_of_torchmetrics(pair):
    image = pytest.importorskip("torchmetrics.functional.image", reason="torchmetrics is not installed")
    expected = [image.peak_signal_noise_ratio(a, b, data_range=2.0) for a, b in zip(*pair, strict=True)]
    torch.testing.assert_close(psnr(*pair), torch.stack(expected).double(), rtol=1e-5, atol=1e-5)


def test_ssim_is_that_of_torchmetrics(pair):
    image = pytest.importorskip("torchmetrics.functional.image", reason="torchmetrics is not installed")
    shifted = [(images.double() + 1) / 2 for images in pair]
    expected = image.structural_similarity_index_measure(*shifted, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(*pair), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (7, 30)])
def test_equal_images_of_any_size(size):
    images = torch.rand(2, 1, *size) * 2 - 1
    assert (psnr(images, images) == math.inf).all()
    torch.testing.assert_close(ssim(images, images), torch.ones(2, dtype=torch.float64))


def test_ssim_of_small_images_tells_likeness_apart():
    torch.manual_seed(0)
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    assert (ssim(images, -images) < 0.1).all() and (ssim(images, images + 0.05) > 0.9).all()


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_shapes_that_differ_are_refused(measure):
    with pytest.raises(ValueError, match="images: expected"):
        measure(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 7))


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_pixels_of_0_to_255_are_refused_rather_than_measured_against_a_peak_of_2(measure):
    pixels = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    for pair in ((pixels, pixels), (pixels.float(), pixels), (pixels.numpy(), pixels.numpy())):
        with pytest.raises(TypeError, match="^(images|reference): expected a float64, float32, .* got uint8"):
            measure(*pair)


def test_usage_and_perplexity():
    codes = torch.tensor([[0, 0], [1, 1]])
    assert codebook_usage(codes, 8) == 0.25
    assert codebook_usage(torch.tensor([0, 0, 1, 1, 1]), 8, times=3) == 0.125
    assert perplexity(codes, 8) == pytest.approx(2.0)
    assert perplexity(torch.zeros(0, dtype=torch.int64), 8) == 0
    with pytest.raises(ValueError, match=r"codes: expected values in 0\.\.7, got 0\.\.8"):
        codebook_usage(torch.tensor([0, 8]), 8)
    with pytest.raises(ValueError, match="times: expected at least 1, got 0"):
        codebook_usage(codes, 8, times=0)
    for wrong in (codes.float(), codes > 0, [0, 1]):
        with pytest.raises(TypeError, match="codes: expected a tensor of integers, got"):
            perplexity(wrong, 8)


def test_copied():
    training = torch.arange(12).view(3, 2, 2)
    assert copied(torch.stack([training[1], training[1] + 1]), training) == 0.5


def test_the_reader_agrees_with_what_it_learnt():
    images = np.zeros((20, 4, 4, 1), dtype=np.uint8)
    labels = np.arange(20) % 2
    images[labels == 1, :2] = 255
    reader = Reader(images, labels)
    assert reader.agreement(images, labels) == 1.0
    assert reader.agreement(images, 1 - labels) == 0.0


def test_letters_beyond_ascii_are_drawn(tmp_path):
    drawn = {}
    for label in ("é", "ж", "ü"):
        save_grid(tmp_path / "grid.png", [np.zeros((1, 8, 8, 3), np.uint8)], title="Samples", labels=[label])
        drawn[label] = (tmp_path / "grid.png").read_bytes()
    assert len(set(drawn.values())) == 3, "the sign for a missing letter stands for several"

"""Diffusion against raster order: equal sizes, honest measures, claims that follow the figures."""

import numpy as np
import pytest
import torch

from vqfast.data import CodeBatches
from vqfast.evaluate.frechet import Classifier
from vqfast.evaluate.global_context import (
    Inpainting,
    Samples,
    Trained,
    held_out_bits,
    judge,
    measure_inpainting,
    measure_samples,
    parameter_count,
    raster_equal,
)
from vqfast.models.raster_gpt import RasterGPT, RasterGPTConfig
from vqfast.models.vqddm import VQDDM, VQDDMConfig

SMALL = dict(codebook_size=128, grid=(4, 4), denoiser="transformer", dim=64, depth=4, heads=4, T=10, num_classes=10)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(dim=96, heads=2),
        dict(denoiser="unet", dim=32, mults=(1, 2)),
        dict(num_classes=None),
    ],
)
def test_both_have_as_many_parameters(options):
    config = VQDDMConfig(**SMALL | options)
    raster = raster_equal(config)
    assert parameter_count(RasterGPT, raster) == pytest.approx(parameter_count(VQDDM, config), rel=0.02)
    assert raster.codebook_size == config.codebook_size and raster.grid == config.grid
    assert raster.num_classes == config.num_classes and raster.heads == config.heads
    assert parameter_count(RasterGPT, raster) == sum(p.numel() for p in RasterGPT(raster).parameters())


def test_sizes_that_no_raster_transformer_has_are_refused():
    with pytest.raises(
        ValueError, match="no raster-order transformer of 4 heads and up to 2 blocks has 6277 parameters to 2%"
    ):
        raster_equal(VQDDMConfig(**SMALL | dict(codebook_size=5, dim=16, depth=1)))


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return Classifier(1, 2, dim=16).eval()


def test_samples_are_measured_as_drawn(classifier):
    seen = []

    def draw(n, labels, *, generator):
        seen.append((n, labels.tolist()))
        return torch.randint(2, (n, 2, 2), generator=generator)

    decode = lambda codes: (255 * codes.repeat_interleave(4, 1).repeat_interleave(4, 2))[..., None].byte().numpy()
    labels = torch.arange(70) % 2
    found = measure_samples(
        draw, decode, labels, classifier, torch.zeros(1, 2, 2, dtype=torch.int64), torch.Generator().manual_seed(0)
    )
    assert [n for n, _ in seen] == [64, 6] and sum((part for _, part in seen), []) == labels.tolist()
    assert found.images.shape == (70, 8, 8, 1) and found.seconds.shape == (2,)
    assert found.copied == pytest.approx((found.images == 0).all((1, 2, 3)).mean())
    assert float(found.right.mean()) == pytest.approx(classifier.accuracy(found.images, labels.numpy()))


def test_inpainting_is_measured_against_the_truth(classifier):
    truth = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    found = truth.copy()
    found[1:, :2] = 255 - found[1:, :2]
    figures = measure_inpainting(found, truth, torch.zeros(3, dtype=torch.int64), classifier)
    assert figures.psnr[0] == 48.13 and figures.ssim[0] == pytest.approx(1)
    error = ((found.astype(float) - truth) ** 2).mean((1, 2, 3))
    assert figures.psnr[1:].numpy() == pytest.approx(10 * np.log10(255**2 / error[1:]), rel=1e-6)
    assert (figures.ssim[1:] < 0.99).all()


def test_bits_are_those_of_the_model():
    torch.manual_seed(0)
    codes, labels = torch.randint(5, (70, 2, 2)), torch.arange(70) % 3
    batches, noise = CodeBatches(codes, labels), torch.Generator().manual_seed(0)
    sizes = dict(codebook_size=5, grid=(2, 2), dim=16, depth=1, heads=2, num_classes=3)
    gpt = RasterGPT(RasterGPTConfig(**sizes)).eval()
    p = gpt(codes, labels).detach().log_softmax(-1).gather(-1, codes.flatten(1)[..., None])
    assert held_out_bits(gpt, batches, noise) == pytest.approx(float(-p.mean()) / np.log(2), rel=1e-5)
    # The bound is an estimate: the same noise for the same halves of the set, which is larger than a batch.
    ddm = VQDDM(VQDDMConfig(denoiser="transformer", T=5, **sizes)).eval()
    noise.manual_seed(1)
    halves = zip(codes.split(35), labels.split(35), strict=True)
    bound = np.mean([float(ddm.bits_per_dim(*half, generator=noise).mean()) for half in halves])
    assert held_out_bits(ddm, batches, noise.manual_seed(1)) == pytest.approx(bound, rel=1e-6)


def training(way: str, at: float, seconds: float, psnr: float, seed: int) -> Trained:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(50, 3, generator=generator) + at
    right = torch.ones(50, dtype=torch.float64)
    samples = Samples(np.zeros((50, 1, 1, 1)), features, right, torch.full((2,), seconds), 0.0)
    noise = torch.rand(40, generator=generator)
    return Trained(1, 1.0, {way: samples}, {"centre": Inpainting(np.zeros(0), psnr + noise, noise, right[:40])})


def test_claims_follow_the_figures():
    real = torch.randn(60, 3, generator=torch.Generator().manual_seed(9))
    ours = [training("ours", 0.0, 2.0, 20.0, seed) for seed in (0, 1)]
    theirs = [training("theirs", 1.0, 1.0, 15.0, seed) for seed in (2, 3)]
    claims = judge(ours, theirs, "ours", "theirs", real, resamples=50)
    verdicts = {claim.text: claim.verdict for claim in claims}
    assert len(claims) == 6
    assert verdicts["samples: nearer to real images (Frechet distance)"] == "holds"
    assert verdicts["samples: take less time an image (seconds)"] == "fails"
    assert verdicts["inpainting, centre: higher PSNR (dB)"] == "holds"
    assert verdicts["inpainting, centre: higher SSIM"] == "undecided"
    back = {claim.text: claim for claim in judge(theirs, ours, "theirs", "ours", real, resamples=50)}
    for claim in claims:
        assert back[claim.text].difference == pytest.approx(-claim.difference)

"""Diffusion against raster order: honest measures of holes filled and of likelihood, claims that follow the figures."""

import numpy as np
import pytest
import torch

from vqfast.data import CodeBatches
from vqfast.evaluate.frechet import Classifier
from vqfast.evaluate.generation import Samples
from vqfast.evaluate.global_context import Inpainting, TrainedInpainter, held_out_bits, judge, measure_inpainting
from vqfast.models.raster_gpt import RasterGPT, RasterGPTConfig
from vqfast.models.vqddm import VQDDM, VQDDMConfig


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return Classifier(1, 2, dim=16).eval()


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
    for mode in (False, True):
        assert held_out_bits(gpt.train(mode), batches, noise) == pytest.approx(float(-p.mean()) / np.log(2), rel=1e-5)
    # The bound is an estimate: the same noise for the same halves of the set, which is larger than a batch.
    ddm = VQDDM(VQDDMConfig(denoiser="transformer", T=5, **sizes)).eval()
    noise.manual_seed(1)
    halves = zip(codes.split(35), labels.split(35), strict=True)
    bound = np.mean([float(ddm.bits_per_dim(*half, generator=noise).mean()) for half in halves])
    assert held_out_bits(ddm, batches, noise.manual_seed(1)) == pytest.approx(bound, rel=1e-6)


def training(at: float, psnr: float, seed: int) -> TrainedInpainter:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(50, 3, generator=generator) + at
    right = torch.ones(50, dtype=torch.float64)
    samples = Samples(np.zeros((50, 1, 1, 1)), features, right, torch.full((2,), 1.0), 0.0)
    noise = torch.rand(40, generator=generator)
    filled = Inpainting(np.zeros(0), psnr + noise, noise, right[:40])
    return TrainedInpainter(1, {"way": samples}, 1.0, {"centre": filled})


def test_claims_follow_the_figures():
    real = torch.randn(60, 3, generator=torch.Generator().manual_seed(9))
    ours = [training(0.0, 20.0, seed) for seed in (0, 1)]
    theirs = [training(1.0, 15.0, seed) for seed in (2, 3)]
    claims = judge(ours, theirs, real, resamples=50)
    verdicts = {claim.text: claim.verdict for claim in claims}
    assert len(claims) == 6
    assert verdicts["samples: nearer to real images (Frechet distance)"] == "holds"
    assert verdicts["inpainting, centre: higher PSNR (dB)"] == "holds"
    assert verdicts["inpainting, centre: higher SSIM"] == "undecided"
    back = {claim.text: claim for claim in judge(theirs, ours, real, resamples=50)}
    for claim in claims:
        assert back[claim.text].difference == pytest.approx(-claim.difference)

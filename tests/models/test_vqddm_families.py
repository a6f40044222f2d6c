"""VQ-DDM on every transition family: it trains, draws codes, keeps what is given, and its configuration says which."""

import json
from dataclasses import asdict

import pytest
import torch

from vqfast.models.unet import UNet
from vqfast.models.vqddm import VQDDM, VQDDMConfig, smoothed_frequencies
from vqfast.ops import Absorbing, Gaussian, Marginal, MaskAndReplace, SymmetricRate, Uniform, embedding_neighbours

K, T = 8, 12
NEAREST = embedding_neighbours(torch.randn(K, 3, generator=torch.Generator().manual_seed(0)), 3).tolist()
FAMILIES = {
    "uniform": (Uniform, dict()),
    "absorbing": (Absorbing, dict(schedule="reciprocal")),
    "mask_and_replace": (MaskAndReplace, dict(rule="marginal", schedule="vq_diffusion")),
    "marginal": (Marginal, dict(marginal=(0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0))),
    "gaussian": (Gaussian, dict(betas=(0.1, 2.0))),
    "nearest": (SymmetricRate, dict(neighbours=3, nearest=NEAREST)),
}
# Eight patterns among 4096 grids: runs of four codes.
PATTERNS = (torch.arange(K)[:, None] + torch.arange(4)) % K


def config(family: str, **options) -> VQDDMConfig:
    small = dict(codebook_size=K, grid=(2, 2), denoiser="transformer", dim=32, depth=2, heads=2, T=T)
    return VQDDMConfig(**small | dict(transition=family) | FAMILIES[family][1] | options)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("denoiser", ["transformer", "unet"])
def test_trains_draws_and_completes(family, denoiser):
    torch.manual_seed(0)
    model = VQDDM(config(family, denoiser=denoiser, mults=(1, 2)))
    assert type(model.diffusion.transition) is FAMILIES[family][0]
    codes = torch.randint(K, (6, 2, 2), generator=seeded())
    loss = model.training_step({"codes": codes})["loss"]
    loss.backward()
    assert loss.isfinite()
    # The mask state is embedded, and only families that have one learn it.
    assert model.denoiser.embedding.weight.shape[0] == model.diffusion.transition.states
    drawn = model.sample(5, steps=4, top_k=6, generator=seeded())
    assert drawn.shape == (5, 2, 2) and drawn.min() >= 0 and drawn.max() < K
    mask = torch.tensor([[True, False], [True, True]])
    completed = model.inpaint(codes, mask, steps=4, generator=seeded())
    assert torch.equal(completed[:, ~mask], codes[:, ~mask]) and completed.max() < K
    assert model.bits_per_dim(codes, steps=3, generator=seeded()).isfinite().all() or family == "marginal"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_goes_through_json(family):
    made = config(family)
    assert VQDDMConfig(**json.loads(json.dumps(asdict(made)))) == made


def test_absorbing_diffusion_learns_a_distribution():
    torch.manual_seed(0)
    model = VQDDM(config("absorbing", weighting="reweighted"))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=120)
    for _ in range(120):
        loss = model.training_step({"codes": PATTERNS[torch.randint(K, (128,))].view(-1, 2, 2)})["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
    codes = model.sample(300, generator=seeded()).flatten(1)
    valid = (codes[:, None] == PATTERNS).all(-1).any(-1).double().mean()
    assert valid > 0.4  # chance is 0.002
    assert len(codes.unique(dim=0)) >= K


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_into_a_model_made_on_the_meta_device_are_all_it_needs(family, assign):
    trained = VQDDM(config(family))
    with torch.device("meta"):
        loaded = VQDDM(config(family))
    if not assign:
        loaded.to_empty(device="cpu")
        for buffer in loaded.buffers():
            buffer.fill_(7)  # what an empty one may hold
    loaded.load_state_dict(trained.state_dict(), assign=assign)
    codes, losses = torch.randint(K, (6, 2, 2), generator=seeded()), []
    for model in (trained, loaded):
        torch.manual_seed(1)
        losses.append(model.training_step({"codes": codes})["loss"])
    assert torch.equal(*losses)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_of_the_model_leaves_its_chain_exact(dtype):
    exact, cast = (VQDDM(config("uniform", schedule="cosine_released")) for _ in range(2))
    cast.to(dtype)
    prior = [model.diffusion._prior_nats(torch.arange(K)[None]) for model in (exact, cast)]
    assert torch.equal(*prior) and prior[0].dtype == torch.float64


def test_uniform_noise_has_the_published_number_of_parameters():
    with torch.device("meta"):
        plain, masked = UNet(1024), UNet(1024, mask_state=True)
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert count(plain) == 117_586_568 and count(masked) - count(plain) == 128


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(transition="dense"), "transition: expected one of uniform, absorbing, mask_and_replace, marginal, gaus"),
        (dict(transition="gaussian", betas=(0.0, 1.0)), "betas: expected two numbers above 0"),
        (dict(transition="marginal"), "marginal: expected 8 probabilities"),
        (dict(transition="mask_and_replace", mask_share=1.5), "mask_share: expected a share in 0..1"),
        (dict(transition="nearest"), r"neighbours: expected 1..7 \(codebook_size = 8\), got None"),
        (dict(transition="nearest", neighbours=8), r"neighbours: expected 1..7 \(codebook_size = 8\), got 8"),
        (dict(transition="nearest", neighbours=3), "nearest: expected 3 other codes of each of 8 .*, got None"),
        (dict(transition="nearest", neighbours=3, nearest=NEAREST[:5]), "nearest: expected .*, got those of 5"),
        (dict(transition="nearest", neighbours=2, nearest=NEAREST), r"nearest: expected 2 .*, got \[.*\] of code 0"),
        (
            dict(transition="nearest", neighbours=3, nearest=[*NEAREST[:7], (7, 1, 2)]),
            r"nearest: expected 3 other codes .*, got \[7, 1, 2\] of code 7",
        ),
        (dict(FAMILIES["nearest"][1], transition="nearest", rule="marginal"), "rule: expected 'joint' for the transit"),
    ],
)
def test_what_does_not_fit_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        VQDDMConfig(codebook_size=K, grid=(2, 2), **options)


def test_codes_must_not_fall_into_groups():
    pairs = [(code ^ 1,) for code in range(K)]
    with pytest.raises(ValueError, match="neighbours: 1 of each code leave 4 groups of codes that no noise connects"):
        VQDDM(config("nearest", neighbours=1, nearest=pairs))


def test_no_smoothed_frequency_is_0():
    assert smoothed_frequencies(torch.tensor([5, 0, 1])) == (6 / 9, 1 / 9, 2 / 9)


@pytest.mark.parametrize("options", [dict(weighting="reweighted"), dict(aux_weight=0.1, aux_schedule="adaptive")])
@pytest.mark.parametrize("family", ["marginal", "gaussian", "nearest"])
def test_every_loss_goes_with_every_family(family, options):
    torch.manual_seed(0)
    model = VQDDM(config(family, parameterisation="residual", **options))
    model.training_step({"codes": torch.randint(K, (6, 2, 2), generator=seeded())})["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_gaussian_noise_takes_the_marginal_rule():
    torch.manual_seed(0)
    model = VQDDM(config("gaussian", rule="marginal"))
    assert model.training_step({"codes": torch.randint(K, (6, 2, 2), generator=seeded())})["loss"].isfinite()
    assert model.sample(3, steps=3, generator=seeded()).max() < K


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_larger_grids_through_windows(family):
    torch.manual_seed(0)
    model = VQDDM(config(family))
    assert model.sample(3, steps=3, grid=(3, 5), generator=seeded()).shape == (3, 3, 5)
    own, same = (model.sample(3, steps=3, grid=grid, generator=seeded()) for grid in (None, (2, 2)))
    assert torch.equal(own, same)
    with pytest.raises(ValueError, match=r"grid: expected at least the model's, \(2, 2\), got \(1, 4\)"):
        model.sample(1, grid=(1, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_interpolates_between_two_grids(family):
    torch.manual_seed(0)
    model = VQDDM(config(family))
    first, second = torch.randint(K, (2, 6, 2, 2), generator=seeded())
    between = model.interpolate(first, second, level=T // 2, weight=0.5, generator=seeded())
    assert between.shape == (6, 2, 2) and 0 <= between.min() and between.max() < K
    with pytest.raises(ValueError, match="level: expected a noise level in 1..12"):
        model.interpolate(first, second, level=T + 1)


def test_confidence_is_for_noise_that_hides():
    torch.manual_seed(0)
    model = VQDDM(config("absorbing"))
    drawn = model.sample(5, decoding="confidence", generator=seeded())
    assert drawn.shape == (5, 2, 2) and drawn.max() < K
    codes, mask = torch.randint(K, (5, 2, 2), generator=seeded()), torch.tensor([[True, False], [True, True]])
    completed = model.inpaint(codes, mask, decoding="confidence", steps=3, generator=seeded())
    assert torch.equal(completed[:, ~mask], codes[:, ~mask]) and completed.max() < K
    with pytest.raises(ValueError, match="decoding: 'confidence' needs the transition 'absorbing', this model has"):
        VQDDM(config("uniform")).sample(1, decoding="confidence")
    with pytest.raises(ValueError, match="decoding: expected one of chain, confidence, got 'beam'"):
        model.sample(1, decoding="beam")

"""VQ-DDM as a whole: it learns a distribution of codes, draws from it, completes it, says what it cannot."""

import json
from dataclasses import asdict

import pytest
import torch

from vqfast.models.vqddm import VQDDM, VQDDMConfig

K, T = 8, 20
# Two classes of 8 patterns each among 4096 grids: a run of four codes, or two pairs four codes apart.
PATTERNS = (torch.arange(K)[:, None] + torch.tensor([[[0, 1, 2, 3]], [[0, 0, 4, 4]]])) % K  # (class, 8, L)


def config(**options) -> VQDDMConfig:
    small = dict(
        codebook_size=K, grid=(2, 2), denoiser="transformer", dim=32, depth=2, heads=2, T=T, num_classes=2,
        class_dropout=0.2,
    )  # fmt: skip
    return VQDDMConfig(**{**small, **options})


def batch(n: int) -> dict[str, torch.Tensor]:
    label = torch.randint(2, (n,))
    return {"codes": PATTERNS[label, torch.randint(K, (n,))].view(n, 2, 2), "label": label}


def model(**options) -> VQDDM:
    torch.manual_seed(0)
    return VQDDM(config(**options))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def share_valid(codes: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of grids that are a pattern of their class; chance is 0.002."""
    return (codes.flatten(1)[:, None] == PATTERNS[labels]).all(-1).any(-1).double().mean().item()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are slower on several threads, and far slower where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained() -> VQDDM:
    """A few seconds of training."""
    ddm = model()
    optimiser = torch.optim.Adam(ddm.parameters(), lr=1e-2, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=300)
    for step in range(300):
        loss = ddm.training_step(batch(128), step)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
    return ddm


LABELS = torch.arange(300) % 2


# A learnt distribution


def test_samples_are_patterns_of_the_class_asked_for(trained):
    codes = trained.sample(300, LABELS, generator=seeded())
    assert codes.shape == (300, 2, 2) and codes.dtype == torch.int64
    assert share_valid(codes, LABELS) > 0.4
    assert share_valid(codes, 1 - LABELS) < 0.05
    assert len(codes.flatten(1).unique(dim=0)) > 10  # and not one pattern again and again


def test_fewer_steps_still_sample(trained):
    assert share_valid(trained.sample(300, LABELS, steps=7, generator=seeded()), LABELS) > 0.3


def test_guidance_does_not_lose_the_class(trained):
    codes = trained.sample(300, LABELS, guidance_scale=2.0, generator=seeded())
    assert share_valid(codes, LABELS) > 0.4


def test_without_a_class_it_samples_either(trained):
    codes = trained.sample(300, generator=seeded())
    either = [share_valid(codes, torch.full((300,), c)) for c in (0, 1)]
    assert sum(either) > 0.08  # chance is 0.004


def test_inpainting_completes_the_pattern_and_keeps_what_is_known(trained):
    codes = PATTERNS[LABELS, torch.arange(300) % K].view(300, 2, 2)
    mask = torch.tensor([[False, False], [True, True]])
    hidden = codes.masked_fill(mask, 0)
    completed = trained.inpaint(hidden, mask, LABELS, generator=seeded())
    assert torch.equal(completed[:, ~mask], codes[:, ~mask])
    # Half of a grid determines the rest; guessing two codes succeeds once in 64.
    assert (completed == codes).flatten(1).all(1).double().mean() > 0.5


def test_the_bound_is_near_the_entropy_and_looser_for_other_data(trained):
    data, labels = PATTERNS.flatten(0, 1).view(16, 2, 2), torch.tensor([0, 1]).repeat_interleave(K)
    bits = trained.bits_per_dim(data.repeat(4, 1, 1), labels.repeat(4), generator=seeded()).mean()
    assert 0.75 < bits < 1.6  # 3 bits for 4 codes is the entropy; an untrained model needs more than 2.5
    noise = torch.randint(K, (64, 2, 2), generator=seeded())
    assert trained.bits_per_dim(noise, labels.repeat(4), generator=seeded()).mean() > 2 * bits


# Sampling on any machine


def test_batches_of_any_size_make_up_the_samples():
    ddm = model()
    codes = ddm.sample(7, torch.arange(7) % 2, steps=2, batch_size=3)
    assert codes.shape == (7, 2, 2)
    codes = ddm.inpaint(codes, torch.zeros(2, 2, dtype=torch.bool), 1, steps=2, batch_size=2)
    assert codes.shape == (7, 2, 2)


def test_labels_stay_with_their_batch():
    ddm, seen = model(), []
    ddm.denoiser.register_forward_pre_hook(lambda _, args: seen.append(args[2].tolist()))
    ddm.sample(5, torch.tensor([0, 1, 1, 0, 1]), steps=1, batch_size=2)
    assert seen == [[0, 1], [1, 0], [1]]


def test_one_class_may_stand_for_all():
    ddm = model()
    one = ddm.sample(4, 1, steps=2, generator=seeded())
    assert torch.equal(one, ddm.sample(4, torch.ones(4, dtype=torch.int64), steps=2, generator=seeded()))


@pytest.mark.parametrize("shape", [(3, 2, 2), (3, 4)])
def test_inpainting_keeps_everything_outside_any_mask(shape):
    codes = torch.randint(K, shape, generator=seeded())
    mask = torch.rand(shape, generator=seeded()) < 0.5
    drawn = model().inpaint(codes, mask, 0, steps=3).view(shape)
    assert torch.equal(drawn[~mask], codes[~mask])


def test_sampling_leaves_each_module_in_its_mode():
    ddm = model()
    ddm.denoiser.time_mlp.eval()
    ddm.sample(2, 0, steps=1)
    assert ddm.training and ddm.denoiser.training and not ddm.denoiser.time_mlp.training


# Training and evaluation


@pytest.mark.parametrize("denoiser", ["transformer", "unet"])
@pytest.mark.parametrize("num_classes", [None, 2])
def test_a_training_step_gives_a_loss_to_go_down(denoiser, num_classes):
    ddm = model(denoiser=denoiser, dim=16, mults=(1, 2), num_classes=num_classes)
    result = ddm.training_step(batch(8), 0)
    result["loss"].backward()
    assert ddm.denoiser.head.weight.grad.abs().sum() > 0
    assert result["loss"].shape == () and not result["bits_per_dim"].requires_grad


def test_flat_codes_and_grids_are_the_same_batch():
    ddm, data = model(), batch(8)
    torch.manual_seed(1)
    grid = ddm.training_step(data)["loss"]
    torch.manual_seed(1)
    assert torch.equal(ddm.training_step({**data, "codes": data["codes"].flatten(1)})["loss"], grid)


@torch.no_grad()
def test_the_forward_pass_is_the_prediction():
    x_t, t = torch.tensor([[0, 1, 2, 3]]), torch.tensor([4])
    for parameterisation, own in (("x0", 0.0), ("residual", 1.0)):
        logits = model(parameterisation=parameterisation)(x_t, t)
        # The untrained network says 0 everywhere.
        assert torch.equal(logits, own * torch.nn.functional.one_hot(x_t, K))


def test_evaluation_changes_nothing():
    ddm = model()
    before = {name: value.clone() for name, value in ddm.state_dict().items()}
    result = ddm.evaluate_step(batch(8))
    assert ddm.training and not result["loss"].requires_grad
    assert all(torch.equal(value, before[name]) for name, value in ddm.state_dict().items())


def test_a_saved_model_goes_on_where_it_stopped():
    ddm = model()
    ddm.training_step(batch(T))
    again = VQDDM(VQDDMConfig(**json.loads(json.dumps(asdict(ddm.config)))))
    assert again.config == ddm.config
    again.load_state_dict(ddm.state_dict())
    assert again.diffusion.loss_count.tolist() == [1] * T
    draw = lambda m: m.sample(4, 0, generator=seeded())
    assert torch.equal(draw(again), draw(ddm))


def test_importance_sampling_survives_a_change_of_precision():
    ddm = model().bfloat16()
    assert ddm.diffusion.transition.alpha_bar.dtype == torch.float64
    assert ddm.training_step(batch(8))["loss"].isfinite()


def test_a_batch_of_nothing_has_a_loss_of_nothing():
    loss = model(num_classes=None).train().training_step({"codes": codes(0, 4)})["loss"]
    loss.backward()
    assert loss == 0


# What is refused


def codes(*shape, value: int = 0):
    return torch.full(shape, value, dtype=torch.int64)


@pytest.mark.parametrize(
    "data, error, message",
    [
        ({"codes": codes(2, 4)}, ValueError, r'batch\["label"\]: missing, but the model has 2 classes'),
        (
            {"codes": codes(2, 4), "label": codes(2, value=2)},
            ValueError,
            r"labels: expected values in 0\.\.1",
        ),
        ({"codes": codes(2, 4), "label": codes(3)}, ValueError, r"labels: expected shape \(B,\) = \(2,\)"),
        ({"codes": codes(2, 4, value=K), "label": codes(2)}, ValueError, r"x0: expected values in 0\.\.7"),
        (
            {"codes": codes(2, 3, 2), "label": codes(2)},
            ValueError,
            r'batch\["codes"\]: expected codes \(B, 2, 2\)',
        ),
        (
            {"codes": torch.zeros(2, 4), "label": codes(2)},
            TypeError,
            r'batch\["codes"\]: expected int64 codes',
        ),
    ],
)
def test_a_batch_that_does_not_fit_is_named(data, error, message):
    with pytest.raises(error, match=message):
        model().training_step(data)


@pytest.mark.parametrize(
    "options, arguments, message",
    [
        ({}, dict(labels=2), r"labels: expected values in 0\.\.1"),
        ({}, dict(labels=codes(2)), r"labels: expected shape \(B,\) = \(3,\)"),
        ({}, dict(labels=0, steps=T + 1), r"steps: expected a whole number in 1\.\.20"),
        ({}, dict(labels=0, batch_size=0), "batch_size: expected at least 1"),
        ({}, dict(guidance_scale=2.0), "labels: guidance_scale = 2.0 needs labels"),
        (dict(class_dropout=0.0), {}, "labels: missing; the model has 2 classes"),
        (
            dict(class_dropout=0.0),
            dict(labels=0, guidance_scale=2.0),
            "guidance_scale: expected 1 for a model",
        ),
        (dict(num_classes=None), dict(labels=0), "labels: expected None, this model has no classes"),
        (dict(num_classes=None), dict(guidance_scale=2.0), "guidance_scale: expected 1 for a model"),
    ],
)
def test_a_sample_that_cannot_be_drawn_is_refused(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**options).sample(3, **arguments)


def test_a_number_of_samples_that_is_none_is_refused():
    with pytest.raises(ValueError, match="n: expected a whole number, at least 1, got 0"):
        model().sample(0, 0)


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (codes(3, 2, 2), TypeError, "mask: expected a bool tensor"),
        (
            torch.ones(3, 4, dtype=torch.bool),
            ValueError,
            r"mask: expected shape \(3, 2, 2\) as codes has, or \(2, 2\)",
        ),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, error, message):
    with pytest.raises(error, match=message):
        model().inpaint(codes(3, 2, 2), mask, 0)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(denoiser="mlp"), "denoiser: expected one of unet, transformer, got 'mlp'"),
        (dict(grid=(2,)), "grid: expected two positive numbers"),
        (dict(schedule="sigmoid"), "schedule: expected one of cosine"),
        (dict(T=0), "T: expected a whole number of noise levels"),
        (dict(denoiser="unet", grid=(3, 2), mults=(1, 2), dim=16), "grid: expected multiples of 2"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)


@pytest.mark.parametrize("value", [-1, K])
def test_a_known_code_out_of_range_is_named(value):
    with pytest.raises(ValueError, match=r"codes: expected values in 0\.\.7 outside the mask"):
        model().inpaint(codes(3, 2, 2, value=value), torch.eye(2).bool(), 0)

"""How samples are asked for: by confidence, on larger grids, between two images, from the likeliest codes."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from vqfast.cli import main
from vqfast.cli.encoding import encode
from vqfast.data import open_dataset
from vqfast.models.vqddm import VQDDMConfig
from vqfast.train import load_model
from vqfast.train.hub import from_pretrained


def run(command):
    return main(command.split())


def is_picture(path):
    with Image.open(path) as image:
        image.verify()
        return min(image.size) > 100


@pytest.fixture
def sample(runs, tmp_path):
    """Draws four images and gives the arrays of samples.npz."""

    def draw(kind, options, name="out"):
        assert run(f"sample {runs}/{kind} -n 4 {options} --out {tmp_path}/{name} --device cpu") == 0
        return dict(np.load(tmp_path / name / "samples.npz"))

    return draw


@pytest.mark.parametrize(
    ("options", "transition", "schedule"),
    [
        ("", "uniform", "cosine"),
        ("--schedule cosine_released", "uniform", "cosine_released"),
        ("--transition absorbing --schedule linear", "absorbing", "linear"),
        ("--transition mask_and_replace --mask-share 0.5", "mask_and_replace", "cosine"),
        ("--transition mask_and_replace --schedule vq_diffusion --rule marginal", "mask_and_replace", "vq_diffusion"),
        ("--transition marginal --rule marginal", "marginal", "cosine"),
        ("--transition gaussian --rule marginal", "gaussian", "cosine"),
        ("--transition nearest --schedule linear --aux-weight 0.1", "nearest", "linear"),
    ],
)
def test_every_family_of_noise_is_trained(runs, images, tmp_path, options, transition, schedule):
    sizes = "--denoiser transformer --dim 16 --depth 1 --heads 2 --timesteps 10"
    common = f"--vqvae {runs}/vqvae --data {images} --out {tmp_path}/run {sizes}"
    tiny = "--steps 1 --batch-size 8 --eval-every 0 --device cpu --no-tensorboard"
    assert run(f"train vqddm {common} {tiny} {options}") == 0
    config = load_model(tmp_path / "run", "vqddm").config
    assert (config.transition, config.schedule) == (transition, schedule)
    assert config.rule == ("marginal" if "--rule" in options else "joint")
    assert config.mask_share == (0.5 if "--mask-share" in options else 0.9)
    assert run(f"sample {tmp_path}/run -n 2 --steps 2 --out {tmp_path}/out --device cpu") == 0


@pytest.fixture(scope="module", params=["marginal", "gaussian", "nearest"])
def noisy(request, runs, images, tmp_path_factory):
    """A run of a family whose tables come of the data or the codebook, its command, and the family."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    command = (
        f"train vqddm --vqvae {runs}/vqvae --data {images} --out {out} --transition {request.param} --neighbours 3 "
        "--denoiser transformer --dim 16 --depth 1 --heads 2 --timesteps 10 --batch-size 8 --device cpu "
        "--no-tensorboard"
    )
    assert run(f"{command} --steps 2") == 0
    return out, command, request.param


def test_the_tables_of_the_noise_come_with_the_run(noisy, images):
    out, command, family = noisy
    assert run(f"{command} --steps 3 --resume") == 0
    config = load_model(out, "vqddm").config
    assert config == VQDDMConfig(**json.loads(json.dumps(asdict(config))))
    autoencoder = load_model(out / "vqvae", "vqvae")
    K = autoencoder.config.codebook_size
    if family == "marginal":
        counts = torch.bincount(encode(autoencoder, open_dataset(str(images)), "train").flatten(), minlength=K)
        assert config.marginal == pytest.approx(((counts + 1) / (counts + 1).sum()).tolist())
        assert min(config.marginal) > 0 and len(set(config.marginal)) > 1
    if family == "gaussian":
        assert config.betas == (0.01, 2.0)  # D3PM's 1e-4 and 0.02 of 1000 levels
    if family == "nearest":
        distance = torch.cdist(*[autoencoder.quantizer.codebook] * 2).fill_diagonal_(torch.inf)
        assert config.nearest == tuple(map(tuple, distance.topk(3, largest=False).indices.tolist()))
    described = json.loads((out / "run.json").read_text())["model"]
    assert described["transition"] == family and not {"marginal", "nearest"} & set(described)


def test_every_use_of_a_model_takes_every_family(noisy, images, tmp_path):
    out, _, family = noisy
    few = "--steps 3 --device cpu"
    assert run(f"sample {out} -n 2 --grid 6 5 --top-p 0.9 {few} --out {tmp_path}/sample") == 0
    assert np.load(tmp_path / "sample" / "samples.npz")["codes"].shape == (2, 6, 5)
    assert run(f"inpaint {out} --data {images} -n 2 --variations 1 {few} --out {tmp_path}/inpaint") == 0
    assert run(f"interpolate {out} --data {images} -n 1 --frames 1 {few} --out {tmp_path}/interpolate") == 0
    assert run(f"evaluate {out} --data {images} -n 2 --bits-n 2 {few} --out {tmp_path}/evaluate") == 0
    bits = json.loads((tmp_path / "evaluate" / "metrics.json").read_text())["bits_per_dim"]
    assert 0 < bits < 20
    assert run(f"report {out}") == 0
    assert run(f"share {out} --out {tmp_path}/shared --checkpoint last") == 0
    assert from_pretrained(tmp_path / "shared").config == load_model(out, "vqddm").config
    numbers = {"marginal": "16 values", "gaussian": "None", "nearest": "16 values"}[family]
    assert (
        f"| {'nearest' if family == 'nearest' else 'marginal'} | {numbers} |"
        in (tmp_path / "shared" / "README.md").read_text()
    )


def test_what_a_family_cannot_do_is_one_line(noisy, tmp_path, refused):
    out, command, family = noisy
    said = refused(f"sample {out} --decoding confidence --out {tmp_path}/out --device cpu", out)
    assert f"decoding: 'confidence' needs the transition 'absorbing', this model has '{family}'" in said
    if family == "nearest":
        assert "was started with model neighbours = 3, now it is 4" in refused(
            f"{command} --resume --neighbours 4 --steps 3", out
        )
    if family == "gaussian":
        assert "was started with model betas = [0.01, 2.0], now it is (0.1, 1.0)" in refused(
            f"{command} --resume --betas 0.1 1 --steps 3", out
        )


def test_every_option_of_the_loss_is_trained_with(runs, images, tmp_path):
    chosen = "--aux-weight 0.01 --aux-schedule adaptive --weighting reweighted --parameterisation residual"
    sizes = "--denoiser transformer --dim 16 --depth 1 --heads 2 --timesteps 10 --time-sampling uniform"
    common = f"--vqvae {runs}/vqvae --data {images} --out {tmp_path}/run {sizes}"
    tiny = "--steps 1 --batch-size 8 --eval-every 0 --device cpu --no-tensorboard"
    assert run(f"train vqddm {common} {tiny} {chosen}") == 0
    diffusion = load_model(tmp_path / "run", "vqddm").diffusion
    assert (diffusion.aux_weight, diffusion.aux_schedule) == (0.01, "adaptive")
    assert (diffusion.weighting, diffusion.parameterisation) == ("reweighted", "residual")
    assert diffusion.time_sampling == "uniform"


def test_decoding_by_confidence(runs, sample, tmp_path):
    drawn = sample("vqddm", "--decoding confidence --steps 3 --choice-temperature 0")
    model = load_model(runs / "vqddm", "vqddm")
    labels = torch.tensor([0, 0, 1, 1])
    generator = torch.Generator().manual_seed(0)
    expected = model.sample(
        4, labels, steps=3, decoding="confidence", choice_temperature=0.0, generator=generator, batch_size=4
    )
    assert np.array_equal(drawn["codes"], expected.numpy())
    assert not np.array_equal(sample("vqddm", "--steps 3", "chain")["codes"], drawn["codes"])
    described = json.loads((tmp_path / "out" / "run.json").read_text())
    assert described["decoding"] == "confidence" and described["choice_temperature"] == 0


def test_the_likeliest_codes_only(sample):
    for kind in ("vqddm", "raster_gpt", "dq_transformer"):
        one, other = (sample(kind, f"--top-k 1 --seed {seed}", f"{kind}{seed}")["codes"] for seed in (0, 1))
        if kind == "raster_gpt":
            assert np.array_equal(one, other), "one code to choose from leaves nothing to chance"
        assert sample(kind, "--top-p 0.5 --guidance 2", f"{kind}-p")["codes"].shape == one.shape


def test_a_grid_larger_than_the_model_was_trained_on(sample, tmp_path):
    drawn = sample("vqddm", "--grid 12 20 --steps 2")
    assert drawn["codes"].shape == (4, 12, 20) and drawn["images"].shape == (4, 24, 40, 1)
    assert is_picture(tmp_path / "out" / "samples.png")
    own = sample("vqddm", "--grid 4 4 --steps 2", "own")
    assert np.array_equal(own["codes"], sample("vqddm", "--steps 2", "default")["codes"])


@pytest.mark.parametrize(("run_of", "options"), [("vqddm", "--decoding confidence --steps 2"), ("raster_gpt", "")])
def test_inpainting_by_either_model_keeps_what_is_given(runs, images, tmp_path, run_of, options):
    command = f"inpaint {runs}/{run_of} --data {images} --mask left -n 3 --variations 2 --top-k 4 {options}"
    assert run(f"{command} --out {tmp_path}/out --device cpu") == 0
    found = np.load(tmp_path / "out" / "inpainting.npz")
    known = np.broadcast_to(~found["hidden"][:, None, :, :, None], found["results"].shape)
    original = np.broadcast_to(found["original"][:, None], found["results"].shape)
    assert np.array_equal(found["results"][known], original[known])
    assert not np.array_equal(found["results"], original)
    assert is_picture(tmp_path / "out" / "inpainting.png")


def test_interpolation_goes_from_one_image_to_the_other(runs, images, tmp_path):
    command = f"interpolate {runs}/vqddm --data {images} --split all -n 5 --frames 3 --device cpu"
    assert run(f"{command} --level 0.1 --out {tmp_path}/low") == 0
    found = np.load(tmp_path / "low" / "interpolation.npz")
    assert found["ends"].shape == (5, 2, 8, 8, 1) and found["results"].shape == (5, 3, 8, 8, 1)
    assert np.array_equal(np.load(images)["images"][found["indices"]], found["ends"][..., 0])
    assert is_picture(tmp_path / "low" / "interpolation.png")
    # At level 1 of 10 nine tenths of the codes are those of the ends: the nearer end is seen in a frame.
    autoencoder = load_model(runs / "vqvae", "vqvae")
    ends = torch.from_numpy(found["ends"]).float().permute(0, 1, 4, 2, 3) / 127.5 - 1
    with torch.no_grad():
        seen = torch.stack([autoencoder.reconstruct(ends[:, i]) for i in (0, 1)], 1).clamp(-1, 1)
    frames = torch.from_numpy(found["results"]).float().permute(0, 1, 4, 2, 3) / 127.5 - 1
    distance = (frames[:, :, None] - seen[:, None]).square().flatten(3).mean((0, 3))  # (frames, ends)
    assert distance[0, 0] < distance[0, 1] and distance[-1, 1] < distance[-1, 0]
    assert run(f"{command} --level 1 --steps 2 --unconditional --guidance 1 --out {tmp_path}/high") == 0
    assert json.loads((tmp_path / "high" / "run.json").read_text())["level"] == 10


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sample {runs}/vqddm --grid 2 8", "grid: expected at least the model's, (4, 4), got (2, 8)"),
        ("sample {runs}/vqddm --steps 0", "--steps: expected 1..10, the noise levels of"),
        ("sample {runs}/vqddm --steps 11", "vqddm, got 11"),
        ("sample {runs}/vqddm --steps 11 --decoding confidence", "--steps: expected 1..10, the noise levels of"),
        ("inpaint {runs}/vqddm --data {images} --steps 11", "--steps: expected 1..10, the noise levels of"),
        ("evaluate {runs}/vqddm --data {images} --steps 11", "--steps: expected 1..10, the noise levels of"),
        ("interpolate {runs}/vqddm --data {images} --level 0.3 --steps 4", "--steps: expected 1..3, the noise levels"),
        ("demo --sampling-steps 101", "--sampling-steps: expected 1..100, the noise levels, got 101"),
        ("sample {runs}/vqddm --top-k 0", "--top-k: expected at least 1"),
        ("sample {runs}/vqddm --temperature 0", "--temperature: expected a number above 0"),
        (
            "sample {runs}/vqddm --decoding confidence --choice-temperature=-1",
            "choice_temperature: expected at least 0",
        ),
        ("sample {runs}/vqddm -n 0", "--n: expected at least 1, got 0"),
        ("sample {runs}/dq_transformer --decoding confidence", "--decoding: the dq_transformer in"),
        ("interpolate {runs}/vqddm --data {images} --level 0", "--level: expected a share above 0"),
        ("interpolate {runs}/vqddm --data {images} --frames 0", "--frames: expected at least 1"),
        ("interpolate {runs}/dq_transformer --data {images}", "expected a vqddm run"),
        ("inpaint {runs}/dq_transformer --data {images}", "expected a vqddm or raster_gpt run"),
        (
            "train vqddm --vqvae {runs}/vqvae --data {images} --schedule vq_diffusion",
            "schedule: expected one of cosine, cosine_released, linear, reciprocal",
        ),
        (
            "train vqddm --vqvae {runs}/vqvae --data {images} --transition mask_and_replace --mask-share 2",
            "mask_share: expected a share in 0..1",
        ),
        (
            "train vqddm --vqvae {runs}/vqvae --data {images} --transition gaussian --betas 0 1",
            "betas: expected two numbers above 0",
        ),
        (
            "train vqddm --vqvae {runs}/vqvae --data {images} --transition nearest --neighbours 16",
            "neighbours: expected a whole number in 1..15 (K = 16), got 16",
        ),
        (
            "train vqddm --vqvae {runs}/vqvae --data {images} --transition nearest --rule marginal",
            "rule: expected 'joint' for the transition 'nearest', got 'marginal'",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(runs, images, tmp_path, refused, command, message):
    assert message in refused(f"{command.format(runs=runs, images=images)} --out {tmp_path}/out --device cpu", tmp_path)


def test_confidence_needs_noise_that_hides(trained, images, runs, tmp_path, refused):
    options = "--denoiser transformer --dim 16 --depth 1 --heads 2 --timesteps 4 --steps 1 --batch-size 4 --device cpu"
    assert run(f"train vqddm --vqvae {runs}/vqvae --data {images} --out {tmp_path}/run {options}") == 0
    said = refused(f"sample {tmp_path}/run --decoding confidence --out {tmp_path}/out", tmp_path)
    assert "decoding: 'confidence' needs the transition 'absorbing', this model has 'uniform'" in said

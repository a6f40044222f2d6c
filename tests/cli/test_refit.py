"""`vqfast train vqgan`, `refit` and `prune`: runs in, runs out, the ones that came in untouched."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vqfast.cli import main
from vqfast.train import load_model

TINY = "--steps 2 --batch-size 8 --device cpu --log-every 1"
TINY_VQGAN = (
    "--channels 32 --mults 1 1 --num-res-blocks 1 --attention-resolutions --codebook-size 16 --code-dim 4 "
    f"--z-channels 8 --disc-channels 8 --disc-start 1 {TINY}"
)


def run(command):
    return main(command.split())


def tree(folder):
    return {str(path): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, and a VQ-VAE and a VQGAN trained on them for two steps."""
    folder = tmp_path_factory.mktemp("refit")
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", images=rng.integers(0, 256, (40, 16, 16), dtype=np.uint8))
    assert run(f"train vqgan --data {folder}/images.npz --out {folder}/vqgan {TINY_VQGAN}") == 0
    shape = "--channels 32 --mults 1 1 --num-res-blocks 1 --codebook-size 16 --code-dim 4"
    assert run(f"train vqvae --data {folder}/images.npz --out {folder}/vqvae {shape} {TINY}") == 0
    return folder


def test_a_vqgan_trains_both_its_parts(folder):
    lines = [json.loads(line) for line in (folder / "vqgan" / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert [line["disc_weight"] > 0 for line in training] == [False, True]
    assert [line["discriminator/loss"] > 0 for line in training] == [False, True]
    config = json.loads((folder / "vqgan" / "run.json").read_text())["model"]
    assert config["disc_layers"] == 2, "as many as images of 16 pixels allow"
    model = load_model(folder / "vqgan", "vqgan")
    assert model.config.codebook_size == 16 and not model.has_perceptual_loss


def test_a_vqgan_run_does_what_a_vqvae_run_does(folder, tmp_path):
    assert run(f"reconstruct {folder}/vqgan --data {folder}/images.npz --out {tmp_path}/r --device cpu") == 0
    sizes = "--denoiser transformer --dim 16 --depth 1 --heads 2 --timesteps 10"
    assert run(f"train vqddm --vqvae {folder}/vqgan --data {folder}/images.npz --out {tmp_path}/d {sizes} {TINY}") == 0
    assert run(f"sample {tmp_path}/d -n 2 --out {tmp_path}/s --device cpu") == 0


@pytest.mark.parametrize("kind", ["vqvae", "vqgan"])
def test_refit_makes_another_run(folder, tmp_path, capsys, kind):
    before = tree(folder)
    command = f"refit {folder}/{kind} --data {folder}/images.npz --codebook-size 12 --vectors 200"
    assert run(f"{command} --out {tmp_path}/run {TINY}") == 0
    assert tree(folder) == before
    said = capsys.readouterr().out
    figures = json.loads((tmp_path / "run" / "refit.json").read_text())
    assert [figures[when]["codebook_size"] for when in ("before", "rebuilt", "after")] == [16, 12, 12]
    for found in figures.values():
        assert f"{found['codebook_usage_10']:.1%} of them used 10 times or more by 5 held-out images" in said
    assert figures["rebuilt"]["codebook_usage"] == 1.0
    old, new = (load_model(path, kind) for path in (folder / kind, tmp_path / "run"))
    assert new.config.freeze_encoder and new.config.codebook_size == 12
    for name, value in new.encoder.state_dict().items():
        assert torch.equal(value, old.encoder.state_dict()[name])
    assert not torch.equal(new.decoder.conv_out.weight, old.decoder.conv_out.weight)
    if kind == "vqgan":
        assert not new.config.adaptive_disc_weight and new.config.disc_weight == 0.8
    resumed = f"{command} --out {tmp_path}/run {TINY} --resume".replace("--steps 2", "--steps 3")
    assert run(resumed) == 0
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    assert run(resumed.replace("--vectors 200", "--vectors 300")) == 2
    assert "was started with refit vectors = 200, now it is 300" in capsys.readouterr().err


def test_prune_makes_a_run_of_the_codes_in_use(folder, tmp_path, capsys):
    before = tree(folder)
    assert run(f"prune {folder}/vqgan --data {folder}/images.npz --out {tmp_path}/run --device cpu") == 0
    assert tree(folder) == before
    kept = np.load(tmp_path / "run" / "kept_codes.npy")
    assert f"kept {len(kept)} of 16 codes" in capsys.readouterr().out
    old, new = load_model(folder / "vqgan", "vqgan"), load_model(tmp_path / "run", "vqgan")
    assert torch.equal(new.quantizer.codebook, old.quantizer.codebook[kept])
    figures = []
    for name, model in (("old", folder / "vqgan"), ("new", tmp_path / "run")):
        command = f"reconstruct {model} --data {folder}/images.npz --split all --out {tmp_path}/{name} --device cpu"
        assert run(command) == 0
        figures.append(json.loads((tmp_path / name / "metrics.json").read_text()))
    assert figures[1]["codebook_usage"] == 1.0
    assert figures[1]["psnr_db"] == pytest.approx(figures[0]["psnr_db"])


def test_weights_of_lpips_come_from_files(folder, tmp_path):
    from vqfast.nn.perceptual import _shapes

    weights = {name: 0.05 * torch.randn(shape).abs() for name, shape in _shapes().items()}
    linear = {name: value for name, value in weights.items() if name.startswith("lin")}
    torch.save({name: value for name, value in weights.items() if name not in linear}, tmp_path / "vgg16.pth")
    save_file(linear, tmp_path / "lpips.safetensors")
    lpips = f"--lpips {tmp_path}/vgg16.pth {tmp_path}/lpips.safetensors"
    assert run(f"train vqgan --data {folder}/images.npz --out {tmp_path}/run {lpips} {TINY_VQGAN}") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["perceptual"] > 0 for line in lines if "loss" in line)
    weights = next((tmp_path / "run" / "checkpoints").glob("step-*/model.safetensors"))
    assert weights.stat().st_size < 5e6, "VGG16 is not in it"


CASES = {
    "lpips without its linear layers": (
        "train vqgan --data {images} --out {tmp}/out --lpips {tmp}/x.pt", "x.pt: weights: expected those of VGG16"
    ),
    "lpips that is not there": ("train vqgan --data {images} --out {tmp}/out --lpips {tmp}/y.pt", "y.pt: no such file"),
    "refit of no autoencoder": ("refit {tmp} --data {images} --out {tmp}/out", "not a run"),
    "refit in place": ("refit {folder}/vqgan --data {images} --out {folder}/vqgan", "already holds a vqgan run"),
    "refit of few vectors": (
        "refit {folder}/vqgan --data {images} --out {tmp}/out --vectors 15", "--vectors: expected many more than the 16"
    ),
    "prune in place": ("prune {folder}/vqgan --data {images} --out {folder}/vqgan", "already holds a vqgan run"),
    "prune for coloured images": ("prune {folder}/vqgan --data {tmp}/x.npz --out {tmp}/out", "coloured images, but"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_one_line_and_changes_nothing(folder, tmp_path, capsys, case):
    command, message = CASES[case]
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "x.pt")
    np.savez(tmp_path / "x.npz", images=np.zeros((20, 16, 16, 3), np.uint8))
    before = tree(folder), tree(tmp_path)
    assert run(command.format(folder=folder, tmp=tmp_path, images=folder / "images.npz")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("vqfast: ") and message in said
    assert (tree(folder), tree(tmp_path)) == before


@pytest.mark.parametrize("command", ["train vqgan", "refit", "prune", "convert", "convert taming", "convert vqddm"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run(f"{command} --help")
    assert stop.value.code == 0
    assert f"usage: vqfast {command}" in capsys.readouterr().out

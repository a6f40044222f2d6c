"""`vqfast evaluate` promises: the figures of every kind of run, by any batches and processes; else one line."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

from vqfast.cli import main
from vqfast.models.dq_transformer import DQTransformer, DQTransformerConfig
from vqfast.models.dqvae import DQVAE, DQVAEConfig
from vqfast.models.raster_gpt import RasterGPT, RasterGPTConfig
from vqfast.models.vqddm import VQDDM, VQDDMConfig
from vqfast.models.vqgan import VQGAN, VQGANConfig
from vqfast.models.vqvae import VQVAE, VQVAEConfig
from vqfast.train import create_run
from vqfast.train.checkpoint import save_checkpoint

SHAPE = dict(image_size=8, in_channels=1, channels=32, num_res_blocks=1, codebook_size=16, code_dim=4)
DYNAMIC = dict(mults=(1, 1, 1), attention_resolutions=(), z_channels=32, router="entropy", entropy_per="image")
CODES = dict(codebook_size=16, grid=(4, 4), dim=16, heads=2, num_classes=2, class_dropout=0.1)
ALL = "--split all"  # the images are few
RECONSTRUCTED = {"psnr_db", "ssim", "codes_mean", "codebook_usage", "perplexity", "images", "images_per_s"}
COMPARED = {"inception_score", "inception_score_std", "precision", "recall"}
BITS = {"bits_per_dim", "bits_images"}


class Judge(torch.nn.Module):
    """Pixels as features, their sums as logits."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Parameter(torch.randn(192, 12, generator=torch.Generator().manual_seed(0)) / 8)

    def forward(self, x):
        features = x.flatten(1) @ self.mix
        return features, features[:, :5]


def save(folder, kind, model, info=None):
    """A run of an untrained model."""
    create_run(folder, kind, {"model": asdict(model.config)} | (info or {}))
    save_checkpoint(folder, 1, model, model.state_dict(), {}, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, a judge, and a run of every kind."""
    folder = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (45, 8, 8), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.array(["cat", "dog"])[np.arange(45) % 2])
    np.savez(folder / "others.npz", images=images, labels=np.arange(45) % 3)
    torch.jit.script(Judge()).save(str(folder / "judge.pt"))
    torch.manual_seed(0)
    data = {"data": {"classes": ["cat", "dog"]}}
    vqvae = VQVAE(VQVAEConfig(mults=(1, 1), **SHAPE))
    dqvae = DQVAE(DQVAEConfig(disc_weight=0.0, **DYNAMIC, **SHAPE))
    gan = dict(mults=(1, 1), attention_resolutions=(), z_channels=32, disc_channels=8, disc_layers=1)
    save(folder / "vqvae", "vqvae", vqvae)
    save(folder / "vqgan", "vqgan", VQGAN(VQGANConfig(**gan, **SHAPE)))
    save(folder / "dqvae", "dqvae", dqvae)
    save(folder / "vqddm", "vqddm", VQDDM(VQDDMConfig(denoiser="transformer", depth=1, T=4, **CODES)), data)
    save(folder / "raster_gpt", "raster_gpt", RasterGPT(RasterGPTConfig(depth=1, **CODES)), data)
    dq = DQTransformerConfig(position_depth=1, content_depth=1, max_length=None, **CODES)
    save(folder / "dq_transformer", "dq_transformer", DQTransformer(dq), data)
    for kind in ("vqddm", "raster_gpt"):
        save(folder / kind / "vqvae", "vqvae", vqvae)
    save(folder / "dq_transformer" / "dqvae", "dqvae", dqvae)
    return folder


@pytest.fixture
def evaluate(folder, tmp_path):
    """Evaluates a run of the folder and gives its figures."""

    def run(kind, options="", name="out", judge=True):
        words = f"evaluate {folder}/{kind} --data {folder}/images.npz --out {tmp_path}/{name} --device cpu {options}"
        judged = f" --features {folder}/judge.pt --splits 3" if judge else ""
        assert main((words + judged).split()) == 0
        return json.loads((tmp_path / name / "metrics.json").read_text())

    return run


def numbers(figures):
    """What a repetition must give again."""
    return {name: value for name, value in figures.items() if name not in ("kind", "split", "images_per_s")}


@pytest.mark.parametrize("kind", ["vqvae", "vqgan", "dqvae"])
def test_autoencoders_are_measured_by_their_reconstructions(evaluate, tmp_path, kind):
    found = evaluate(kind, ALL)
    assert RECONSTRUCTED | COMPARED | {"rfid"} <= set(found) and found["images"] == 45
    table = (tmp_path / "out" / "metrics.md").read_text()
    assert f" {found['rfid']:.3f} |" in table and "rFID" in table and f" {found['psnr_db']:.2f} |" in table
    known = {"kind", "split", "codes_least", "codes_most", "codebook_size", "codebook_usage_10"}
    assert set(found) == RECONSTRUCTED | COMPARED | {"rfid"} | known, "every figure of the table is in this list"


@pytest.mark.parametrize("kind", ["vqddm", "raster_gpt", "dq_transformer"])
def test_models_of_codes_are_measured_by_their_samples(evaluate, kind):
    found = evaluate(kind, f"{ALL} -n 20 --bits-n 7".replace("-n 20", "--n 20"))
    assert COMPARED | {"fid", "samples", "perplexity", "images_per_s"} <= set(found)
    assert (found["samples"], found["images"]) == (20, 45)
    assert BITS <= set(found) if kind != "dq_transformer" else not BITS & set(found)
    if kind == "dq_transformer":
        assert 4 <= found["codes_least"] <= found["codes_most"] <= 16
    else:
        assert found["bits_images"] == 7 and 3 < found["bits_per_dim"] < 6, "about log2 of 16 codes, untrained"


def test_the_figures_are_those_of_reconstruct(evaluate, folder, tmp_path):
    found = evaluate("vqvae", ALL, judge=False)
    assert main(f"reconstruct {folder}/vqvae --data {folder}/images.npz --out {tmp_path}/one {ALL}".split()) == 0
    expected = json.loads((tmp_path / "one" / "metrics.json").read_text())
    for name in ("psnr_db", "ssim", "codebook_usage", "codebook_usage_10", "perplexity"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6), name
    assert "rfid" not in found and "precision" not in found


@pytest.mark.parametrize("size", [7, 64])
def test_batches_of_any_size_give_the_same_figures(evaluate, size):
    expected = evaluate("dqvae", ALL, "one")
    found = evaluate("dqvae", f"{ALL} --batch-size {size} --workers 1", "other")
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-5)


def test_targets_of_codes_are_met(evaluate):
    found = evaluate("dqvae", f"{ALL} --target-codes 10", judge=False)
    assert (found["codes_least"], found["codes_mean"], found["codes_most"]) == (10, 10, 10)


def test_two_processes_give_the_figures_of_one(evaluate, folder, tmp_path):
    options = {"vqvae": f"{ALL} --batch-size 8", "raster_gpt": f"{ALL} --batch-size 8 --n 20 --bits-n 20"}
    commands = [
        f"evaluate {folder}/{kind} --data {folder}/images.npz --out {tmp_path}/two-{kind} --device cpu "
        f"--features {folder}/judge.pt --splits 3 {words}".split()
        for kind, words in options.items()
    ]
    script = f"from vqfast.cli import main\nassert [main(words) for words in {commands!r}] == [0, 0]"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | dict(
        WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    expected = {kind: evaluate(kind, words, f"one-{kind}") for kind, words in options.items()}
    said = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "measured a raster_gpt" in said[0][0] and said[1][0] == "", "one process writes"
    for kind, figures in expected.items():
        found = json.loads((tmp_path / f"two-{kind}" / "metrics.json").read_text())
        assert numbers(found) == pytest.approx(numbers(figures), rel=1e-9), kind
        assert json.loads((tmp_path / f"two-{kind}" / "run.json").read_text())["processes"] == 2


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("vqvae", "--features {folder}/images.npz", "images.npz: not a readable TorchScript file"),
        ("vqvae", "--features {folder}/judge.pt --inception a.pth", "--inception, --features: expected one of them"),
        ("vqvae", "--timm resnet18", "--timm, --timm-weights: expected both or none"),
        ("vqvae", "--batch-size 0", "--batch-size: expected at least 1, got 0"),
        ("vqvae", "--target-codes 7", "--target-codes, --target-error: need a DQ-VAE"),
        ("vqvae", "--lpips {folder}/nowhere.pth", "nowhere.pth"),
        (
            "vqvae",
            "--features {folder}/judge.pt --neighbours 45",
            "neighbours: expected fewer than the images",
        ),
        ("raster_gpt", "--steps 5", "--steps: the raster_gpt in"),
        ("raster_gpt", "--target-codes 7", "--target-codes, --target-error: need a DQ-VAE"),
        ("raster_gpt", "--data {folder}/others.npz", "has other classes than"),
        ("nowhere", "", "nowhere: no such run"),
        ("vqvae", "--out {folder}", "exists, is not empty and is not a run"),
    ],
)
def test_what_does_not_fit_is_one_line(folder, tmp_path, refused, kind, options, message):
    words = f"evaluate {folder}/{kind} --device cpu " + options.format(folder=folder)
    if "--data" not in options:
        words += f" --data {folder}/images.npz"
    if "--out" not in options:
        words += f" --out {tmp_path}/out"
    assert message in refused(words, tmp_path)

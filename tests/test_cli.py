"""What the command line promises: every command works; what is wrong is one line, exit code 2, no change on disk."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vqfast.cli import main
from vqfast.train import Stopped

TINY_VQVAE = (
    "--channels 32 --mults 1 1 --num-res-blocks 1 --codebook-size 16 --code-dim 4 --steps 3 --batch-size 8 --device cpu"
)
TINY_VQDDM = "--denoiser transformer --dim 16 --depth 1 --heads 2 --timesteps 10 --steps 3 --batch-size 8 --device cpu"


def run(command):
    return main(command.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, and a run of each model trained on them for three steps."""
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    np.savez(
        folder / "images.npz",
        images=rng.integers(0, 256, (40, 8, 8), dtype=np.uint8),
        labels=np.array(["cat", "dog"])[np.arange(40) % 2],
    )
    np.savez(folder / "colour.npz", images=rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    assert run(f"train vqvae --data {folder}/images.npz --out {folder}/vqvae {TINY_VQVAE}") == 0
    common = f"train vqddm --vqvae {folder}/vqvae --data {folder}/images.npz {TINY_VQDDM}"
    assert run(f"{common} --out {folder}/vqddm") == 0
    assert run(f"{common} --out {folder}/plain --unconditional --denoiser unet") == 0
    return folder


def tree(folder):
    return {str(path): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def is_picture(path):
    with Image.open(path) as image:
        image.verify()
        return min(image.size) > 100


def test_training_leaves_a_run(folder):
    described = json.loads((folder / "vqddm" / "run.json").read_text())
    assert described["kind"] == "vqddm"
    assert described["data"]["classes"] == ["cat", "dog"] and described["data"]["images"] == 40
    assert described["model"]["codebook_size"] == 16 and described["model"]["grid"] == [4, 4]
    assert (folder / "vqddm" / "metrics.jsonl").exists()
    assert (folder / "vqddm" / "vqvae" / "run.json").exists(), "the run stands alone"


def test_reconstruct(folder, tmp_path, capsys):
    for model in ("vqvae", "vqddm"):
        out = tmp_path / model
        assert run(f"reconstruct {folder}/{model} --data {folder}/images.npz --out {out} --split all") == 0
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics.pop("images_per_s") > 0
        assert metrics["images"] == 40 and metrics["codebook_size"] == 16
        assert 0 < metrics["psnr_db"] < 60 and 0 < metrics["codebook_usage"] <= 1
        assert is_picture(out / "reconstruction.png")
        assert f"PSNR {metrics['psnr_db']:.2f} dB" in capsys.readouterr().out
    other = json.loads((tmp_path / "vqvae" / "metrics.json").read_text())
    assert {name: value for name, value in other.items() if name != "images_per_s"} == metrics


def test_sample_draws_the_classes_asked_for_and_can_be_trained_on(folder, tmp_path):
    command = f"sample {folder}/vqddm -n 5 --labels dog cat --guidance 2 --steps 4 --device cpu"
    for out in ("a", "b"):
        assert run(f"{command} --out {tmp_path}/{out}") == 0
    drawn, again = (np.load(tmp_path / out / "samples.npz") for out in ("a", "b"))
    assert drawn["images"].shape == (5, 8, 8, 1) and drawn["images"].dtype == np.uint8
    assert drawn["labels"].tolist() == ["dog"] * 3 + ["cat"] * 2
    assert np.array_equal(drawn["images"], again["images"]), "a seed gives the same images"
    assert is_picture(tmp_path / "a" / "samples.png")
    out = tmp_path / "c"
    assert run(f"reconstruct {folder}/vqvae --data {tmp_path}/a/samples.npz --split all --out {out}") == 0


def test_sample_of_an_unconditional_model(folder, tmp_path):
    assert run(f"sample {folder}/plain -n 3 --out {tmp_path}/a --device cpu") == 0
    drawn = np.load(tmp_path / "a" / "samples.npz")
    assert drawn["images"].shape == (3, 8, 8, 1) and "labels" not in drawn


@pytest.mark.parametrize(
    ("mask", "hidden"), [("centre", 16), ("left", 32), ("right", 32), ("top", 32), ("bottom", 32), ("random", 32)]
)
def test_inpaint_changes_hidden_pixels_only(folder, tmp_path, mask, hidden):
    command = f"inpaint {folder}/vqddm --data {folder}/images.npz --mask {mask} -n 3 --variations 2 --steps 2"
    assert run(f"{command} --out {tmp_path}/a --device cpu") == 0
    result = np.load(tmp_path / "a" / "inpainting.npz")
    assert result["results"].shape == (3, 2, 8, 8, 1)
    assert result["hidden"].sum(axis=(1, 2)).tolist() == [hidden] * 3
    known = np.broadcast_to(~result["hidden"][:, None, :, :, None], result["results"].shape)
    original = np.broadcast_to(result["original"][:, None], result["results"].shape)
    assert np.array_equal(result["results"][known], original[known])
    assert not np.array_equal(result["results"], original)
    assert is_picture(tmp_path / "a" / "inpainting.png")


def test_hidden_pixels_do_not_reach_the_model(folder, tmp_path):
    """The same known half with another hidden half gives the same result."""
    images = np.load(folder / "images.npz")["images"]
    changed = images.copy()
    changed[:, :, :4] = 255 - changed[:, :, :4]
    results = []
    for name, pixels in (("a", images), ("b", changed)):
        np.savez(tmp_path / f"{name}.npz", images=pixels)
        command = f"inpaint {folder}/plain --data {tmp_path}/{name}.npz --mask left --split all -n 40 --variations 1"
        assert run(f"{command} --out {tmp_path}/{name} --device cpu") == 0
        results.append(np.load(tmp_path / name / "inpainting.npz")["results"])
    assert np.array_equal(*results)


def test_resume_goes_on_where_the_run_stopped(folder, tmp_path):
    shutil.copytree(folder / "vqvae", tmp_path / "run")
    command = f"train vqvae --data {folder}/images.npz --out {tmp_path}/run {TINY_VQVAE} --resume"
    assert run(command.replace("--steps 3", "--steps 5")) == 0
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000003", "step-00000005"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["training"]["steps"] == 5


def test_fewer_steps_than_were_taken_change_nothing(folder, tmp_path, capsys):
    shutil.copytree(folder / "vqvae", tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    command = f"train vqvae --data {folder}/images.npz --out {tmp_path}/run {TINY_VQVAE} --resume"
    assert run(command.replace("--steps 3", "--steps 2")) == 2
    assert "--steps: expected at least 3, which" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_processes_share_one_run(folder, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="1")
    code = "import sys; from vqfast.cli import main; sys.exit(main())"
    command = f"train vqddm --vqvae {folder}/vqvae --data {folder}/images.npz --out {tmp_path}/run {TINY_VQDDM}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *command.split()],
            env=shared | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "trained a VQ-DDM" in said[0] and said[1] == ""
    assert run(f"sample {tmp_path}/run -n 2 --out {tmp_path}/samples --device cpu") == 0


def test_images_of_any_size_from_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        image = Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8))
        (tmp_path / "set").mkdir(exist_ok=True)
        image.save(tmp_path / "set" / f"{i}.jpg")
    assert run(f"train vqvae --data {tmp_path}/set --image-size 8 --out {tmp_path}/run {TINY_VQVAE}") == 0
    assert run(f"reconstruct {tmp_path}/run --data {tmp_path}/set --out {tmp_path}/out") == 0


def truncate_weights(folder):
    weights = next(folder.rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-50])


def make_empty(path):
    path.mkdir()


def make_broken_image(path):
    path.mkdir()
    (path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")


def make_thesis(path):
    path.mkdir()
    (path / "thesis.txt").write_text("ten years of work")


CASES = {
    "missing path": ("train vqvae --data {tmp}/nowhere --out {tmp}/out", None, "nowhere: no such file or folder"),
    "empty folder": ("train vqvae --data {tmp}/x --out {tmp}/out", make_empty, "x: holds no images"),
    "broken image": ("train vqvae --data {tmp}/x --out {tmp}/out", make_broken_image, "broken image photo.png"),
    "out is not a run": ("train vqvae --data {images} --out {tmp}/x", make_thesis, "x: exists, is not empty and is"),
    "out is a file": (
        "sample {folder}/vqddm --out {tmp}/x", lambda p: p.write_text(""), "x: exists and is not a folder"
    ),
    "out is a run": ("train vqvae --data {images} --out {folder}/vqvae", None, "add --resume to continue it"),
    "resume of nothing": ("train vqvae --data {images} --out {tmp}/x --resume", None, "x: no such run"),
    "resume with other settings": (
        "train vqvae --data {images} --out {folder}/vqvae --resume --channels 64", None, "was started with model"
    ),
    "resume with other data": (
        f"train vqvae --data {{folder}}/colour.npz --out {{folder}}/vqvae --resume {TINY_VQVAE}", None, "started with"
    ),
    "unknown flag": ("train vqvae --data {images} --out {tmp}/out --colour red", None, "--colour"),
    "unknown command": ("paint", None, "paint"),
    "not a number": ("train vqvae --data {images} --out {tmp}/out --steps many", None, "--steps"),
    "missing argument": ("train vqvae --data {images}", None, "--out"),
    "number out of range": ("train vqvae --data {images} --out {tmp}/out --steps 0", None, "steps: expected at least"),
    "width not a multiple of 32": ("train vqvae --data {images} --out {tmp}/a --channels 20", None, "multiple of 32"),
    "size that cannot be halved": (
        "train vqvae --data {images} --out {tmp}/out --mults 1 1 1 1 1", None, "image_size: expected a multiple of 16"
    ),
    "images that are not square": (
        "train vqvae --data {tmp}/x --out {tmp}/out",
        lambda p: (p.mkdir(), Image.new("L", (8, 6)).save(p / "a.png")),
        "choose a square with --image-size",
    ),
    "cut checkpoint": (
        "sample {tmp}/x --out {tmp}/out",
        lambda p: (shutil.copytree(p.parent / "vqddm", p), truncate_weights(p / "checkpoints")),
        "model.safetensors: damaged",
    ),
    "checkpoint of another model": ("sample {folder}/vqvae --out {tmp}/out", None, "holds a vqvae run, expected"),
    "autoencoder of another kind": (
        "train vqddm --vqvae {folder}/vqddm --data {images} --out {tmp}/out", None, "holds a vqddm run, expected"
    ),
    "not a run": ("sample {folder} --out {tmp}/out", None, "not a run"),
    "images of other channels": (
        "reconstruct {folder}/vqvae --data {folder}/colour.npz --out {tmp}/out", None,
        "coloured images, but the autoencoder takes grey ones",
    ),
    "unknown class": ("sample {folder}/vqddm --out {tmp}/out --labels cow", None, "no class cow; the model has cat"),
    "class without classes": ("sample {folder}/plain --out {tmp}/out --labels cat", None, "without classes"),
    "no images asked for": ("sample {folder}/vqddm --out {tmp}/out -n 0", None, "n: expected"),
    "other classes": (
        "inpaint {folder}/vqddm --data {tmp}/x.npz --out {tmp}/out --split all",
        lambda p: np.savez(p.with_suffix(".npz"), images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4)),
        "has other classes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_one_line_and_changes_nothing(folder, tmp_path, capsys, case):
    command, prepare, message = CASES[case]
    if prepare:
        if case == "cut checkpoint":
            shutil.copytree(folder / "vqddm", tmp_path / "vqddm")
        prepare(tmp_path / "x")
    before = tree(folder), tree(tmp_path)
    capsys.readouterr()
    assert run(command.format(folder=folder, tmp=tmp_path, images=folder / "images.npz")) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("vqfast: "), said.err
    assert message in lines[0]
    assert said.out == ""
    assert (tree(folder), tree(tmp_path)) == before


def test_debug_shows_where(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        run(f"train vqvae --data {tmp_path}/nowhere --out {tmp_path}/out --debug")


@pytest.mark.parametrize(
    "command", ["", "train vqvae", "train vqddm", "sample", "inpaint", "reconstruct", "demo", "doctor"]
)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run(f"{command} --help")
    assert stop.value.code == 0
    assert f"usage: vqfast {command}".strip() in capsys.readouterr().out


def without(*modules):
    """Runs the command line in a process where these modules cannot be imported."""
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in modules)
    code = f"import sys; {blocked}from vqfast.cli import main; sys.exit(main())"
    return lambda *arguments: subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )


def test_a_comparison_or_demo_whose_training_was_stopped_does_not_end_as_if_it_were_done(
    folder, tmp_path, capsys, monkeypatch
):
    def stopped(self):
        raise Stopped("stopped after step 1 of 2; add --resume to go on")

    monkeypatch.setattr("vqfast.cli.train_vqvae.TrainVQVAE.execute", stopped)
    for command in (f"demo --out {tmp_path}/demo", f"compare vqddm --data digits --out {tmp_path}/compare"):
        assert run(command) == 130
        assert "vqfast: interrupted; only that training can go on" in capsys.readouterr().err
    with pytest.raises(Stopped):
        run(f"train vqvae --data {folder}/images.npz --out {tmp_path}/run")


def test_a_reader_that_goes_away_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    code = "import sys; from vqfast.cli import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", code, "--version"], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")


def test_doctor_needs_torch_only():
    result = without("tyro", "PIL", "accelerate", "safetensors", "sklearn", "tqdm", "matplotlib")("doctor")
    assert result.returncode == 0, result.stderr
    assert "torch" in result.stdout and "reference" in result.stdout


def test_a_missing_extra_is_named():
    result = without("tyro")("sample", "x", "--out", "y")
    assert result.returncode == 2
    assert result.stderr.strip() == (
        'vqfast: tyro is not installed; install what this command needs: pip install "vqfast[train]"'
    )


def test_the_demo_reports_every_figure(tmp_path, capsys):
    command = f"demo --out {tmp_path}/demo --vqvae-steps 2 --vqddm-steps 2 --sampling-steps 2"
    assert run(command) == 0
    out = capsys.readouterr().out
    assert "MISSED" in out, "two steps cannot be enough, and the demo says so"
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert len(metrics["figures"]) == 4
    for figure in metrics["figures"]:
        assert figure["name"] in out and figure["verdict"] in ("met", "MISSED")
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and 'src="http' not in page
    for name in ("samples", "inpainting", "reconstruction", "curves"):
        assert is_picture(tmp_path / "demo" / f"{name}.png")
    capsys.readouterr()
    assert run(command) == 2, "an earlier demo is not overwritten unasked"
    assert "add --overwrite to replace it" in capsys.readouterr().err
    assert run(f"{command} --overwrite --seed 1") == 0
    assert json.loads((tmp_path / "demo" / "run.json").read_text())["seed"] == 1


def test_the_demo_overwrites_nothing_but_a_demo(folder, capsys):
    before = tree(folder)
    assert run(f"demo --out {folder}/vqvae --overwrite") == 2
    assert "holds a vqvae run, expected a demo run" in capsys.readouterr().err
    assert tree(folder) == before

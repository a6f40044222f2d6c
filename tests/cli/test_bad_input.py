"""What every command promises of wrong input: exit code 2, one clear line, nothing changed on the disk.

One table has all commands of the parser, one list of hazards each thing that a command takes: a run, images, a file,
a place for its results.
"""

import functools
import json
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.conftest import NETWORK, SHARP, TRAININGS, folder_of
from vqfast.cli import main, parser
from vqfast.cli.commands import COMMANDS, CONFIGURABLE
from vqfast.cli.parser import parse

# Every command with all that it needs. What it takes is in braces: {run:KIND} a run, {images}, {file} a checkpoint of
# other code, {lpips} weights, {folder} of runs, {out} a place for a folder, {page} a place for a file.
TABLE = {
    "train vqvae": f"--data {{images}} --out {{out}} {NETWORK}",
    "train vqgan": f"--data {{images}} --out {{out}} {NETWORK} {SHARP} --lpips {{lpips}}",
    "train dqvae": f"--data {{images}} --out {{out}} {NETWORK} {SHARP} --lpips {{lpips}}",
    "train vqddm": "--vqvae {run:vqvae} --data {images} --out {out}",
    "train raster_gpt": "--vqvae {run:vqgan} --data {images} --out {out}",
    "train dq_transformer": "--dqvae {run:dqvae} --data {images} --out {out}",
    "sample": "{run:vqddm} --out {out}",
    "inpaint": "{run:raster_gpt} --data {images} --out {out}",
    "interpolate": "{run:vqddm} --data {images} --out {out}",
    "reconstruct": "{run:dqvae} --data {images} --out {out}",
    "evaluate": "{run:dq_transformer} --data {images} --out {out} --lpips {lpips}",
    "refit": "{run:vqgan} --data {images} --out {out} --lpips {lpips}",
    "prune": "{run:vqvae} --data {images} --out {out}",
    "convert taming": "{file} --out {out}",
    "convert vqddm": "{file} --autoencoder {run:vqvae} --out {out}",
    "convert dqvae": "{file} --out {out}",
    "runs": "{folder}",
    "report": "{run:vqgan} --out {page}",
    "share": "{run:dqvae} --out {out}",
    "presets": "",
    "compare vqddm": "--vqvae {run:vqvae} --data {images} --out {out}",
    "compare dqvae": "--data {images} --image-size 16 --crop 16 --cell 4 --side 6 --out {out}",
    "compare generation": "--dqvae {run:dqvae} --data {images} --out {out}",
    "demo": "--out {out}",
    "doctor": "",
}


def test_the_table_has_every_command():
    assert set(TABLE) == set(COMMANDS)


def taking(*names):
    return [command for command, words in TABLE.items() if any(f"{{{name}" in words for name in names)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file that torch.save wrote."""
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.randn(8, 3, 3, 3)}}, path)
    return path


@pytest.fixture
def parsed_once(monkeypatch):
    """A command that is given twenty times is parsed once."""
    again = functools.cache(lambda argv: parse(argv))
    monkeypatch.setattr(parser, "parse", lambda argv: again(tuple(argv)))


@pytest.fixture
def line(runs, images, weights, tmp_path, refused, parsed_once):
    """Runs a command with some of what it takes replaced; gives the line with which it was refused."""

    def run(command, **given):
        words = TABLE[command]
        kind = next(iter(re.findall(r"{run:(\w+)}", words)), None)
        fitting = dict(run=runs / str(kind), images=images, file=weights, folder=runs, out=tmp_path / "new")
        fitting |= {"page": tmp_path / "page.html"} | given
        # Where they are not what is asked about, weights of LPIPS are left out.
        words = words if "lpips" in given else words.replace("--lpips {lpips}", "")
        words = re.sub(r"{run:\w+}", "{run}", words).format(**fitting)
        return refused(f"{command} {words}", tmp_path, quickly=runs)

    return run


@pytest.fixture
def copy(runs, tmp_path):
    """A run of one's own to damage: that which a command of the table takes."""

    def make(command):
        (kind,) = re.findall(r"{run:(\w+)}", TABLE[command])
        return shutil.copytree(runs / kind, tmp_path / "copy")

    return make


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def weights_of(run):
    return [path / "model.safetensors" for path in sorted((run / "checkpoints").iterdir())]


# --- a run


@pytest.mark.parametrize("command", taking("run"))
def test_a_run_that_is_not_there(line, tmp_path, command):
    assert f"{tmp_path}/nowhere: no such run" in line(command, run=tmp_path / "nowhere")


@pytest.mark.parametrize("command", taking("run"))
def test_a_folder_or_file_that_is_no_run(line, tmp_path, command):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no run")
    for name in ("empty", "file"):
        assert f"{name}: not a run (it holds no run.json)" in line(command, run=tmp_path / name)


@pytest.mark.parametrize("command", taking("run"))
def test_a_run_of_another_kind(line, copy, command):
    run = copy(command)
    edit(run / "run.json", kind="demo")
    (run / "metrics.jsonl").unlink()
    message = line(command, run=run)
    expected = "holds no metrics yet (it is a demo run)" if command == "report" else "demo"
    assert expected in message and ("expected a" in message or command == "report")


@pytest.mark.parametrize("command", taking("run"))
def test_a_run_of_a_newer_version(line, copy, command):
    run = copy(command)
    edit(run / "run.json", format=99)
    assert "written by a newer vqfast (format 99" in line(command, run=run)


@pytest.mark.parametrize("command", taking("run"))
def test_a_run_whose_description_is_broken(line, copy, command):
    run = copy(command)
    for text in ("", "{", "[]", '{"kind": 3}', "\x00\x01"):
        (run / "run.json").write_text(text)
        assert "run.json: " in line(command, run=run), text


USE_WEIGHTS = [command for command in taking("run") if command != "report"]


@pytest.mark.parametrize("command", USE_WEIGHTS)
def test_a_checkpoint_that_is_missing_or_newer_or_no_checkpoint(line, copy, command):
    run = copy(command)
    for file in weights_of(run):
        edit(file.with_name("checkpoint.json"), format=99)
    assert "written by a newer vqfast (format 99" in line(command, run=run)
    for file in weights_of(run):
        file.with_name("checkpoint.json").write_text("{}")
    assert "checkpoint.json: lacks 'kind'" in line(command, run=run)
    for file in weights_of(run):
        file.with_name("checkpoint.json").unlink()
    assert "checkpoint.json: not readable: " in line(command, run=run)
    shutil.rmtree(run / "checkpoints")
    assert "holds no checkpoint yet" in line(command, run=run)


@pytest.mark.parametrize("command", USE_WEIGHTS)
def test_a_checkpoint_with_a_flipped_byte(line, copy, command):
    run = copy(command)
    for file in weights_of(run):
        data = bytearray(file.read_bytes())
        data[len(data) // 3] ^= 1
        file.write_bytes(data)
    assert "damaged (its SHA-256 is not the one recorded" in line(command, run=run)


@pytest.mark.parametrize("command", USE_WEIGHTS)
def test_a_checkpoint_cut_at_any_of_twenty_points(line, copy, command):
    run = copy(command)
    whole = {file: file.read_bytes() for file in weights_of(run)}
    for point in range(20):
        for file, data in whole.items():
            file.write_bytes(data[: len(data) * point // 20])
        assert "damaged (its SHA-256 is not the one recorded" in line(command, run=run), point


@pytest.mark.parametrize("command", ["sample", "inpaint", "interpolate", "evaluate"])
def test_a_run_whose_own_autoencoder_is_damaged_or_gone(line, copy, command):
    run = copy(command)
    (inside,) = [path for path in (run / "vqvae", run / "dqvae") if path.exists()]
    for file in weights_of(inside):
        file.write_bytes(file.read_bytes()[:-50])
    assert "damaged (its SHA-256 is not the one recorded" in line(command, run=run)
    shutil.rmtree(inside)
    assert f"{inside}: no such run" in line(command, run=run)


# --- a run to go on with


@pytest.fixture
def resume(runs, images, tmp_path, refused):
    """Tries to go on with a copy of a command's own run, damaged by a function."""

    def run(command, damage, more=""):
        own = shutil.copytree(runs / folder_of(command), tmp_path / "own")
        damage(own)
        words = f"{command} {TRAININGS[command].format(runs=runs, images=images)} --out {own} --resume --steps 3 {more}"
        return refused(words, tmp_path, quickly=runs)

    return run


def cut(run):
    for file in weights_of(run):
        file.write_bytes(file.read_bytes()[:-50])


@pytest.mark.parametrize("command", CONFIGURABLE)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "damaged (its SHA-256 is not the one recorded"),
        (lambda run: edit(run / "run.json", kind="demo"), "demo"),
        (lambda run: edit(run / "run.json", format=99), "written by a newer vqfast (format 99"),
        (lambda run: edit(run / "run.json", training={"lr": 5.0}), "was started with training"),
        (lambda run: shutil.rmtree(run), "own: no such run"),
    ],
)
def test_a_run_that_cannot_go_on(resume, command, damage, message):
    assert message in resume(command, damage)


# --- images


@pytest.mark.parametrize("command", taking("images"))
def test_images_that_are_not_there(line, tmp_path, command):
    assert f"{tmp_path}/nowhere: no such file or folder" in line(command, images=tmp_path / "nowhere")


@pytest.mark.parametrize("command", taking("images"))
def test_a_folder_without_images(line, tmp_path, command):
    (tmp_path / "folder").mkdir()
    assert "folder: holds no images" in line(command, images=tmp_path / "folder")
    (tmp_path / "folder" / "thesis.txt").write_text("ten years of work")
    assert "folder: holds no images" in line(command, images=tmp_path / "folder")
    assert "thesis.txt: expected a folder of images" in line(command, images=tmp_path / "folder" / "thesis.txt")


@pytest.mark.parametrize("command", taking("images"))
def test_images_that_are_broken(line, images, tmp_path, command):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    assert "broken image photo.png" in line(command, images=tmp_path / "folder")
    whole = images.read_bytes()
    for name in ("cut.npz", "cut.zip", "cut.tar", "cut-idx3-ubyte.gz"):
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        assert name in line(command, images=tmp_path / name)


@pytest.mark.parametrize("command", taking("images"))
def test_images_of_another_kind(line, tmp_path, command):
    np.savez(tmp_path / "float.npz", images=np.zeros((20, 8, 8), np.float32))
    assert "expected images of dtype uint8" in line(command, images=tmp_path / "float.npz")
    np.savez(tmp_path / "other.npz", pictures=np.zeros((20, 8, 8), np.uint8))
    assert "expected an array named images, got pictures" in line(command, images=tmp_path / "other.npz")
    if "{run:" in TABLE[command]:
        np.savez(tmp_path / "colour.npz", images=np.zeros((20, 8, 8, 3), np.uint8))
        assert "coloured images, but the autoencoder takes grey ones" in line(command, images=tmp_path / "colour.npz")


@pytest.mark.parametrize("command", ["train vqvae", "train vqgan", "train dqvae"])
def test_images_of_several_sizes(line, tmp_path, command):
    """With a size they are fitted to it; a model of codes asks for its autoencoder's."""
    (tmp_path / "folder").mkdir()
    for name, size in (("a", (8, 8)), ("b", (8, 9))):
        Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / "folder" / f"{name}.png")
    said = line(command, images=tmp_path / "folder")
    assert "images of different sizes (a.png is 8x8, b.png is 9x8 pixels): choose one with --image-size" in said
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for name in ("a.png", "b.png"):
            shard.add(tmp_path / "folder" / name, name)
    assert "of different sizes" in line(command, images=tmp_path / "shard.tar")


def test_images_of_several_sizes_are_trained_on_at_one(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "folder").mkdir()
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for i in range(12):
            path = tmp_path / "folder" / f"{i}.png"
            Image.fromarray(rng.integers(0, 256, (9 + i, 30 - i), dtype=np.uint8)).save(path)
            shard.add(path, path.name)
    for source in ("folder", "shard.tar"):
        options = TRAININGS["train vqvae"].format(images=tmp_path / source)
        assert main(f"train vqvae {options} --image-size 8 --out {tmp_path}/run-{source}".split()) == 0


# --- files


@pytest.mark.parametrize(("command", "name"), [(c, n) for n in ("file", "lpips") for c in taking(n)])
def test_a_file_of_weights_that_cannot_be_read(line, weights, tmp_path, command, name):
    assert "nowhere.pt: no such file" in line(command, **{name: tmp_path / "nowhere.pt"})
    (tmp_path / "folder.pt").mkdir()
    assert "folder.pt" in line(command, **{name: tmp_path / "folder.pt"})
    for suffix in (".pt", ".safetensors"):
        (tmp_path / f"text{suffix}").write_text("no weights")
        assert f"text{suffix}: not a" in line(command, **{name: tmp_path / f"text{suffix}"})
    assert "weights.pt: " in line(command, **{name: weights}), "weights of something else"


@pytest.mark.parametrize(("command", "name"), [(c, n) for n in ("file", "lpips") for c in taking(n)])
def test_a_file_of_weights_cut_at_any_of_twenty_points(line, weights, tmp_path, command, name):
    whole = weights.read_bytes()
    for point in range(20):
        (tmp_path / "cut.pt").write_bytes(whole[: len(whole) * point // 20])
        assert "cut.pt: not a checkpoint that torch.save wrote" in line(command, **{name: tmp_path / "cut.pt"}), point


# --- a place for the results


@pytest.mark.parametrize("command", taking("out"))
def test_a_place_that_is_taken(line, runs, tmp_path, command):
    (tmp_path / "file").write_text("a thesis")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("ten years of work")
    assert "file: exists and is not a folder" in line(command, out=tmp_path / "file")
    assert "folder: exists, is not empty and is not a run" in line(command, out=tmp_path / "folder")
    assert re.search("holds an? (earlier )?(vqvae|demo)", line(command, out=runs / "vqvae"))
    assert "file is not a folder" in line(command, out=tmp_path / "file" / "below")


def test_a_page_that_is_there_or_cannot_be(line, tmp_path):
    (tmp_path / "page.html").write_text("a thesis")
    assert "page.html: exists; choose another --out" in line("report", page=tmp_path / "page.html")
    assert "nowhere: no such folder" in line("report", page=tmp_path / "nowhere" / "page.html")


# --- the rest


def test_runs_of_nothing(line, tmp_path):
    assert "nowhere: no such folder" in line("runs", folder=tmp_path / "nowhere")
    assert "holds no runs" in line("runs", folder=tmp_path)
    (tmp_path / "file").write_text("no folder")
    assert "file: not a folder" in line("runs", folder=tmp_path / "file")


def test_a_report_of_broken_metrics(line, copy, runs):
    run = copy("report")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss\n')
    assert "metrics.jsonl: not readable" in line("report", run=run)
    shutil.copy(runs / "vqgan" / "metrics.jsonl", run)
    (run / "state.json").write_text("{")
    assert "state.json: not readable" in line("report", run=run)


@pytest.mark.parametrize("command", TABLE)
def test_words_that_it_does_not_know(refused, tmp_path, command):
    full = re.sub(r"{[\w:]+}", "x", TABLE[command])
    assert "Unrecognized options: --no-such-option" in refused(f"{command} {full} --no-such-option", tmp_path)
    if command not in ("runs", "demo", "presets", "doctor"):
        assert re.search("Missing (from|value)", refused(command, tmp_path)), "without anything that it needs"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sampel x", "no command sampel; the nearest is sample"),
        ("train vqvea --out x", "no command train vqvea; the nearest is train vqvae"),
        ("draw x", "no command draw; there are train, sample, "),
        ("train unet", "no command train unet; there are vqvae, vqgan, "),
        ("train", "Expected one of {vqvae, vqgan, "),
        ("--config x", "--config: expected after one of train vqvae"),
    ],
)
def test_words_that_are_no_command(refused, tmp_path, words, message):
    assert message in refused(words, tmp_path)


NOWHERE = ("convert taming", "convert vqddm", "convert dqvae", "runs", "report", "share", "presets", "doctor")


@pytest.mark.parametrize("command", [command for command in TABLE if command not in NOWHERE])
def test_every_command_that_computes_is_told_where(refused, tmp_path, command):
    full = re.sub(r"{[\w:]+}", "x", TABLE[command])
    message = refused(f"{command} {full} --device tpu", tmp_path)
    assert "invalid choice 'tpu' for argument '--device'. Expected one of ('auto', 'cpu')" in message

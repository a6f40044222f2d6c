"""What looking at runs promises: a list with states, a page with curves and pictures, a folder to share."""

import json
import re
import shutil

import pytest
import torch

from tests.cli.conftest import TRAININGS
from vqfast.cli import main
from vqfast.train import RunError, load_model
from vqfast.train.hub import Pretrained, from_pretrained


def run(command):
    return main(command.split())


def test_runs_are_listed_with_their_state(trained, tmp_path, capsys):
    for name in ("finished", "killed", "failed", "unreadable"):
        shutil.copytree(trained / "vqvae", tmp_path / name)
    state = json.loads((tmp_path / "killed" / "state.json").read_text())
    import socket

    gone = {"state": "running", "pid": 2**22 + 1, "host": socket.gethostname()}
    (tmp_path / "killed" / "state.json").write_text(json.dumps(state | gone))
    broken = {"state": "failed", "message": "the loss exploded"}
    (tmp_path / "failed" / "state.json").write_text(json.dumps(state | broken))
    (tmp_path / "unreadable" / "run.json").write_text("{")
    shutil.copytree(trained / "vqvae", tmp_path / "finished" / "vqvae")
    capsys.readouterr()
    assert run(f"runs {tmp_path}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5, "a run inside a run is a copy that it needs"
    words = {line.split()[0].rsplit("/", 1)[-1]: line for line in lines[1:]}
    assert "vqvae" in words["finished"] and "finished" in words["finished"] and "4 of 4" in words["finished"]
    assert "killed" in words["killed"].split()[2:] and "failed (the loss exploded)" in words["failed"]
    assert "not readable" in words["unreadable"]


def test_a_report_is_one_page(trained, tmp_path):
    assert run(f"report {trained}/vqvae --out {tmp_path}/page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") >= 3 and 'src="http' not in page
    for text in ("finished", "4 of 4", "held_out/loss", "codebook_size: 16", "Step 4"):
        assert text in page, text
    assert run(f"report {trained}/vqvae --out {tmp_path}/page.html") == 2, "a page is not overwritten unasked"


@pytest.mark.parametrize("kind", ["vqvae", "vqgan", "dqvae", "refit", "vqddm", "raster_gpt", "dq_transformer"])
def test_every_kind_of_training_has_a_report(runs, tmp_path, kind):
    assert run(f"report {runs}/{kind} --out {tmp_path}/page.html") == 0
    page = (tmp_path / "page.html").read_text()
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles[0] == "State" and "Curves" in titles and "Step 2" in titles and titles[-1] == "Settings"
    assert ("Codebook" in titles) == (kind in ("vqvae", "vqgan", "dqvae", "refit"))
    assert "perceptual" not in "".join(re.findall("<h2>Curves</h2><p>(.*?)</p>", page)), "0 throughout: not drawn"


def test_tensorboard_has_grain_maps_and_the_use_of_codes(images, runs, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    grained = {"dqvae": {"grains"}, "dq_transformer": {"held out, grains", "samples, grains"}}
    for kind, names in grained.items():
        options = TRAININGS[f"train {kind}"].format(runs=runs, images=images).replace("--no-tensorboard", "")
        assert run(f"train {kind} {options} --out {tmp_path}/{kind}") == 0
        written = EventAccumulator(str(tmp_path / kind / "tensorboard")).Reload()
        assert names <= {tag.replace("_", " ") for tag in written.Tags()["images"]}, written.Tags()
        assert written.Tags()["histograms"] == (["codebook"] if kind == "dqvae" else [])


def test_a_shared_model_comes_back(trained, tmp_path):
    assert run(f"share {trained}/vqvae --out {tmp_path}/shared --checkpoint last") == 0
    files = sorted(path.name for path in (tmp_path / "shared").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors", "pictures.png"]
    expected, found = load_model(trained / "vqvae", "vqvae"), from_pretrained(tmp_path / "shared")
    assert found.config == expected.config and not found.training
    assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.state_dict().items())
    card = (tmp_path / "shared" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: vqfast") and "held_out/loss" in card and "](pictures.png)" in card
    assert f"{sum(p.numel() for p in expected.parameters()) / 1e6:.2f} M parameters, 4 training steps" in card


def test_a_model_without_a_run_can_be_shared(trained, tmp_path):
    model = load_model(trained / "vqvae", "vqvae")
    Pretrained(model).save_pretrained(tmp_path / "shared")
    assert Pretrained.from_pretrained(str(tmp_path / "shared")).model.config == model.config


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "model.safetensors").write_bytes(b"x"), "damaged"),
        (lambda p: (p / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda p: (p / "config.json").unlink(), "not a shared model"),
        (lambda p: (p / "config.json").write_text("{}"), "lacks 'kind'"),
        (lambda p: (p / "config.json").write_text('{"format": 99}'), "newer vqfast"),
    ],
)
def test_a_shared_folder_that_is_not_as_written_is_refused(trained, tmp_path, damage, message):
    Pretrained(load_model(trained / "vqvae", "vqvae")).save_pretrained(tmp_path / "shared")
    damage(tmp_path / "shared")
    with pytest.raises(RunError, match=message):
        from_pretrained(tmp_path / "shared")


def test_presets_are_listed_with_their_parameters(capsys):
    assert run("presets") == 0
    said = capsys.readouterr().out
    assert "vqddm-512" in said and "117.45 M" in said and "117.59 M" in said

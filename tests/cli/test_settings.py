"""What settings in YAML promise: they repeat a run, and what is not understood is named."""

import pytest
import torch
import yaml

from tests.cli.conftest import TRAININGS, folder_of
from vqfast.cli import main
from vqfast.cli.commands import CONFIGURABLE
from vqfast.train import load_model


def run(command):
    return main(command.split())


def test_every_training_is_tried_here():
    assert set(TRAININGS) == set(CONFIGURABLE)


@pytest.mark.parametrize("command", CONFIGURABLE)
def test_the_saved_settings_repeat_the_run(runs, tmp_path, command):
    saved = runs / folder_of(command) / "config.yaml"
    settings = yaml.safe_load(saved.read_text())
    assert settings["command"] == command and settings["training"]["steps"] == 2
    assert main([*command.split(), "--config", str(saved), "--out", str(tmp_path / "again")]) == 0
    first, again = (load_model(path).state_dict() for path in (saved.parent, tmp_path / "again"))
    assert first.keys() == again.keys() and all(torch.equal(again[name], value) for name, value in first.items())
    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text()) == settings


@pytest.mark.parametrize("command", CONFIGURABLE)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("outt: x", "unknown setting outt; the nearest is out"),
        ("training: {lerning_rate: 1}", "unknown setting training.lerning_rate; the nearest is training."),
        ("format: 99", "written by a newer vqfast (format 99"),
        ("command: train a_horse", "settings of vqfast train a_horse, not of vqfast"),
    ],
)
def test_every_training_refuses_what_is_no_setting_of_it(runs, tmp_path, refused, command, more, message):
    saved = (runs / folder_of(command) / "config.yaml").read_text()
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(yaml.safe_load(saved) | yaml.safe_load(more)))
    assert message in refused(f"{command} --config {tmp_path}/a.yaml --out {tmp_path}/out", tmp_path, runs)


def test_what_was_left_to_be_chosen_is_resolved(trained, tmp_path):
    settings = yaml.safe_load((trained / "vqvae" / "config.yaml").read_text())
    assert settings["image_size"] == 8 and settings["channels"] == 32
    assert list(settings)[-1] == "training", "groups come last"


def test_a_run_to_work_on_that_is_named_overrides_the_file(runs, tmp_path):
    saved = runs / "refit" / "config.yaml"
    assert run(f"refit {runs}/vqvae --config {saved} --out {tmp_path}/again") == 0
    settings = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert settings["run"] == str(runs / "vqvae")
    assert load_model(tmp_path / "again", "vqvae").config.codebook_size == 8


def test_later_arguments_override_the_file(trained, tmp_path):
    saved = trained / "vqvae" / "config.yaml"
    assert run(f"train vqvae --config={saved} --out {tmp_path}/again --steps 2 --codebook-size 8") == 0
    settings = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert settings["training"]["steps"] == 2 and settings["codebook_size"] == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chanels: 32", "unknown setting chanels; the nearest is channels"),
        ("training: {lerning_rate: 1}", "unknown setting training.lerning_rate; the nearest is training."),
        ("training: {warm_up: 1}", "unknown setting training.warm_up; the nearest is training.warmup"),
        ("training: 3", "training: expected settings (name: value), got 3"),
        ("format: 99", "written by a newer vqfast (format 99"),
        ("command: train vqddm", "settings of vqfast train vqddm, not of vqfast train vqvae"),
        ("[1, 2]", "expected settings (name: value), got list"),
        ("a: [", "not readable: "),
        ("channels: many", "--channels"),
        ("training: {steps: 0}", "steps: expected at least 1"),
    ],
)
def test_what_is_not_understood_is_named(trained, tmp_path, refused, text, message):
    (tmp_path / "a.yaml").write_text(text)
    command = f"train vqvae --config {tmp_path}/a.yaml --data {trained}/images.npz --out {tmp_path}/out"
    assert message in refused(command, tmp_path)


def test_a_file_that_is_not_there_and_a_command_without_settings(tmp_path, refused):
    assert "No such file" in refused(f"train vqvae --config {tmp_path}/no.yaml --out {tmp_path}/out", tmp_path)
    assert "--config: expected after one of train vqvae" in refused(f"runs --config {tmp_path}/no.yaml", tmp_path)
    assert "--config: expected a YAML file" in refused("train vqvae --config", tmp_path)

"""What checkpoints promise: complete or absent, checked on load, refused where they do not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from vqfast.train import RunError, create_run, load_model
from vqfast.train.checkpoint import newest_checkpoint, save_checkpoint


def save(run, step, model, **options):
    return save_checkpoint(run, step, model, model.state_dict(), {"x": torch.zeros(3)}, {}, **options)


@pytest.fixture
def tiny_model(fresh_model):
    return fresh_model()


@pytest.fixture
def run(tmp_path, tiny_model):
    create_run(tmp_path / "run", "vqvae", {})
    save(tmp_path / "run", 7, tiny_model)
    return tmp_path / "run"


@pytest.fixture
def weights(run):
    return run / "checkpoints" / "step-00000007" / "model.safetensors"


def test_a_model_comes_back_as_it_was(run, tiny_model):
    loaded = load_model(run, "vqvae")
    assert loaded.config == tiny_model.config and not loaded.training
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_the_two_newest_are_kept_and_the_last_is_used(run, tiny_model):
    for step in (8, 100, 9):
        save(run, step, tiny_model)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000009", "step-00000100"]
    assert newest_checkpoint(run).step == 100


def test_an_interrupted_write_is_not_seen(run, weights):
    shutil.copytree(weights.parent, weights.parent.with_name(".step-00000008.1234"))
    (weights.parent.with_name(".step-00000008.1234") / "model.safetensors").unlink()
    assert newest_checkpoint(run).step == 7


def truncate(weights):
    weights.write_bytes(weights.read_bytes()[:-100])


def flip_a_bit(weights):
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def edit_index(**changes):
    def edit(weights):
        index = weights.parent / "checkpoint.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | changes))

    return edit


def change_config(weights):
    index = weights.parent / "checkpoint.json"
    config = json.loads(index.read_text())["config"]
    edit_index(config=config | {"codebook_size": 9})(weights)


def other_weights_with_their_checksum(weights):
    import hashlib

    save_file({"x": torch.zeros(2)}, weights)
    edit_index(sha256={"model.safetensors": hashlib.sha256(weights.read_bytes()).hexdigest()})(weights)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "damaged"),
        (flip_a_bit, "damaged"),
        (lambda weights: weights.unlink(), "lacks model.safetensors"),
        (lambda weights: shutil.rmtree(weights.parent), "holds no checkpoint yet"),
        (lambda weights: (weights.parent / "checkpoint.json").write_text("{"), "not readable"),
        (lambda weights: (weights.parent / "checkpoint.json").write_text("{}"), "lacks 'kind'"),
        (edit_index(kind="vqddm"), "holds the weights of a vqddm, expected a vqvae"),
        (edit_index(config={"colour": "red"}), "not the weights of its configuration"),
        (change_config, "not the weights of its configuration"),
        (other_weights_with_their_checksum, "not the weights of its configuration"),
    ],
)
def test_a_checkpoint_that_is_not_as_written_is_refused(run, weights, damage, message):
    damage(weights)
    with pytest.raises(RunError, match=message) as caught:
        load_model(run, "vqvae")
    assert str(run) in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_of_another_kind_is_refused(run):
    with pytest.raises(RunError, match="holds a vqvae run, expected a vqddm run"):
        load_model(run, "vqddm")

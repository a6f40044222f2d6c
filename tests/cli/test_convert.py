"""`vqfast convert`: released checkpoints become runs that every other command takes; nothing in a file is run."""

import os
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vqfast.cli import main
from vqfast.models.vqddm import VQDDM, VQDDMConfig
from vqfast.models.vqvae import VQVAE, VQVAEConfig
from vqfast.train import RunError, create_run, load_model
from vqfast.train.checkpoint import save_checkpoint
from vqfast.train.foreign import read_weights


def run(command):
    return main(command.split())


@pytest.fixture
def released(golden):
    def state(name):
        return {key.removeprefix("sd/"): value for key, value in golden(name).items() if key.startswith("sd/")}

    return state


@pytest.fixture
def trained_elsewhere(monkeypatch):
    """Saves as a trainer that is not installed where the file is read."""

    def save(state, path):
        module = types.ModuleType("pytorch_lightning")
        module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning"})
        module.Options = type("Options", (dict,), {"__module__": "pytorch_lightning"})
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "pytorch_lightning", module)
            checkpoint = {"epoch": 3, "callbacks": {module.ModelCheckpoint: {"best": 1.0}}, "state_dict": state}
            torch.save(checkpoint | {"hyper_parameters": module.Options(lr=1.0)}, path)

    return save


def make_autoencoder(path, codebook_size=24, grid=16):
    config = VQVAEConfig(
        image_size=grid, in_channels=3, channels=32, mults=(1,), num_res_blocks=1, codebook_size=codebook_size
    )
    create_run(path, "vqvae", {})
    model = VQVAE(config)
    save_checkpoint(path, 1, model, model.state_dict(), {}, {})


def test_a_vqgan_gives_what_it_gave_there(released, golden, tmp_path, trained_elsewhere, capsys):
    g = golden("vqgan_small")
    state = released("vqgan_small") | {"loss.perceptual_loss.lin0.model.1.weight": torch.ones(1, 64, 1, 1)}
    trained_elsewhere({f"module.{name}": value for name, value in state.items()}, tmp_path / "last.ckpt")
    assert run(f"convert taming {tmp_path}/last.ckpt --image-size 64 --out {tmp_path}/run") == 0
    assert "64 codes, 8x8 for 64 pixels" in capsys.readouterr().out
    model = load_model(tmp_path / "run", "vqgan")
    with torch.no_grad():
        assert torch.equal(model.encode(g["image"]), g["indices"])
        torch.testing.assert_close(model.reconstruct(g["image"]), g["recon"], rtol=0, atol=1e-4)
        torch.testing.assert_close(model.discriminator(g["image"]), g["disc_eval_real"], rtol=0, atol=1e-4)

    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8))
    assert run(f"reconstruct {tmp_path}/run --data {tmp_path}/images.npz --out {tmp_path}/out --device cpu") == 0
    sizes = "--denoiser transformer --dim 16 --depth 1 --heads 2 --timesteps 10 --steps 2 --batch-size 4 --device cpu"
    assert run(f"train vqddm --vqvae {tmp_path}/run --data {tmp_path}/images.npz --out {tmp_path}/ddm {sizes}") == 0
    assert run(f"sample {tmp_path}/ddm -n 2 --steps 2 --out {tmp_path}/samples --device cpu") == 0


def test_a_vqgan_without_its_discriminator_gets_a_fresh_one(released, tmp_path):
    state = {name: value for name, value in released("vqgan_small").items() if "discriminator" not in name}
    save_file(state, tmp_path / "vqgan.safetensors")
    assert run(f"convert taming {tmp_path}/vqgan.safetensors --image-size 64 --out {tmp_path}/run") == 0
    assert load_model(tmp_path / "run", "vqgan").discriminator.main[0].weight.shape[0] == 64


def test_a_denoiser_is_a_run_of_its_own(released, golden, tmp_path):
    g = golden("vqddm_unet_small")
    state = {f"_nn.{name}": value for name, value in released("vqddm_unet_small").items()}
    state |= {"_denoising.log_alpha": torch.zeros(100), "_denoising.Lt_history": torch.arange(100.0)}
    state |= {"_denoising.Lt_count": torch.full((100,), 11.0)}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    make_autoencoder(tmp_path / "codes")
    command = f"convert vqddm {tmp_path}/last.ckpt --autoencoder {tmp_path}/codes --out {tmp_path}/run"
    assert run(command) == 0
    model = load_model(tmp_path / "run", "vqddm")
    assert (model.config.T, model.config.schedule, model.config.grid) == (100, "cosine_released", (16, 16))
    assert model.diffusion.loss_history.tolist() == list(range(100)) and (model.diffusion.loss_count == 11).all()
    logits = model(g["x_t"].flatten(1), g["t"] + 1)
    torch.testing.assert_close(logits, g["logits"].flatten(2).transpose(1, 2), rtol=0, atol=1e-4)
    assert run(f"sample {tmp_path}/run -n 2 --steps 2 --out {tmp_path}/samples --device cpu") == 0
    assert run(f"{command}2 --parameterisation residual") == 0
    assert load_model(tmp_path / "run2", "vqddm").config.parameterisation == "residual"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("encoder.mid.block_1.conv1.weight"), "encoder.mid.block_1.conv1.weight is missing"),
        (lambda s: s.pop("decoder.up.3.attn.1.k.bias"), "decoder.up.3.attn.1.k.bias is missing"),
        (lambda s: s.pop("quantize.embedding.weight"), "quantize.embedding.weight is missing"),
        (
            lambda s: s.update({"post_quant_conv.weight": torch.zeros(48, 16, 1, 1)}),
            "expected post_quant_conv.weight of shape (48, 32, 1, 1), got (48, 16, 1, 1)",
        ),
        (lambda s: s.pop("loss.discriminator.main.6.running_var"), "discriminator.main.6.running_var is missing"),
    ],
)
def test_what_a_vqgan_lacks_is_named_as_it_is_called_there(released, tmp_path, capsys, change, message):
    state = released("vqgan_small")
    change(state)
    torch.save(state, tmp_path / "x.ckpt")
    assert run(f"convert taming {tmp_path}/x.ckpt --image-size 64 --out {tmp_path}/run") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"vqfast: {tmp_path}/x.ckpt: ") and message in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("mid_block1.block1.block.0.weight"), "lacks denoiser.mid_res1.block1.conv.weight"),
        (lambda s: s.update({"label_emb.weight": torch.zeros(3)}), "has no place for denoiser.label_emb.weight"),
        (lambda s: s.update({"mlp.0.bias": torch.zeros(3)}), "has another shape of denoiser.time_mlp.0.bias"),
    ],
)
def test_what_a_denoiser_lacks_is_named(released, tmp_path, capsys, change, message):
    state = released("vqddm_unet_small")
    change(state)
    torch.save(state, tmp_path / "x.ckpt")
    make_autoencoder(tmp_path / "codes")
    assert run(f"convert vqddm {tmp_path}/x.ckpt --autoencoder {tmp_path}/codes --out {tmp_path}/run") == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/x.ckpt: " in said and message in said and said.count("\n") == 1


def test_a_denoiser_of_another_codebook_is_refused(released, tmp_path, capsys):
    torch.save(released("vqddm_unet_small"), tmp_path / "x.ckpt")
    make_autoencoder(tmp_path / "codes", codebook_size=16)
    assert run(f"convert vqddm {tmp_path}/x.ckpt --autoencoder {tmp_path}/codes --out {tmp_path}/run") == 2
    assert f"x.ckpt: made for 24 codes, but {tmp_path}/codes has 16" in capsys.readouterr().err


def test_a_run_that_encodes_nothing_is_refused(tmp_path, capsys):
    create_run(tmp_path / "run", "vqddm", {})
    model = VQDDM(VQDDMConfig(4, grid=(2, 2), dim=8, mults=(1,)))
    save_checkpoint(tmp_path / "run", 1, model, model.state_dict(), {}, {})
    assert run(f"convert vqddm {tmp_path}/x.ckpt --autoencoder {tmp_path}/run --out {tmp_path}/out") == 2
    assert "holds a vqddm run, expected a vqvae or vqgan run" in capsys.readouterr().err


class Runs:
    """What unpickling without care would run."""

    def __reduce__(self):
        return os.system, ("exit 0",)


def save_cut(path):
    torch.save({"weight": torch.zeros(999)}, path)
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "no such file"),
        (lambda path: path.write_text("not a checkpoint"), "not a checkpoint that torch.save wrote"),
        (lambda path: path.write_bytes(b""), "not a checkpoint that torch.save wrote"),
        (save_cut, "not a checkpoint that torch.save wrote, or one cut short"),
        (lambda path: torch.save({"a": torch.zeros(1), "b": Runs()}, path), r"names code \(posix.system\)"),
        (lambda path: torch.save([torch.zeros(1)], path), "holds no tensors by name"),
        (lambda path: torch.save({"state_dict": {"step": 3}}, path), "holds no tensors by name"),
    ],
)
def test_a_file_that_is_not_one_is_refused(tmp_path, make, message):
    path = tmp_path / "x.ckpt"
    make(path)
    with pytest.raises(RunError, match=message) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)


def test_a_broken_safetensors_file_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"12345678")
    with pytest.raises(RunError, match="x.safetensors: not a readable safetensors file"):
        read_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize("nest", ["state_dict", "model", "model_state_dict", None])
def test_weights_are_found_where_trainers_put_them(tmp_path, nest):
    state = {"weight": torch.arange(3.0)}
    torch.save({nest: state, "step": 3} if nest else state, tmp_path / "x.pt")
    assert read_weights(tmp_path / "x.pt")["weight"].tolist() == [0, 1, 2]


def test_another_network_is_not_taken_for_one(tmp_path, capsys):
    torch.save({"backbone.conv.weight": torch.zeros(1)}, tmp_path / "x.ckpt")
    make_autoencoder(tmp_path / "codes")
    for kind in ("taming", f"vqddm --autoencoder {tmp_path}/codes"):
        name, _, rest = kind.partition(" ")
        assert run(f"convert {name} {tmp_path}/x.ckpt --out {tmp_path}/run {rest}") == 2
        said = capsys.readouterr().err
        assert "x.ckpt: original: expected" in said and "got keys backbone.conv.weight" in said

"""What the options of the trainer promise: compiled, recomputed, accumulated or averaged, it is the same training."""

import json
import math
import runpy
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch import nn

from vqfast.models.unet import UNet
from vqfast.train import TrainConfig, create_run, train
from vqfast.train.blocks import blocks, recompute_blocks

QUICK = dict(
    steps=4, batch_size=4, lr=1e-2, warmup=2, log_every=1, save_every=4, eval_every=0, tensorboard=False, device="cpu"
)

tiny = runpy.run_path(str(Path(__file__).with_name("tiny_training.py")))


def trained(fresh_model, images, out, **changes):
    run = create_run(out, "vqvae", {}).path
    model = train(fresh_model(), images, TrainConfig(**QUICK | changes), run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return model, [line["loss"] for line in lines]


def test_recomputed_blocks_give_the_same_bits(tmp_path, fresh_model, tiny_images):
    plain, losses = trained(fresh_model, tiny_images, tmp_path / "a")
    less_memory, same = trained(fresh_model, tiny_images, tmp_path / "b", gradient_checkpointing=True)
    assert same == losses
    for name, value in plain.state_dict().items():
        assert torch.equal(less_memory.state_dict()[name], value), name


def saved_bytes(model, *inputs):
    """What a forward pass keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)
    assert output.requires_grad
    return sum(kept.values())


def test_recomputing_saves_memory():
    torch.manual_seed(0)
    model = UNet(8, grid=(8, 8), T=10, dim=16, mults=(1, 2), groups=8)
    inputs = torch.randint(8, (2, 64)), torch.tensor([1, 5])
    before = saved_bytes(model, *inputs)
    assert blocks(model)
    recompute_blocks(model)
    assert saved_bytes(model, *inputs) < 0.5 * before


def test_blocks_with_buffers_run_once():
    block = lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    plain = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())
    model = nn.ModuleDict({"a": nn.ModuleList([block(), plain]), "b": nn.Linear(1, 1)})
    found = blocks(model)
    assert plain in found and not any(isinstance(m, nn.BatchNorm2d) for b in found for m in b.modules())


def test_accumulated_batches_make_one_step(tmp_path, fresh_model, tiny_images):
    whole, _ = trained(fresh_model, tiny_images, tmp_path / "a", batch_size=4, steps=1, accumulation=2)
    assert whole.quantizer.idle.max() <= 1, "the codebook took one step for both batches"
    _, losses = trained(fresh_model, tiny_images, tmp_path / "b", accumulation=2)
    assert len(losses) == 4


def test_sequences_of_different_lengths_count_alike_in_whatever_batches(tmp_path, monkeypatch):
    """A step of two batches, which have different numbers of codes, is that of one batch of all their sequences."""
    dq_transformer = tiny["TINY"]["dq_transformer"]
    monkeypatch.setitem(
        tiny["TINY"], "dq_transformer", (lambda: tiny["dq_transformer"](dropout=0.0), dq_transformer[1])
    )
    logged = []
    for sizes in (dict(batch_size=4), dict(batch_size=2, accumulation=2)):
        run = tiny["new_run"]("dq_transformer", tmp_path / str(len(logged)))
        tiny["train_tiny"]("dq_transformer", run, **sizes)
        logged.append([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
    assert len(logged[0]) == 20
    for large, small in zip(*logged, strict=True):
        for name in ("loss", "content", "position", "grad_norm"):
            assert small[name] == pytest.approx(large[name], rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_a_compiled_model_trains_alike(tmp_path, fresh_model, tiny_images):
    _, losses = trained(fresh_model, tiny_images, tmp_path / "a")
    with torch._inductor.config.patch(fallback_random=True):  # or compiled code has another dropout
        _, compiled = trained(fresh_model, tiny_images, tmp_path / "b", compile=True)
    assert compiled == pytest.approx(losses, rel=1e-3)


def test_compile_is_asked_for_the_step(tmp_path, fresh_model, tiny_images, monkeypatch):
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: asked.append(type(module).__name__))
    trained(fresh_model, tiny_images, tmp_path / "a", compile=True)
    assert asked == ["PartStep"]


def test_fp16_scales_its_loss_and_learns(tmp_path, fresh_model, tiny_images):
    model, losses = trained(fresh_model, tiny_images, tmp_path / "a", precision="fp16", steps=30, save_every=30)
    assert losses[-1] < 0.9 * losses[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    index = json.loads((tmp_path / "a" / "checkpoints" / "step-00000030" / "checkpoint.json").read_text())
    assert index["extra"]["scaler"]["model"]["scale"] > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "tolerance"),
    [
        (dict(gradient_checkpointing=True), 0.0),
        (dict(compile=True), 1e-4),
        (dict(precision="bf16"), 0.05),
        (dict(precision="fp16"), 0.01),
        (dict(accumulation=3, ema_decay=0.9), math.inf),
    ],
    ids=["checkpointing", "compile", "bf16", "fp16", "accumulation"],
)
@pytest.mark.parametrize("name", tiny["TINY"])
def test_every_option_trains_every_model(tmp_path, name, option, tolerance, monkeypatch):
    """The first loss is that without the option, up to the arithmetic; the step taken on it leaves one that is fine."""
    # All of compiling that depends on the model; the code that it ends in takes minutes to make, and is torch's affair.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch.compiler.reset()
    losses = []
    for folder, settings in (("plain", {}), ("with", option)):
        run = tiny["new_run"](name, tmp_path / folder)
        tiny["train_tiny"](name, run, steps=2, **settings)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines])
        assert all(math.isfinite(value) for line in lines for value in line.values())
    assert losses[1][0] == pytest.approx(losses[0][0], rel=tolerance, abs=tolerance)
    assert len(losses[1]) == 2

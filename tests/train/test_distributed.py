"""What several processes promise: the losses, codebooks and histories of one process that takes the same batches."""

import json
import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from vqfast.nn.routers import code_lengths
from vqfast.train import load_model
from vqfast.train.processes import replicate

SCRIPT = Path(__file__).with_name("tiny_training.py")
tiny = runpy.run_path(str(SCRIPT))
QUICK = ("vqvae", "vqgan", "dqvae")


@pytest.fixture(autouse=True)
def _one_thread():
    """As the processes: sums of several threads have another rounding, which training amplifies."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(folder, name, count, **settings):
    """Processes of one training."""
    tiny["new_run"](name, folder / "run")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | dict(
        WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1"
    )
    arguments = [f"{setting}={value}" for setting, value in settings.items()]
    return [
        subprocess.Popen(
            [sys.executable, SCRIPT, folder, name, *arguments],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def finish(processes, timeout=180):
    said = [process.communicate(timeout=timeout)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


# Of the clock; of the codebook, which moves behind the last of several batches in turn, not behind each; and norms of
# gradients, which magnify rounding: the promise is of losses and codebooks.
NOT_COMPARED = {"images_per_s", "usage", "perplexity", "grad_norm", "discriminator/grad_norm"}


def scalars(run):
    """What was logged of each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in NOT_COMPARED} for line in lines]


def same_training(folder, name, count, sharding="none", **settings):
    """`count` processes against one that takes their batches in turn."""
    alone = tiny["new_run"](name, folder / "alone")
    (folder / "together").mkdir()
    processes = start(folder / "together", name, count, sharding=sharding, **settings)
    expected = tiny["train_tiny"](name, alone, accumulation=count, **settings)
    finish(processes)
    close = dict(rtol=1e-5, atol=1e-5)
    assert sum("loss" in line for line in scalars(alone)) == 20
    for found, wanted in zip(scalars(folder / "together" / "run"), scalars(alone), strict=True):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            np.testing.assert_allclose(found[key], value, **close, err_msg=f"{key} of step {wanted['step']}")
    states = [dict(np.load(folder / "together" / f"{rank}.npz")) for rank in range(count)]
    kept = dict(expected.named_buffers()) | {"quantizer.codebook": expected.state_dict().get("quantizer.codebook")}
    for key in kept.keys() & expected.state_dict().keys():
        np.testing.assert_allclose(states[0][key], kept[key].detach(), **close, err_msg=key)
    for key, value in load_model(folder / "together" / "run").state_dict().items():
        for state in states:
            np.testing.assert_array_equal(state[key], value, err_msg=key)
    return expected


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in tiny["TINY"]]
)
def test_two_processes_train_as_one(tmp_path, name):
    expected = same_training(tmp_path, name, 2)
    if name == "vqvae":
        assert expected.config.threshold_ema_dead_code > 0, "revival is part of the comparison"
    if "dqvae" in name:
        images = tiny["patches"]()[np.arange(30)]["image"]
        grains = expected.train().router(expected.features(images), images).grains
        assert len(code_lengths(grains).unique()) > 1, "different numbers of codes are part of the comparison"
    if name == "vqddm":
        assert (expected.diffusion.loss_count > 10).all(), "importance sampling is part of the comparison"


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny["TINY"])
def test_four_processes_train_as_one(tmp_path, name):
    same_training(tmp_path, name, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny["TINY"])
def test_sharded_parameters_train_as_whole_ones(tmp_path, name):
    """Looks at held-out data on the way, by averaged weights: what is gathered for that must not stay."""
    same_training(tmp_path, name, 2, sharding="full", ema_decay=0.9, held_out=True, eval_every=5, save_every=10)


def test_a_process_that_dies_ends_the_others_with_its_error_shown(tmp_path):
    started = time.monotonic()
    processes = start(tmp_path, "vqvae", 2, dies=1)
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert time.monotonic() - started < 60
    assert all(process.returncode not in (0, None) for process in processes)
    assert "this process breaks on purpose" in said[1]
    assert "another process of this training ended" in said[0]


def test_buffers_are_not_sent_around_and_other_parts_are_left_alone(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
        wrapped = replicate(model, list(model["a"].parameters()), torch.device("cpu"))
        assert not wrapped.will_sync_module_buffers()
        assert wrapped.parameters_to_ignore == {"b.weight", "b.bias"}
    finally:
        dist.destroy_process_group()

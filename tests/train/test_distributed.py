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

from vqfast.train import create_run, load_model
from vqfast.train.processes import replicate

SCRIPT = Path(__file__).with_name("tiny_training.py")
tiny = runpy.run_path(str(SCRIPT))


def start(folder, kind, count, **settings):
    """Processes of one training."""
    create_run(folder / "run", kind, {})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | dict(
        WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1"
    )
    arguments = [f"{name}={value}" for name, value in settings.items()]
    return [
        subprocess.Popen(
            [sys.executable, SCRIPT, folder, kind, *arguments],
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


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def same_training(folder, kind, count, **settings):
    """`count` processes against one that takes their batches in turn."""
    alone = create_run(folder / "alone", kind, {}).path
    (folder / "together").mkdir()
    processes = start(folder / "together", kind, count, **settings)
    expected = tiny["train_tiny"](kind, alone, accumulation=count)
    finish(processes)
    np.testing.assert_allclose(losses(folder / "together" / "run"), losses(alone), rtol=1e-5, atol=1e-5)
    assert len(losses(alone)) == 20
    states = [dict(np.load(folder / "together" / f"{rank}.npz")) for rank in range(count)]
    for name, value in expected.named_buffers():
        if name in expected.state_dict():
            np.testing.assert_allclose(states[0][name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    for name, value in load_model(folder / "together" / "run", kind).state_dict().items():
        for state in states:
            np.testing.assert_array_equal(state[name], value, err_msg=name)
    return expected


@pytest.mark.parametrize(
    "kind", [kind if kind == "vqvae" else pytest.param(kind, marks=pytest.mark.slow) for kind in tiny["TINY"]]
)
def test_two_processes_train_as_one(tmp_path, kind):
    expected = same_training(tmp_path, kind, 2)
    if kind == "vqvae":
        assert expected.config.threshold_ema_dead_code > 0, "revival is part of the comparison"
    if kind == "vqddm":
        assert (expected.diffusion.loss_count > 10).all(), "importance sampling is part of the comparison"


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny["TINY"])
def test_four_processes_train_as_one(tmp_path, kind):
    same_training(tmp_path, kind, 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny["TINY"])
def test_sharded_parameters_train_as_whole_ones(tmp_path, kind):
    same_training(tmp_path, kind, 2, sharding="full", ema_decay=0.0)


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

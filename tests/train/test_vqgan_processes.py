"""A VQGAN in several processes and mixed precision: its adaptive weight needs a gradient inside the forward pass."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vqfast.train import create_run


@pytest.mark.slow
def test_processes_train_one_vqgan(tmp_path):
    create_run(tmp_path / "run", "vqgan", {})
    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="1")
    script = Path(__file__).with_name("vqgan_process.py")
    processes = [
        subprocess.Popen([sys.executable, script, tmp_path], env=shared | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in range(2))
    for name in first.files:
        assert np.array_equal(first[name], second[name]), name
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    heard = [line["disc_weight"] > 0 for line in lines if "loss" in line]
    assert heard == [False, True, True, True]

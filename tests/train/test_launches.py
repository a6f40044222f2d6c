"""The command as its users start it in several processes: by torchrun and by accelerate launch."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from vqfast.train import load_model
from vqfast.train.checkpoint import newest_checkpoint
from vqfast.train.progress import read_progress

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_and_one_goes_on(tmp_path, launcher):
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    run = tmp_path / "run"
    command = (
        f"-m vqfast.cli train vqvae --data {tmp_path}/images.npz --out {run} --channels 32 --mults 1 "
        "--num-res-blocks 1 --codebook-size 8 --code-dim 4 --save-every 4 --batch-size 4 --log-every 1 --device cpu"
    ).split()

    def finish(*arguments):
        result = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, timeout=300, env=ENVIRONMENT
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    said = finish("-m", *LAUNCHERS[launcher], *command, "--steps", "8")
    assert said.count("trained a VQ-VAE for 8 steps") == 1, "one process speaks for all"
    assert newest_checkpoint(run).extra["processes"] == 2
    said = finish(*command, "--steps", "12", "--resume")
    assert "trained by 2 processes so far, now by 1: 4 images a step instead of 8" in said
    checkpoint = newest_checkpoint(run)
    assert (checkpoint.step, checkpoint.extra["processes"], checkpoint.extra["batches"]) == (12, 1, 8 * 2 + 4)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, 13))
    assert read_progress(run).state == "finished" and load_model(run, "vqvae") is not None

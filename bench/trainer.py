"""What the trainer adds to a bare loop of the same model: `python -m bench.trainer`.

Both take the same batches through the same VQ-VAE with the same optimiser, in turns. A step lasts from one call of
`training_step` to the next. Processor time is what the host spends, whatever else the machine does; wall time includes
that. The target is at most 3 % with steps of 100 ms or more.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vqfast.data import ImageBatches, ShuffledSteps
from vqfast.data.images import ImageData
from vqfast.models.vqvae import VQVAE, VQVAEConfig
from vqfast.train import TrainConfig, create_run, train

TARGET = 0.03
QUANTILE = 0.1  # of the steps: what one takes while others leave the processor and its memory alone


class Watched(VQVAE):
    """Notes when each step begins."""

    def __init__(self, config: VQVAEConfig):
        super().__init__(config)
        self.begun: list[tuple[float, float]] = []

    def training_step(self, batch, step):
        self.begun.append((time.process_time(), time.perf_counter()))
        return super().training_step(batch, step)

    def durations(self) -> np.ndarray:
        """(steps - 1, 2) seconds: processor and wall; the first steps warm up."""
        return np.diff(np.array(self.begun), axis=0)[2:]


def bare_loop(model: nn.Module, data: ImageBatches, config: TrainConfig) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    model.train()
    places = ShuffledSteps(len(data), config.batch_size, range(config.steps), config.seed)
    for step, positions in enumerate(places):
        loss = model.training_step(data[positions], step)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=15, help="steps a round")
    options = parser.parse_args()
    shape = VQVAEConfig(image_size=32, in_channels=3, channels=32, mults=(1, 1, 2), num_res_blocks=1, codebook_size=256)
    config = TrainConfig(steps=options.steps, batch_size=16, log_every=5, eval_every=0, device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (512, 32, 32, 3), dtype=np.uint8)
    data = ImageBatches(ImageData("noise", pixels, np.arange(512, dtype=np.uint32)), "all")
    found: dict[str, list[np.ndarray]] = {"bare": [], "trainer": []}
    for number in range(options.rounds):
        for name in found if number % 2 else reversed(found):
            torch.manual_seed(0)
            model = Watched(shape)
            if name == "bare":
                bare_loop(model, data, config)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    train(model, data, config, create_run(Path(folder) / "run", "vqvae", {}).path)
            found[name].append(model.durations())
    bare, trainer = (np.concatenate(found[name]) for name in ("bare", "trainer"))
    for column, clock in enumerate(("processor", "wall")):
        b, t = (np.quantile(part[:, column], QUANTILE) for part in (bare, trainer))
        print(f"{clock:<10} bare {b * 1e3:.1f} ms, trainer {t * 1e3:.1f} ms a step: {t / b - 1:+.2%}")
    added = np.quantile(trainer[:, 0], QUANTILE) / np.quantile(bare[:, 0], QUANTILE) - 1
    print(f"{'met' if added <= TARGET else 'MISSED'}: at most {TARGET:.0%} of processor time")


if __name__ == "__main__":
    main()

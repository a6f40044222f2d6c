"""Whether JPEG images arrive in time: `python -m bench.loading`.

A folder of JPEG images that the script draws, read as a training reads them: `vqfast.data`, decoded when asked for, by
two worker processes. First as fast as they come, against the same decoding in bare loops of as many processes side by
side; then before steps of 50 ms that leave the processor alone, as steps on a GPU do, with as many images a batch as
the workers decode in nine tenths of that time. A step stalls when its batch is not there: what it waits for is lost.

The batches go to torch's "meta" device, which has no memory: what a GPU would do itself, copy and scale, is left out.
"""

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vqfast.data import ImageBatches, ShuffledSteps, open_dataset, read_ahead, sources
from vqfast.data.decode import read_image

_FIRST = 10  # steps in which the workers start


def draw(folder: Path, count: int, side: int) -> None:
    """Coloured JPEG images with large shapes and fine grain, about as heavy to decode as photos."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
        pixels = np.asarray(coarse, np.int16) + rng.integers(-12, 13, (side, side, 3), dtype=np.int16)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:04}.jpg", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--side", type=int, default=512, help="pixels a side of the files")
    parser.add_argument("--image-size", type=int, default=256, help="pixels a side that a model would ask for")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--step", type=float, default=0.05, help="seconds")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    sources.MOST_IN_MEMORY = 0  # decode when asked for, as a large folder is
    with tempfile.TemporaryDirectory() as name:
        draw(Path(name), options.images, options.side)
        bare = _bare_rate(sorted(Path(name).iterdir()), options)
        print(f"{f'{options.workers} bare loops, side by side':<30} {bare:7.1f} images/s")

        images = ImageBatches(open_dataset(name, image_size=options.image_size), "all")
        found = _rate(images, 16, options)
        share = found / bare
        print(f"{f'{options.workers} workers, nothing else':<30} {found:7.1f} images/s, {share:.0%} of the bare loops")

        batch = max(1, int(0.9 * options.step * found))
        waits = _waits(images, batch, options)
        lost = sum(waits) / len(waits) / options.step
        print(
            f"steps of {1e3 * options.step:.0f} ms with batches of {batch}: {batch / options.step:.1f} images/s, "
            f"waits of {1e3 * statistics.median(waits):.1f} ms (median), {1e3 * max(waits):.1f} ms (longest); "
            f"{lost:.1%} of the time lost"
        )


def _decode_all(files: list[Path], side: int) -> float:
    """Images a second of one process that does nothing else."""
    start = time.perf_counter()
    for file in files:
        with file.open("rb") as opened:
            read_image(opened, side)
    return len(files) / (time.perf_counter() - start)


def _bare_rate(files: list[Path], options: argparse.Namespace) -> float:
    with ProcessPoolExecutor(options.workers) as pool:
        return sum(pool.map(_decode_all, [files] * options.workers, [options.image_size] * options.workers))


def _batches(images: ImageBatches, batch: int, steps: int, workers: int):
    return read_ahead(images, ShuffledSteps(len(images), batch, range(steps), 0), workers, torch.device("meta"))


def _rate(images: ImageBatches, batch: int, options: argparse.Namespace) -> float:
    """Images a second, once the workers run."""
    steps = max(10, 2 * options.images // batch)
    batches = _batches(images, batch, steps + 4, options.workers)
    for _ in range(4):
        next(batches)
    start = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return steps * batch / (time.perf_counter() - start)


def _waits(images: ImageBatches, batch: int, options: argparse.Namespace) -> list[float]:
    """Seconds that each step waits for its batch, once the workers are ahead."""
    batches = _batches(images, batch, options.steps + _FIRST, options.workers)
    for _ in range(_FIRST):
        next(batches)
        time.sleep(2 * options.step)
    waits = []
    for _ in range(options.steps):
        time.sleep(options.step)
        start = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - start)
    return waits


if __name__ == "__main__":
    main()

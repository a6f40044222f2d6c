"""The documents' commands do what they say: run one after the other in an empty folder with photos, at tiny sizes."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqfast.cli import main

ROOT = Path(__file__).resolve().parents[2]
STEPS = "--steps 2 --batch-size 4 --eval-every 2 --device cpu --no-tensorboard"
NETWORK = f"--image-size 16 --channels 32 --num-res-blocks 1 --codebook-size 32 --code-dim 8 {STEPS}"
SMALL = "--seeds 1 --n 4 --held-out 4 --batch-size 4"
JUDGED = f"{SMALL} --minutes 0.001 --classifier-steps 2 --resamples 9 --device cpu"
# What is added to a command: a later argument overrides an earlier one.
TINY = {
    "train vqvae": NETWORK,
    "train vqgan": f"{NETWORK} --z-channels 32 --disc-channels 8",
    "train dqvae": f"{NETWORK} --z-channels 32 --disc-channels 8 --mults 1 1 1",
    "train vqddm": f"--dim 32 --timesteps 10 {STEPS}",
    "train raster_gpt": f"--dim 32 --depth 1 {STEPS}",
    "train dq_transformer": f"--dim 32 --position-depth 1 --content-depth 1 {STEPS}",
    "refit": f"--codebook-size 16 --vectors 300 --iters 2 {STEPS}",
    "prune": "--device cpu",
    "reconstruct": "--device cpu",
    "sample": "-n 4 --device cpu",
    "inpaint": "-n 2 --device cpu",
    "interpolate": "-n 2 --device cpu",
    "evaluate": "-n 12 --device cpu",
    "report": "",
    "compare vqddm": f"{JUDGED} --image-size 16 --dim 48 --depth 1 --timesteps 10 --steps 2 --vqvae-steps 2",
    "compare dqvae": "--image-size 32 --crop 16 --cell 4 --side 7 --steps 2 --batch-size 2 --held-out 4",
    "compare generation": f"{JUDGED} --dim 64 --position-depth 1 --content-depth 1",
}
# Numbers that fit photos of another size, and weights that nobody has here.
FITTED = {
    r"--random-crop-from \d+": "--random-crop-from 18",
    r"--target-codes \d+": "--target-codes 34",
    r"--grid \d+ \d+": "--grid 8 12",
    r"--top-k \d+": "--top-k 20",
    r"--(inception|lpips)( weights/\S+)+": "",
}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Sixty photos of many sizes, of two classes."""
    rng = np.random.default_rng(0)
    for i in range(60):
        folder = tmp_path / "photos" / ("cats", "dogs")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30 + i, 50 - i // 2, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("document", ["README.md", "docs/tutorial-vqddm.md", "docs/tutorial-dq.md"])
def test_the_commands_of_a_document_run_in_their_order(document, photos, capsys):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("vqfast ")]
    assert lines
    for line in lines:
        fitted = line
        for pattern, value in FITTED.items():
            fitted = re.sub(pattern, value, fitted)
        words = shlex.split(fitted)[1:]
        name = next(name for name in (" ".join(words[:2]), words[0]) if name in TINY)
        assert main([*words, *TINY[name].split()]) == 0, (line, capsys.readouterr().err)
        out = re.search(r"--out (\S+)", line)
        assert out is None or (Path(out[1]) / "run.json").is_file(), line

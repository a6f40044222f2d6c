"""Small runs of every kind, the images that they were trained on, and what it takes to refuse a command."""

import functools

import numpy as np
import pytest

from vqfast.cli import main

TINY = (
    "--channels 32 --mults 1 1 --num-res-blocks 1 --codebook-size 16 --code-dim 4 --steps 4 --batch-size 8 "
    "--save-every 2 --eval-every 2 --log-every 1 --device cpu --no-tensorboard"
)

TWO_STEPS = "--steps 2 --batch-size 8 --warmup 1 --log-every 1 --eval-every 2 --device cpu --no-tensorboard"
NETWORK = "--channels 32 --mults 1 1 --num-res-blocks 1 --codebook-size 16 --code-dim 4"
SHARP = "--z-channels 32 --disc-channels 8 --disc-layers 1 --attention-resolutions 64"
# The options of each training command, beside --out, with which it takes a moment: {runs} holds those before it.
TRAININGS = {
    "train vqvae": f"--data {{images}} {NETWORK} {TWO_STEPS}",
    "train vqgan": f"--data {{images}} {NETWORK} {SHARP} --disc-start 1 {TWO_STEPS}",
    "train dqvae": f"--data {{images}} {NETWORK} {SHARP} --flip {TWO_STEPS}",
    "train vqddm": "--vqvae {runs}/vqvae --data {images} --denoiser transformer --dim 16 --depth 1 --heads 2 "
    f"--timesteps 10 --transition absorbing --schedule reciprocal {TWO_STEPS}",
    "train raster_gpt": f"--vqvae {{runs}}/vqgan --data {{images}} --dim 16 --depth 1 --heads 2 {TWO_STEPS}",
    "train dq_transformer": "--dqvae {runs}/dqvae --data {images} --dim 16 --position-depth 1 --content-depth 1 "
    f"--heads 2 {TWO_STEPS}",
    "refit": f"{{runs}}/vqgan --data {{images}} --codebook-size 8 --vectors 64 --iters 3 {TWO_STEPS}",
}


def folder_of(command):
    """Where the run of a training command is in `runs`."""
    return command.split()[-1]


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Forty grey images of 8 pixels a side, cats and dogs."""
    path = tmp_path_factory.mktemp("images") / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.array(["cat", "dog"])[np.arange(40) % 2])
    return path


@pytest.fixture(scope="session")
def runs(images, tmp_path_factory):
    """Folder with a run of every training command; not to be changed."""
    runs = tmp_path_factory.mktemp("runs")
    for command, options in TRAININGS.items():
        words = f"{command} {options.format(runs=runs, images=images)} --out {runs}/{folder_of(command)}"
        assert main(words.split()) == 0, command
    return runs


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Folder with images.npz and the run vqvae; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", images=rng.integers(0, 256, (40, 8, 8), dtype=np.uint8))
    assert main(f"train vqvae --data {folder}/images.npz --out {folder}/vqvae {TINY}".split()) == 0
    return folder


@pytest.fixture
def refused(capsys):
    """Runs a command that must be refused: exit code 2, one line, nothing changed in these folders."""

    def tree(folder):
        return {str(path): path.is_file() and path.read_bytes() for path in folder.rglob("*")}

    @functools.cache  # of a folder that no command may change: it is looked at once, and after every command
    def first_stamps(folder):
        return stamps(folder)

    def stamps(folder):
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}

    def run(command, *folders, quickly=None):
        """quickly: a folder whose files are compared by time and size alone."""
        before, earlier = [tree(folder) for folder in folders], quickly and first_stamps(quickly)
        capsys.readouterr()
        assert main(command.split()) == 2, command
        said = capsys.readouterr()
        lines = said.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("vqfast: "), said.err
        assert said.out == "" and [tree(folder) for folder in folders] == before, command
        assert not quickly or stamps(quickly) == earlier, command
        return lines[0]

    return run

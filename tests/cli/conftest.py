"""A small run of a VQ-VAE, and the images that it was trained on."""

import numpy as np
import pytest

from vqfast.cli import main

TINY = (
    "--channels 32 --mults 1 1 --num-res-blocks 1 --codebook-size 16 --code-dim 4 --steps 4 --batch-size 8 "
    "--save-every 2 --eval-every 2 --log-every 1 --device cpu --no-tensorboard"
)


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

    def run(command, *folders):
        before = [tree(folder) for folder in folders]
        capsys.readouterr()
        assert main(command.split()) == 2, command
        said = capsys.readouterr()
        lines = said.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("vqfast: "), said.err
        assert said.out == "" and [tree(folder) for folder in folders] == before, command
        return lines[0]

    return run

"""Fixtures that several folders of tests share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

# The same examples every time; `make test-all` draws new ones.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture
def golden() -> Callable[[str], dict[str, Tensor]]:
    """Arrays of a golden fixture by name, as tensors; skips where the folder is absent."""

    def load(name: str) -> dict[str, Tensor]:
        path = GOLDEN / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"golden fixture {name}.npz is not beside the repository (../shared/golden)")
        with np.load(path) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    return load

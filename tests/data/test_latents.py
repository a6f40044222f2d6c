"""What the cache of latents promises: encoded once, and again when anything it depends on has changed."""

import numpy as np
import pytest
import torch

from vqfast.data import CodeBatches
from vqfast.data.latents import cached_latents, fingerprint

CODES = torch.randint(1 << 18, (10, 3, 4), generator=torch.Generator().manual_seed(0))


def encoder(calls):
    def encode():
        calls.append(1)
        for part in CODES.split(4):
            yield {"codes": part, "sums": part.sum((1, 2))}

    return encode


def test_latents_are_made_once_and_mapped(tmp_path):
    calls = []
    key = fingerprint("weights", 1)
    for _ in range(2):
        arrays = cached_latents(tmp_path / "cache", "train", key, 10, encoder(calls))
    assert len(calls) == 1
    assert np.array_equal(arrays["codes"], CODES) and np.array_equal(arrays["sums"], CODES.sum((1, 2)))
    assert isinstance(arrays["codes"], np.memmap) and not arrays["codes"].flags.writeable
    batch = CodeBatches(arrays["codes"])[np.array([3, 13])]
    assert torch.equal(batch["codes"], CODES[[3, 3]])


def test_another_checkpoint_makes_them_anew_and_removes_the_old(tmp_path):
    calls = []
    for weights in ("a", "b"):
        cached_latents(tmp_path, "train", fingerprint(weights), 10, encoder(calls))
        cached_latents(tmp_path, "held-out", fingerprint(weights), 10, encoder(calls))
    assert len(calls) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"{name}-{fingerprint('b')}" for name in ("train", "held-out")
    )


def test_a_cache_cut_short_is_not_used(tmp_path):
    def dies():
        yield {"codes": CODES[:4]}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_latents(tmp_path, "train", "key", 10, dies)
    arrays = cached_latents(tmp_path, "train", "key", 10, encoder([]))
    assert np.array_equal(arrays["codes"], CODES)


@pytest.mark.parametrize("count", [9, 11])
def test_a_wrong_count_is_refused(tmp_path, count):
    with pytest.raises(ValueError, match=f"expected {count} examples, got"):
        cached_latents(tmp_path, "train", "key", count, encoder([]))

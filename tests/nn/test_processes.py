"""Two real processes (gloo) against one on the joined batch: the same codebooks, by one all-reduce a step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.nn import quantize_process
from tests.nn.quantize_process import CASES, MOVED, REVIVED, STARTED
from vqfast.ops import nearest_code

SYNCED = [name for name in CASES if name != "alone"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saved, by case."""
    folder = tmp_path_factory.mktemp("processes")
    script = Path(quantize_process.__file__)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, script, folder, str(rank), "2"], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", SYNCED)
def test_both_ranks_end_with_the_same_bits(ranks, name):
    first, second = (rank[name].copy() for rank in ranks)
    assert first.pop("all-reduces") == second.pop("all-reduces")
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("name", [name for name in MOVED if name != "alone"])
def test_moving_averages_are_those_of_the_joined_batch(ranks, name):
    joined = quantize_process.moved(name, 0, 1)
    for key, value in joined.items():
        torch.testing.assert_close(ranks[0][name][key], value)


@pytest.mark.parametrize("name", [name for name in MOVED if name != "alone"])
def test_a_step_is_one_all_reduce_of_counts_and_sums(ranks, name):
    rows, width = (32, 4) if "heads" in quantize_process.MOVED[name] else (16, 8)
    assert ranks[0][name]["all-reduces"] == [(rows, 1 + width)] * 3


def test_codebooks_that_are_not_synced_differ(ranks):
    first, second = (rank["alone"] for rank in ranks)
    assert not torch.equal(first["codebook"], second["codebook"]) and len(first["all-reduces"]) == 0


@pytest.mark.parametrize("name", REVIVED)
def test_the_codes_dead_in_the_joined_batch_become_its_vectors(ranks, name):
    together, joined = ranks[0][name], quantize_process.revived(name, 0, 1)
    assert len(together["all-reduces"]) == 1
    size = 0.6
    dead = joined["cluster_size"] == torch.tensor(size)
    assert 3 <= dead.sum() < dead.numel()
    assert torch.equal(together["cluster_size"] == torch.tensor(size), dead)
    for key in ("codebook", "embed_avg", "cluster_size"):
        torch.testing.assert_close(together[key][~dead], joined[key][~dead])
    torch.testing.assert_close(together["embed_avg"][dead], size * together["codebook"][dead])

    x = together["x"]
    if name == "revival of cosine heads":
        x = torch.nn.functional.normalize(x.view(50, 2, 4), dim=-1)
        codes = [(together["codebook"][head, dead[head]], x[:, head]) for head in range(2)]
    else:
        codes = [(together["codebook"][dead], x)]
    sources = []
    for revived, vectors in codes:
        found = torch.isclose(revived[:, None], vectors).all(-1)
        source = found.int().argmax(1)
        assert found.any(1).all() and len(source.unique()) == len(source), "different vectors of the batch"
        sources.append(source)
    of_the_first = torch.cat(sources) < quantize_process.SIZES[0]
    assert of_the_first.any() and not of_the_first.all(), "of either rank"


@pytest.mark.parametrize("name", STARTED)
def test_kmeans_sees_the_vectors_of_both_ranks(ranks, name):
    together, x = ranks[0][name], quantize_process.clusters()
    joined = quantize_process.started(name, 0, 1)
    torch.testing.assert_close(together["fixed"], joined["fixed"])
    assert torch.equal(together["fixed counts"], joined["fixed counts"]) and together["fixed counts"].sum() == 50
    assert together["cluster_size"].sum() >= 50
    # Every seed is a vector of one rank or the other, and no cluster is without one.
    assert (together["seeds"][:, None] == x).all(-1).any(1).all()
    assert len((nearest_code(together["seeds"], x) % 8).unique()) == 8

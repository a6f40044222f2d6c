"""The fuzz run of the search: counts what it compared, and fails where an index is wrong."""

import torch

from bench import fuzz


def test_search_is_exact_on_every_distribution(capsys):
    assert fuzz.main(["--rows", "2000", "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(fuzz.METRICS) * len(fuzz.DISTRIBUTIONS) + 1
    assert all(line.endswith(", 0 wrong") for line in lines)


def test_a_wrong_index_is_counted_and_fails_the_run(monkeypatch, capsys):
    def off_by_one(x, codebook, *, metric, return_certificate):
        found = fuzz.exact_nearest(x, codebook, metric)
        found[0] = (found[0] + 1) % max(codebook.shape[0], 2)
        return found, torch.tensor(0)

    monkeypatch.setattr(fuzz, "nearest_code", off_by_one)
    monkeypatch.setattr(fuzz, "DISTRIBUTIONS", {"Gaussian": fuzz.DISTRIBUTIONS["Gaussian"]})
    assert fuzz.main(["--rows", "100"]) == 1
    assert all(" 0 wrong" not in line for line in capsys.readouterr().out.splitlines())

"""Benchmarks judge before they time, take turns, and say who was wrong."""

import time
from dataclasses import replace

import pytest
import torch

from bench import measure as measuring
from bench.case import PEER, VQFAST, YARDSTICK, Case, Contender, Run, judge_indices
from bench.diffusion import judge_draws
from bench.exact import exact_nearest
from bench.measure import Effort, interleaved, measure
from bench.peers import CASES, CPU_SHAPES, CUDA_SHAPES, TINY_SHAPES, cases
from bench.rows import OK, WRONG
from vqfast.kernels.nearest.reference import nearest

BRIEF = Effort(seconds=0.005, least=2, most=3, memory=False, compiled=False)


def by_name(case: Case) -> dict:
    return {entry.contender.name: entry for entry in measure(case, BRIEF)}


def contest(**results) -> Case:
    """A search of 2000 vectors; each contender is named after its role and answers with what `results` says."""

    def contender(name: str, answer) -> Contender:
        return Contender(name, name.split("_")[0], lambda problem: Run(lambda: answer(problem.exact.clone())))

    case = CASES["nearest"](dict(N=2000, K=8, D=4), torch.float32, "cpu")
    return replace(case, contenders=tuple(contender(name, answer) for name, answer in results.items()))


def first_wrong(count: int):
    def answer(exact: torch.Tensor) -> torch.Tensor:
        exact[:count] = (exact[:count] + 1) % 8
        return exact

    return answer


@pytest.mark.parametrize("case", cases("cpu", tiny=True), ids=str)
def test_every_contender_that_runs_here_is_right_and_timed(case):
    measured = by_name(case)
    for name, entry in measured.items():
        assert entry.reason or entry.row.status == OK, f"{name}: {entry.row.status}, {entry.row.note}"
    ours = measured["vqfast cpu"].row
    assert ours.median_s > 0 and ours.rounds >= 2 and ours.ratio_to_best_peer > 0 and ours.kernel_hash


@pytest.mark.parametrize(("role", "wrong"), [(VQFAST, 1), (PEER, 3), (PEER, 2000)])
def test_a_wrong_contender_is_not_timed_and_its_mistakes_are_counted(role, wrong):
    calls = []

    def answer(exact):
        calls.append(1)
        return first_wrong(wrong)(exact)

    (entry,) = measure(contest(**{role: answer}), BRIEF)
    assert (entry.row.status, entry.row.mismatches, entry.row.median_s) == (WRONG, wrong, None)
    assert entry.samples == [] and len(calls) == 1


def test_a_peer_that_misses_one_near_tie_in_a_thousand_is_timed_beside_its_count():
    row = by_name(contest(peer=first_wrong(2)))["peer"].row
    assert row.status == OK and row.mismatches == 2 and row.median_s > 0


def test_a_result_of_another_shape_is_wrong():
    verdict = judge_indices(contest(peer=first_wrong(0)).contenders[0], torch.zeros(3), torch.zeros(4))
    assert "shape" in verdict.wrong


def test_a_contender_that_raises_is_reported_and_the_others_are_timed():
    def broken(exact):
        raise RuntimeError("no memory left")

    measured = by_name(contest(peer_broken=broken, peer=first_wrong(0)))
    assert measured["peer_broken"].row.status == "failed" and "no memory" in measured["peer_broken"].row.note
    assert measured["peer"].row.status == OK


def test_a_slow_peer_is_judged_on_one_set_of_inputs(monkeypatch):
    monkeypatch.setattr(measuring, "_SLOW_S", 0.02)

    def slow(exact):
        time.sleep(0.03)
        return exact

    case = contest(vqfast=slow, peer_slow=slow, peer=first_wrong(0))
    problems = [case.problem(seed) for seed in range(3)]
    sets = [len(measuring._judged(case, contender, problems)[0]) for contender in case.contenders]
    assert sets == [3, 1, 3]


def test_the_ratio_is_to_the_fastest_peer_and_never_to_a_yardstick():
    measured = by_name(
        contest(vqfast=first_wrong(0), peer_1=first_wrong(0), peer_2=first_wrong(1), yardstick=first_wrong(0))
    )
    fastest = min(measured[name].row.median_s for name in ("peer_1", "peer_2"))
    for entry in measured.values():
        assert entry.row.ratio_to_best_peer == fastest / entry.row.median_s
    assert measured["yardstick"].row.role == YARDSTICK


def test_rounds_are_interleaved_and_a_slow_contender_stops_early():
    order = []

    def clock(name: str, sleep: float):
        def sample() -> float:
            order.append(name)
            time.sleep(sleep)
            return sleep

        return sample

    effort = Effort(seconds=0.01, least=5, most=8)
    samples = interleaved({"quick": clock("quick", 0.0), "slow": clock("slow", 0.02)}, effort)
    assert len(samples["quick"]) == 8 and len(samples["slow"]) == 3
    assert all({order[i], order[i + 1]} == {"quick", "slow"} for i in range(0, 6, 2))


def test_draws_of_another_distribution_are_found():
    generator = torch.Generator().manual_seed(0)
    log_p = (torch.randn(8, 64, 16, generator=generator, dtype=torch.float64) * 2).log_softmax(-1)
    x = torch.randint(16, (8, 64), generator=generator)
    right = torch.multinomial(log_p.exp().flatten(0, 1), 1, generator=generator).view(8, 64)
    assert judge_draws(log_p, right, x).wrong == ""
    for wrong in (torch.randint(16, (8, 64), generator=generator), log_p.argmax(-1), x, x + 16):
        assert judge_draws(log_p, wrong, x).wrong


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_exact_search_equals_the_definition_ties_included(offset):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 24, generator=generator) + offset
    codebook = torch.randn(70, 24, generator=generator) + offset
    codebook[20], codebook[30] = codebook[50], x[7]
    x[9] = (codebook[3] + codebook[4]) / 2
    for codes in (codebook, codebook[:1], codebook[:2]):
        assert torch.equal(exact_nearest(x, codes), nearest(x, codes))


def test_every_op_has_sizes_for_every_device_and_an_unknown_one_is_refused():
    assert set(CPU_SHAPES) == set(CUDA_SHAPES) == set(TINY_SHAPES) == set(CASES)
    assert {case.op for case in cases("cpu", "nearest, p_sample")} == {"nearest", "p_sample"}
    with pytest.raises(ValueError, match="no benchmark of sort"):
        cases("cpu", "sort")

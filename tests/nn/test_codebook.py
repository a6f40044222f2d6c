"""What the upkeep of codebooks promises: k-means, its starts, random vectors and revival, all without a host read."""

import pytest
import torch

from vqfast.nn import codebook as upkeep
from vqfast.nn.codebook import afkmc2, averaged_codes, kmeans, packed_stats, random_vectors, revived
from vqfast.ops import nearest_code


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clusters(count: int = 20, size: int = 100, dim: int = 3) -> torch.Tensor:
    """Vectors (count * size, dim) in tight clusters far apart."""
    return (100 * torch.randn(count, 1, dim) + 0.1 * torch.randn(count, size, dim)).flatten(0, 1)


def squared_error(x, centres):
    return (x - centres[nearest_code(x, centres)]).square().sum(1).mean()


class TestKMeans:
    @pytest.mark.parametrize("cosine", [False, True])
    def test_is_lloyds_algorithm(self, cosine):
        x, start = torch.randn(200, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
        weights = torch.rand(200, dtype=torch.float64)
        rows, centres = (v / v.norm(dim=1, keepdim=True) if cosine else v.clone() for v in (x, start))
        for _ in range(5):
            nearest = (-rows @ centres.T if cosine else torch.cdist(rows, centres)).argmin(1)
            for k in range(7):
                own = nearest == k
                if own.any():
                    centres[k] = (weights[own, None] * rows[own]).sum(0) / weights[own].sum()
                    if cosine:
                        centres[k] /= centres[k].norm()
        got = kmeans(x, 7, start=start, iters=5, weights=weights, cosine=cosine)
        torch.testing.assert_close(got.centres, centres)
        torch.testing.assert_close(got.counts, torch.zeros(7).double().index_add_(0, nearest, weights))

    def test_afkmc2_finds_clusters_that_random_vectors_miss(self):
        x = clusters()
        random, careful = (kmeans(x, 20, start=start, generator=generator()) for start in ("random", "afkmc2"))
        # A random start misses 20 / e of 20 clusters, and Lloyd's algorithm never gets them back.
        assert squared_error(x, careful.centres) < 0.25 * squared_error(x, random.centres)

    @pytest.mark.parametrize("start", ["random", "afkmc2"])
    def test_masked_vectors_and_those_of_no_weight_leave_no_trace(self, start):
        x, mask = torch.randn(300, 4), torch.rand(300) < 0.5
        poisoned = torch.where(mask[:, None], x, float("nan"))
        masked = kmeans(poisoned, 8, start=start, mask=mask, generator=generator())
        weighted = kmeans(
            torch.where(mask[:, None], x, 1e6), 8, start=start, weights=mask.float(), generator=generator()
        )
        assert masked.centres.isfinite().all() and masked.counts.sum() == mask.sum()
        assert weighted.centres.abs().max() < 10 and weighted.counts.sum() == mask.sum()

    @pytest.mark.parametrize("start", ["random", "afkmc2"])
    def test_the_same_generator_gives_the_same_bits(self, start):
        x = torch.randn(500, 4)
        first, second, other = (kmeans(x, 8, start=start, generator=generator(seed)) for seed in (1, 1, 2))
        assert torch.equal(first.centres, second.centres) and not torch.equal(first.centres, other.centres)

    @pytest.mark.parametrize("start", ["random", "afkmc2"])
    def test_more_centres_than_vectors(self, start):
        x = torch.randn(3, 4)
        centres, counts = kmeans(x, 8, start=start, generator=generator())
        assert squared_error(x, centres) < 1e-12 and counts.sum() == 3
        assert {tuple(centre) for centre in centres.tolist()} == {tuple(row) for row in x.tolist()}

    def test_a_cluster_without_vectors_keeps_its_centre(self):
        start = torch.tensor([[0.0], [100.0]])
        centres, counts = kmeans(torch.tensor([[1.0], [2.0]]), 2, start=start, iters=3)
        assert centres.tolist() == [[1.5], [100.0]] and counts.tolist() == [2, 0]

    def test_low_precision_vectors_are_averaged_in_float32(self):
        assert kmeans(torch.randn(50, 4, dtype=torch.bfloat16), 4).centres.dtype == torch.float32

    @pytest.mark.parametrize("start", ["random", "afkmc2"])
    def test_reads_nothing_back(self, start, nothing_read_back):
        x, mask = torch.randn(100, 4), torch.rand(100) < 0.5
        with nothing_read_back():
            kmeans(x, 8, start=start, mask=mask, weights=torch.rand(100))

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "message"),
        [
            ((torch.zeros(5), 2), {}, ValueError, r"vectors: expected shape \(N, D\), got \(5,\)"),
            ((torch.zeros(5, 2).long(), 2), {}, TypeError, "vectors: expected a float tensor"),
            ((torch.zeros(0, 2), 2), {}, ValueError, "vectors: expected at least one"),
            ((torch.zeros(0, 2), 2), {"start": "random"}, ValueError, "vectors: expected at least one"),
            ((torch.zeros(5, 2), 0), {}, ValueError, "codebook_size: expected at least 1, got 0"),
            ((torch.zeros(5, 2), 2), {"iters": -1}, ValueError, "iters: expected at least 0, got -1"),
            ((torch.zeros(5, 2), 2), {"start": "plusplus"}, ValueError, "start: expected one of afkmc2, random"),
            ((torch.zeros(5, 2), 2), {"start": torch.zeros(3, 2)}, ValueError, r"start: expected .* \(2, 2\)"),
            ((torch.zeros(5, 2), 2), {"mask": torch.ones(4).bool()}, ValueError, r"mask: expected shape \(5,\)"),
            ((torch.zeros(5, 2), 2), {"weights": torch.ones(4)}, ValueError, r"weights: expected shape \(5,\)"),
            ((torch.zeros(5, 2), 2), {"chain_length": 0}, ValueError, "chain_length: expected at least 1, got 0"),
        ],
    )
    def test_what_does_not_fit_is_named(self, arguments, options, error, message):
        with pytest.raises(error, match=message):
            kmeans(*arguments, **options)


class TestAFKMC2:
    def test_a_chain_ends_where_one_step_after_another_would(self):
        for seed in range(50):
            length = 1 + seed
            ratio = torch.rand(length, dtype=torch.float64, generator=generator(seed)) * (seed % 3 > 0)
            ratio[::4] = 0
            end = upkeep._end_of_chain(ratio, generator(seed))
            chance = torch.rand(length, dtype=torch.float64, generator=generator(seed))
            at = 0
            for t in range(1, length):
                if ratio[t] > chance[t] * ratio[at]:
                    at = t
            assert end == at

    def test_long_chains_draw_as_kmeans_plus_plus_does(self):
        x = torch.tensor([[0.0], [1.0], [3.0], [3.0]])
        weights = torch.tensor([1.0, 2.0, 0.5, 0.5])
        draws, source, pairs = 4000, generator(), torch.zeros(4, 4, dtype=torch.float64)
        for _ in range(draws):
            first, second = afkmc2(x, 2, 40, weights=weights, generator=source)[:, 0].long().tolist()
            pairs[first, second] += 1
        value, mass = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([1.0, 2.0, 1.0])
        expected = torch.zeros(4, 4, dtype=torch.float64)
        for i in range(3):
            share = mass * (value - value[i]).square()
            for j in range(3):
                expected[int(value[i]), int(value[j])] = mass[i] / 4 * share[j] / share.sum()
        # Five standard errors of a frequency.
        assert ((pairs / draws - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()

    def test_vectors_all_alike_are_no_division_by_zero(self):
        assert torch.equal(afkmc2(torch.full((9, 2), 3.0), 4), torch.full((4, 2), 3.0))


class TestRevival:
    def test_random_vectors_are_different_ones_that_count(self):
        x, mask = torch.randn(2, 30, 3), torch.rand(2, 30) < 0.5
        drawn = random_vectors(torch.where(mask[..., None], x, float("inf")), 40, mask=mask)
        for head in range(2):
            given = drawn[head][drawn[head, :, -1] > 0, :-1]
            assert {tuple(v) for v in given.tolist()} == {tuple(v) for v in x[head][mask[head]].tolist()}
            assert len(given) == mask[head].sum()
        assert drawn.shape == (2, 40, 4) and (drawn[drawn[..., -1] == 0] == 0).all()

    def test_dead_codes_get_one_candidate_each_as_far_as_they_go(self):
        candidates = torch.tensor([[5.0, 1], [6.0, 1], [0.0, 0], [0.0, 0]])
        replaced, by = revived(torch.tensor([True, False, True, True]), candidates)
        assert replaced.tolist() == [True, False, True, False] and by[replaced].tolist() == [[5.0], [6.0]]


def test_packed_stats_are_weights_and_weighted_sums():
    x, indices, weights = torch.randn(50, 3), torch.randint(-1, 6, (50,)), torch.rand(50)
    packed = packed_stats(x, indices, 6, weights=weights)
    for k in range(6):
        own = indices == k
        torch.testing.assert_close(packed[k, 0], weights[own].sum())
        torch.testing.assert_close(packed[k, 1:], (weights[own, None] * x[own]).sum(0))


@pytest.mark.parametrize("cosine", [False, True])
def test_averaged_codes_are_means_with_smoothed_counts(cosine):
    size, total = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.randn(2, 2, 3)
    got = averaged_codes(size, total, 0.5, cosine=cosine)
    for head in range(2):
        for k in range(2):
            share = (size[head, k] + 0.5) / (size[head].sum() + 1) * size[head].sum()
            code = total[head, k] / share
            torch.testing.assert_close(got[head, k], code / code.norm() if cosine else code)

"""The search by products of warpgroups, on the simulated device, and what that device says of wrong uses of it.

test_tensor_scores.py has what it shares with the portable kernel.
"""

import pytest
import simulator
import torch
from simulator import Call, Written
from torch import Tensor

from vqfast.kernels.nearest.reference import nearest

# In the order of planted_products.cpp.
FAULTS = (
    "none", "no_wait_for_the_copy", "no_wait_for_room", "room_before_the_products_are_made",
    "sums_before_the_products_are_made", "no_fence", "another_permutation", "another_step", "more_bytes_expected",
    "barriers_not_published", "another_parity",
)  # fmt: skip
# Copies and products done with as late as can be, as early, and at random times.
ORDERS = (0, 1, 6, 7)


@pytest.fixture(autouse=True)
def _by_warpgroups(monkeypatch):
    monkeypatch.setenv("VQFAST_CUDA_SCORES", "hopper")


def random_pair(N: int, K: int, D: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=g), torch.randn(K, D, generator=g)


def assert_found(pairs, **device) -> list[int]:
    """The nearest of every pair, and how many rows each says were left open."""
    results = simulator.run([simulator.nearest(*pair) for pair in pairs], **device)
    for (x, codebook), (indices, _) in zip(pairs, results, strict=True):
        assert torch.equal(indices, nearest(x, codebook)), (x.shape, codebook.shape, device)
    return [int(count) for _, count in results]


@pytest.mark.parametrize("D", [1, 8, 13, 14, 29, 30, 64, 100, 256])
def test_features_in_panels_of_any_width(D):
    """32 and 64 bytes with the bias among the features, then 128; a last panel with one to four products."""
    assert_found([random_pair(70, 600, D)])


@pytest.mark.parametrize(("D", "shared_bytes"), [(512, 227 << 10), (200, 163 << 10)])
def test_two_warpgroups_where_three_have_no_room(D, shared_bytes):
    assert_found([random_pair(140, 300, D)], shared_bytes=shared_bytes)


@pytest.mark.parametrize("order", ORDERS)
def test_rings_that_go_round_and_blocks_that_take_several_items(order):
    """One multiprocessor: all rows go through one block, whose ring holds less than the codes of one item."""
    pairs = [random_pair(400, 1300, 8), random_pair(200, 700, 70)]
    assert_found(pairs, multiprocessors=1, order=order)


def test_few_rows_split_the_codebook_over_all_blocks():
    x, codebook = random_pair(6, 3000, 20)
    codebook[2700] = codebook[3]
    x[5] = codebook[3]
    for multiprocessors in (3, 132):
        ((indices, _),) = simulator.run([simulator.nearest(x, codebook)], multiprocessors=multiprocessors)
        assert torch.equal(indices, nearest(x, codebook)) and indices[5] == 3


def test_biases_whose_three_pieces_matter():
    """Codes on two spheres whose biases differ in their last bits, and such that leave bfloat16's precision."""
    x, codebook = random_pair(90, 256, 8)
    directions = codebook / codebook.norm(dim=1, keepdim=True)
    radius = torch.cat([torch.ones(128), torch.ones(128) + 2e-6])[:, None]
    sizes = torch.logspace(-9, 1, 256)[:, None]
    assert_found([(x, directions * radius), (x * 1e-3, directions * 1e3), (x, codebook * sizes)])


def test_as_many_rows_are_left_open_as_by_the_portable_kernel(monkeypatch):
    pair = random_pair(256, 512, 64)
    (by_warpgroups,) = assert_found([pair])
    monkeypatch.setenv("VQFAST_CUDA_SCORES", "bfloat16")
    assert abs(assert_found([pair])[0] - by_warpgroups) <= 2


def test_other_devices_and_too_many_features_get_the_next_best_scores(monkeypatch):
    pair = random_pair(60, 300, 20)
    counts = [assert_found([pair], capability=capability)[0] for capability in (80, 90, 100)]
    monkeypatch.setenv("VQFAST_CUDA_SCORES", "bfloat16")
    assert counts[0] == counts[2] == assert_found([pair])[0]
    monkeypatch.setenv("VQFAST_CUDA_SCORES", "hopper")
    assert_found([random_pair(20, 60, 720)])


def test_scores_that_do_not_exist(monkeypatch):
    monkeypatch.setenv("VQFAST_CUDA_SCORES", "wgmma")
    with pytest.raises(RuntimeError, match="error code 4"):
        simulator.run([simulator.nearest(*random_pair(4, 4, 4))])


@pytest.mark.slow
def test_no_two_threads_race_for_memory_of_a_ring_that_goes_round():
    """test_tensor_scores.py has a smaller one."""
    x, codebook = random_pair(20, 600, 70)
    codebook[550:] = codebook[:50]
    x[4] = torch.nan
    assert_found([(x, codebook)], sanitizer="races", multiprocessors=1)


def permuted(rows: Tensor) -> Tensor:
    """What a matrix in shared memory looks like: in each 128 bytes' row of banks, chunks change places."""
    n, width = rows.shape[0], rows.shape[1] * 2
    chunks = width // 16
    line = torch.arange(n)[:, None] * width // 128
    at = torch.arange(chunks) ^ (line % chunks)
    return rows.view(n, chunks, 8).gather(1, at[:, :, None].expand(-1, -1, 8)).reshape(n, -1)


def planted(fault: str, width: int = 64, sanitizer: str = "memory", order: int = 0) -> tuple[Tensor, Tensor]:
    """What the simulated device multiplies, and the product."""
    g = torch.Generator().manual_seed(1)
    rows, codes = (torch.randn(n, width // 2, generator=g).bfloat16() for n in (64, 5 * 128))
    integers = [width, 5, FAULTS.index(fault)]
    call = Call("planted_products", integers, [], [permuted(rows), permuted(codes), Written((64, 640), torch.float32)])
    return simulator.run([call], sanitizer=sanitizer, order=order)[0][0], rows.double() @ codes.double().T


class TestTheSimulatorItself:
    @pytest.mark.parametrize("width", [32, 64, 128])
    def test_multiplies_what_descriptors_name(self, width):
        for order in ORDERS:
            got, want = planted("none", width, order=order)
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("no_wait_for_room", "one arrival too many"),
            ("no_fence", "without the fence"),
            ("more_bytes_expected", "waits for ever: .* 0 of 1 arrivals and 16 bytes lack"),
            ("barriers_not_published", "not published"),
        ],
    )
    def test_says_what_is_wrong(self, fault, message):
        with pytest.raises(RuntimeError, match=message):
            planted(fault)

    @pytest.mark.parametrize("fault", ["sums_before_the_products_are_made", "another_permutation", "another_step"])
    def test_wrong_uses_give_wrong_numbers(self, fault):
        got, want = planted(fault)
        assert not torch.allclose(got.double(), want, rtol=0.1)

    @pytest.mark.parametrize("fault", ["no_wait_for_the_copy", "another_parity", "room_before_the_products_are_made"])
    def test_what_comes_too_late_shows_in_some_order(self, fault):
        differ = 0
        for order in ORDERS:
            try:
                got, want = planted(fault, order=order)
                differ += not torch.allclose(got.double(), want, rtol=1e-4, atol=1e-4)
            except RuntimeError as error:
                assert "waits for ever" in str(error) or "too many" in str(error) or "under way" in str(error)
                differ += 1
        assert differ

    def test_what_comes_too_late_is_a_race_in_every_order(self):
        planted("none", sanitizer="races")
        for fault in ("no_wait_for_the_copy", "room_before_the_products_are_made"):
            with pytest.raises(RuntimeError, match="data race"):
                planted(fault, sanitizer="races")

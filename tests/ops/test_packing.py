"""Packing and unpacking: order, round trip, gradients, capacity, errors, against the golden sequences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vqfast
from vqfast import ops


def random_map(B: int, H: int, W: int, G: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(G, (B, H, W), generator=torch.Generator().manual_seed(seed))


def replicated(grid: torch.Tensor, grains: torch.Tensor, num_grains: int) -> torch.Tensor:
    """Every position takes the value at the top left of its code, one position at a time."""
    out, factor = grid.clone(), 2 ** (num_grains - 1)
    for b, y, x in torch.cartesian_prod(*(torch.arange(n) for n in grid.shape[:3])).tolist():
        edge = factor >> int(grains[b, y // factor, x // factor])
        out[b, y, x] = grid[b, y // edge * edge, x // edge * edge]
    return out


def test_order_of_the_drawing_in_the_notes():
    """kernels/pack/README.md: one image of 2 x 2 cells, the second and third fine."""
    codes = torch.arange(16).reshape(1, 4, 4)
    grains = torch.tensor([[[0, 1], [1, 0]]])
    packed = ops.pack(codes, grains)
    assert packed.values.tolist() == [0, 10, 2, 3, 6, 7, 8, 9, 12, 13, 0, 0, 0, 0, 0, 0]
    assert packed.positions.tolist() == [0, 3, 2, 3, 6, 7, 8, 9, 12, 13] + [-1] * 6
    assert packed.grain_ids.tolist() == [0] * 2 + [1] * 8 + [-1] * 6
    assert packed.cu_seqlens.tolist() == [0, 10] and packed.cu_seqlens.dtype == torch.int32
    beside = ops.pack(codes, torch.tensor([[[1, 1], [0, 0]]]))
    assert beside.values[:10].tolist() == [8, 10, 0, 1, 2, 3, 4, 5, 6, 7]
    region = ops.pack(codes, torch.tensor([[[1, 1], [0, 0]]]), order="region")
    assert region.values[:10].tolist() == [8, 10, 0, 1, 4, 5, 2, 3, 6, 7]
    assert region.positions[:10].tolist() == [2, 3, 0, 1, 4, 5, 2, 3, 6, 7]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.sampled_from(["row", "region"]),
    st.integers(0, 3), st.integers(0, 99),
)  # fmt: skip
def test_round_trip_gives_every_code_back(B, H, W, G, order, D, seed):
    g = torch.Generator().manual_seed(seed)
    grains, factor = random_map(B, H, W, G, seed), 2 ** (G - 1)
    shape = (B, H * factor, W * factor, *((D,) if D else ()))
    grid = torch.randn(shape, generator=g) if D else torch.randint(1 << 40, shape, generator=g)
    packed = ops.pack(grid, grains, order=order)
    assert torch.equal(ops.unpack(packed, grains, num_grains=G), replicated(grid, grains, G))
    assert int(packed.cu_seqlens[-1]) == int((4**grains).sum())


def test_tokens_of_an_image_may_come_in_any_order():
    grains = random_map(3, 4, 5, 3)
    packed = ops.pack(torch.arange(3 * 16 * 20).reshape(3, 16, 20), grains)
    want, order = ops.unpack(packed, grains, num_grains=3), []
    bounds = packed.cu_seqlens.tolist()
    for begin, end in zip(bounds, bounds[1:], strict=False):
        order.append(begin + torch.randperm(end - begin, generator=torch.Generator().manual_seed(end)))
    order.append(torch.arange(bounds[-1], len(packed.values)))
    order = torch.cat(order)
    shuffled = ops.Packed(packed.values[order], packed.cu_seqlens, packed.positions[order], packed.grain_ids[order])
    assert torch.equal(ops.unpack(shuffled, grains, num_grains=3), want)


@pytest.mark.parametrize("width", [1, 3, 49, 107, 1023])
def test_first_and_last_code_of_every_row_are_put_in_their_place(width):
    """Rows are found by a product with the reciprocal of their length, which rounds."""
    grid = torch.arange(3 * 700 * width).reshape(3, 700, width)
    grains = torch.zeros_like(grid)
    assert torch.equal(ops.unpack(ops.pack(grid, grains), grains, num_grains=1), grid)


@pytest.mark.parametrize("capacity", [0, 1, 17, 40])
def test_a_smaller_capacity_keeps_the_first_tokens(capacity):
    grains = random_map(2, 4, 4, 2)
    grid = torch.arange(128).reshape(2, 8, 8)
    whole, part = ops.pack(grid, grains), ops.pack(grid, grains, capacity=capacity)
    for name in ("values", "positions", "grain_ids"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[:capacity]), name
    assert torch.equal(part.cu_seqlens, whole.cu_seqlens.clamp(max=capacity))
    back = ops.unpack(part, grains)
    assert bool(((back == replicated(grid, grains, 2)) | (back == 0)).all())


@pytest.mark.parametrize("order", ["row", "region"])
@pytest.mark.parametrize("num_grains", [2, 3])
def test_gradients(order, num_grains):
    """Of packing: to the top left of what a code covers. Of unpacking: the sum over it."""
    factor, grains = 2 ** (num_grains - 1), random_map(2, 2, 3, num_grains)
    features = torch.randn(2, 2 * factor, 3 * factor, 3, dtype=torch.float64, requires_grad=True)
    layout = ops.pack(features.detach(), grains, order=order)
    torch.autograd.gradcheck(lambda x: ops.pack(x, grains, order=order).values, features)
    values = torch.randn(layout.values.shape, dtype=torch.float64, requires_grad=True)

    def unpacked(v):
        return ops.unpack(ops.Packed(v, *layout[1:]), grains, num_grains=num_grains)

    torch.autograd.gradcheck(unpacked, values)
    (grad,) = torch.autograd.grad(unpacked(values).sum(), values)
    assert torch.equal(grad[:, 0].long(), ops.code_weights(layout.grain_ids, num_grains))
    ops.pack(features, grains, order=order).values.sum().backward()
    assert int(features.grad[..., 0].sum()) == int(layout.cu_seqlens[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_channel_first_and_sliced_input_is_read_right(dtype):
    x = (100 * torch.randn(2, 6, 8, 12)).to(dtype)
    grains = random_map(2, 4, 6, 2)
    for view in (
        x.permute(0, 2, 3, 1),
        x[:, 1::2].permute(0, 2, 3, 1),
        x[:, :1].expand(2, 5, 8, 12).permute(0, 2, 3, 1),
    ):
        for a, b in zip(ops.pack(view, grains), ops.pack(view.contiguous(), grains), strict=True):
            assert torch.equal(a, b)
    codes = x[:, 0].mT.contiguous().mT
    assert torch.equal(ops.pack(codes, grains).values, ops.pack(codes.contiguous(), grains).values)


def test_compiles_whole_without_a_recompile_for_each_batch_size():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def both(x, grains):
        packed = ops.pack(x, grains)
        return ops.unpack(ops.Packed(packed.values * 2, *packed[1:]), grains)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for B in (2, 3, 5):
        x, grains = torch.randn(B, 8, 8, 3, requires_grad=True), random_map(B, 4, 4, 2)
        out = both(x, grains)
        (grad,) = torch.autograd.grad(out.sum(), x)
        want = ops.unpack(ops.pack(x * 2, grains), grains)
        (want_grad,) = torch.autograd.grad(want.sum(), x)
        assert torch.equal(out, want) and torch.equal(grad, want_grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


class TestErrors:
    grid, grains = torch.arange(64).reshape(1, 8, 8), torch.tensor([[[0, 1], [1, 0]]]).repeat(1, 2, 2)

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            (dict(values=torch.zeros(1, 6, 8, dtype=torch.int64)), ValueError, r"4 x 4 cells.*6 x 8"),
            (dict(values=torch.zeros(1, 12, 12, dtype=torch.int64)), ValueError, r"2\^\(G-1\) times.*12 x 12"),
            (dict(values=torch.zeros(2, 8, 8, dtype=torch.int64)), ValueError, "1 images.*2 images"),
            (dict(values=torch.zeros(8, 8, dtype=torch.int64)), ValueError, r"\(B, Hf, Wf\)"),
            (dict(values=torch.zeros(1, 8, 8, dtype=torch.int32)), TypeError, "int64.*got int32"),
            (dict(grains=torch.zeros(1, 4, 4)), TypeError, "grains: expected an int64"),
            (dict(order="column"), ValueError, "row, region, got 'column'"),
            (dict(capacity=-1), ValueError, "capacity: expected at least 0, got -1"),
            (dict(capacity=3.5), TypeError, "capacity: expected a whole number, got float 3.5"),
            (dict(grains=None), TypeError, "grains: expected an int64"),
        ],
    )
    def test_arguments(self, change, error, words):
        arguments = dict(values=self.grid, grains=self.grains) | change
        with pytest.raises(error, match=words):
            ops.pack(arguments.pop("values"), arguments.pop("grains"), **arguments)

    @pytest.mark.parametrize("asked", [False, True])
    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    def test_a_grain_out_of_range_names_image_and_cell(self, backend, asked):
        """Whether the kernel looks at the map as it counts, or the check does before it runs."""
        for wrong in (2, -1):
            grains = self.grains.repeat(3, 1, 1)
            grains[2, 1, 3] = wrong
            expected = rf"0\.\.1 .*got {wrong} at image 2, cell \(1, 3\)"
            with vqfast.checked(asked), vqfast.backend(backend), pytest.raises(ValueError, match=expected):
                ops.pack(self.grid.repeat(3, 1, 1), grains)

    @vqfast.checked()
    def test_more_codes_than_capacity(self):
        ops.pack(self.grid, self.grains, capacity=40)
        with pytest.raises(ValueError, match=r"at least 40 tokens, got 39; image 0 does not fit, from cell \(3, 2\)"):
            ops.pack(self.grid, self.grains, capacity=39)

    @vqfast.checked()
    def test_a_code_that_is_missing_or_there_twice(self):
        packed = ops.pack(self.grid, self.grains)
        ops.unpack(packed, self.grains)
        positions = packed.positions.clone()
        positions[20] = positions[12]
        with pytest.raises(ValueError, match=r"image 0, cell \(0, 1\) is covered twice.*got 2 tokens"):
            ops.unpack(packed._replace(positions=positions), self.grains)
        with pytest.raises(ValueError, match=r"image 0, cell \(3, 2\) is not covered"):
            ops.unpack(packed._replace(cu_seqlens=torch.tensor([0, 39], dtype=torch.int32)), self.grains)
        with pytest.raises(ValueError, match=r"image 0, cell \(0, 0\) has grain 1.*token of grain 0"):
            ops.unpack(packed, 1 - self.grains)
        positions[20] = 64
        with pytest.raises(ValueError, match="position 64 in image 0, token 20"):
            ops.unpack(packed._replace(positions=positions), self.grains)

    def test_unchecked_a_wrong_sequence_gives_some_grid_and_no_error(self):
        packed = ops.pack(self.grid, self.grains)
        for wrong in (-1, 1 << 62, -(1 << 62)):
            positions = packed.positions.clone()
            positions[::3] = wrong
            assert ops.unpack(packed._replace(positions=positions), self.grains).shape == (1, 8, 8)
            ids = packed.grain_ids.clone()
            ids[::3] = wrong
            assert ops.unpack(packed._replace(grain_ids=ids), self.grains).shape == (1, 8, 8)
        wild = torch.tensor([-(1 << 31), (1 << 31) - 1], dtype=torch.int32)
        assert ops.unpack(packed._replace(cu_seqlens=wild), self.grains).shape == (1, 8, 8)
        assert ops.unpack(packed, self.grains * 1000 - 5).shape == (1, 8, 8)

    def test_what_is_no_packed_sequence(self):
        for wrong in (self.grid, [self.grid] * 3, None):
            with pytest.raises(TypeError, match="packed: expected what pack returns, values, cu_seqlens, positions"):
                ops.unpack(wrong, self.grains)
        with pytest.raises(TypeError, match="num_grains: expected a whole number, got float 2.0"):
            ops.unpack(ops.pack(self.grid, self.grains), self.grains, num_grains=2.0)

    def test_too_many_tokens_for_the_number_of_grains(self):
        packed = ops.pack(torch.zeros(1, 16, 16, dtype=torch.int64), self.grains)
        with pytest.raises(ValueError, match="at most 64 tokens.*num_grains = 2, got 256"):
            ops.unpack(packed, self.grains)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("size", ["full", "tiny"])
@pytest.mark.parametrize("order", ["row", "region"])
def test_golden_sequences(golden, backend, size, order):
    arrays = golden("dq_sequences")
    grains, codes = arrays[f"{size}/grain"], arrays[f"{size}/codes_raw"]
    cells = tuple(grains.shape[1:])
    K = {"full": 1024, "tiny": 64}[size]
    with vqfast.backend(backend):
        packed = ops.pack(codes, grains, order=order)
        segments = ops.to_padded(packed, cells=cells, codebook_size=K, trim=True)
        for name, segment in zip(("coarse", "fine"), segments, strict=True):
            assert torch.equal(segment.content, arrays[f"{size}/{order}/{name}_content"])
            assert torch.equal(segment.position, arrays[f"{size}/{order}/{name}_position"])
        again, map_again = ops.from_padded(segments, cells=cells)
        assert torch.equal(map_again, grains)
        for a, b in zip(again, packed, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(ops.unpack(again, map_again), arrays[f"{size}/{order}/back"])
        assert torch.equal(ops.unpack(packed, grains), arrays[f"{size}/codes"])


class TestPadded:
    @pytest.mark.parametrize("num_grains", [1, 2, 3])
    @pytest.mark.parametrize("sos", [False, True])
    @vqfast.checked()
    def test_there_and_back(self, num_grains, sos):
        factor, grains = 2 ** (num_grains - 1), random_map(4, 3, 2, num_grains)
        grains[1], grains[2] = 0, num_grains - 1
        packed = ops.pack(torch.randint(50, (4, 3 * factor, 2 * factor)), grains)
        segments = ops.to_padded(packed, cells=(3, 2), codebook_size=50, num_grains=num_grains, sos=sos)
        for g, (content, position) in enumerate(segments):
            assert content.shape == position.shape == (4, 6 * 4**g + 1 + sos)
            assert not sos or (content[:, 0] == 52).all() and (position[:, 0] == 6 * 4**g + 2).all()
            assert bool(((content == 51) == (position == 6 * 4**g + 1)).all())
            assert (content == 51).sum(1).tolist() == [1] * 4
        again, map_again = ops.from_padded(segments, cells=(3, 2))
        assert torch.equal(map_again, grains)
        assert all(torch.equal(a, b) for a, b in zip(again, packed, strict=True))

    def test_a_special_token_in_the_middle(self):
        packed = ops.pack(torch.zeros(2, 4, 4, dtype=torch.int64), torch.ones(2, 2, 2, dtype=torch.int64))
        coarse, fine = ops.to_padded(packed, cells=(2, 2), codebook_size=9)
        fine.position[1, 5] = 16
        tokens, grains = ops.from_padded((coarse, fine), cells=(2, 2))
        assert tokens.cu_seqlens.tolist() == [0, 16, 31] and int(grains.min()) == 1
        expected = r"grain 1, got 16 \(pad, eos, sos = 16, 17, 18\) in image 1, at entry 5"
        with vqfast.checked(), pytest.raises(ValueError, match=expected):
            ops.from_padded((coarse, fine), cells=(2, 2))

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            (dict(codebook_size=9), ValueError, r"^packed.values: expected values in 0\.\.8 \(K = 9\), got 0\.\.9"),
            (dict(codebook_size=0), ValueError, "^codebook_size: expected at least 1"),
            (dict(cells=(2,)), TypeError, "^cells: expected two whole numbers"),
            (dict(cells=4), TypeError, "^cells: expected two whole numbers"),
            (dict(packed=torch.zeros(3)), TypeError, "^packed: expected what pack returns"),
        ],
    )
    def test_what_does_not_fit_is_named(self, change, error, words):
        """A code beyond K would be read as the special token of its number."""
        packed = ops.pack(torch.full((2, 4, 4), 9), torch.zeros(2, 2, 2, dtype=torch.int64))
        with pytest.raises(error, match=words):
            ops.to_padded(**dict(packed=packed, cells=(2, 2), codebook_size=10) | change)

    def test_an_empty_batch(self):
        packed = ops.pack(torch.zeros(0, 4, 4, dtype=torch.int64), torch.zeros(0, 2, 2, dtype=torch.int64))
        segments = ops.to_padded(packed, cells=(2, 2), codebook_size=9, trim=True)
        assert segments[1].content.shape == (0, 17)
        assert ops.from_padded(segments, cells=(2, 2))[1].shape == (0, 2, 2)


class TestPositionMask:
    def drawn(self, *tokens: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, L) positions and grains."""
        return torch.tensor([[p for _, p in tokens]]), torch.tensor([[g for g, _ in tokens]])

    def allowed(self, tokens, grain, **sizes):
        positions, grain_ids = self.drawn(*tokens) if tokens else (torch.zeros(1, 0).long(),) * 2
        mask = ops.position_mask(positions, grain_ids, torch.tensor([grain]), **sizes)
        return mask[0].nonzero().flatten().tolist()

    def test_two_grains(self):
        sizes = dict(cells=(2, 2))
        assert self.allowed([], 0, **sizes) == [0, 1, 2, 3, 5]
        assert self.allowed([(0, 6), (0, 3), (0, 0)], 0, **sizes) == [1, 2, 5]
        assert self.allowed([(0, 3), (0, 5)], 0, **sizes) == [4]
        fine = [(0, 0), (0, 1), (0, 3), (0, 5), (1, 18)]
        assert self.allowed(fine, 1, **sizes) == [8, 9, 12, 13]
        assert self.allowed([*fine, (1, 9), (1, 8), (1, 13)], 1, **sizes) == [12]
        assert self.allowed([*fine, (1, 9), (1, 8), (1, 13), (1, 12)], 1, **sizes) == [17]
        assert self.allowed([*fine, (1, 9), (1, 8), (1, 13), (1, 12), (1, 17)], 1, **sizes) == [16]

    def test_a_cell_begun_at_a_middle_grain_is_finished_before_its_end(self):
        sizes = dict(cells=(1, 2), num_grains=3, vocab_size=50)
        assert self.allowed([(0, 0)], 1, **sizes) == [2, 3, 6, 7, 9]
        assert self.allowed([(0, 0), (1, 3)], 1, **sizes) == [2, 6, 7]
        assert self.allowed([(0, 0), (1, 3), (1, 2), (1, 6), (1, 7)], 1, **sizes) == [9]
        assert self.allowed([(0, 0), (1, 3), (1, 2), (1, 6), (1, 7), (1, 9)], 2, **sizes) == [33]
        assert self.allowed([(0, 0)], 2, **sizes) == [y * 8 + x for y in range(4) for x in range(4, 8)]

    @pytest.mark.parametrize("num_grains", [1, 2, 3])
    def test_what_is_sampled_under_it_covers_every_image_once(self, num_grains):
        """Uniform draws among what is allowed, a whole batch at a time, until every image has ended every grain."""
        B, cells, g = 6, (3, 2), torch.Generator().manual_seed(num_grains)
        positions, ids = torch.zeros(B, 0, dtype=torch.int64), torch.zeros(B, 0, dtype=torch.int64)
        grain = torch.zeros(B, dtype=torch.int64)
        for _ in range(6 * 4 ** (num_grains - 1) + num_grains + 1):
            mask = ops.position_mask(positions, ids, grain, cells=cells, num_grains=num_grains)
            assert bool(mask.any(1).all())
            weights = mask.double()
            size = 6 * 4**grain
            # Ends come often, so that all grains are drawn.
            weights.scatter_(1, (size + 1)[:, None], 8 * weights.gather(1, (size + 1)[:, None]))
            drawn = torch.multinomial(weights, 1, generator=g)
            positions, ids = torch.cat([positions, drawn], 1), torch.cat([ids, grain[:, None]], 1)
            grain = torch.where(drawn[:, 0] == size + 1, grain + 1, grain).clamp(max=num_grains - 1)
        size = 6 * 4 ** ids.clamp(min=0)
        segments = [torch.where(ids == n, positions, 6 * 4**n) for n in range(num_grains)]
        packed, grains = ops.from_padded([(s * 0, s) for s in segments], cells=cells)
        with vqfast.checked():
            ops.unpack(packed, grains, num_grains=num_grains)
        assert num_grains == 1 or len(grains.unique()) == num_grains

    def test_golden_masks_but_for_the_released_defects(self, golden):
        """The released coarse mask forbids the last cell, and both let a sample end when it likes."""
        arrays = golden("dqtransformer_uncond")
        vocab = arrays["mask/in"].shape[1]
        coarse, fine = arrays["mask/sampled"], arrays["mask/fine_sampled"]
        running, ended = [0, 2], 1
        assert arrays["mask/ended"].flatten().tolist() == [0, 1, 0]

        eos = torch.tensor([[-1], [17], [-1]])
        ours = ops.position_mask(
            torch.cat([coarse, eos], 1), torch.zeros(3, 5).long(), torch.zeros(3).long(), cells=(4, 4), vocab_size=vocab
        )
        released = ~arrays["mask/coarse_position"].isneginf()
        assert released[ended].nonzero().flatten().tolist() == ours[ended].nonzero().flatten().tolist() == [16]
        for b in running:
            assert (ours[b] != released[b]).nonzero().flatten().tolist() == [15] and ours[b, 15]

        eos = torch.tensor([[-1], [65], [-1]])
        ours = ops.position_mask(
            torch.cat([fine, eos], 1), torch.ones(3, 6).long(), torch.ones(3).long(), cells=(4, 4), vocab_size=vocab
        )
        released = ~arrays["mask/fine_position"].isneginf()
        assert released[ended].nonzero().flatten().tolist() == ours[ended].nonzero().flatten().tolist() == [64]
        for b in running:
            assert (ours[b] != released[b]).nonzero().flatten().tolist() == [65] and released[b, 65]

    def test_errors(self):
        positions, ids = self.drawn((0, 1))
        with pytest.raises(ValueError, match="vocab_size: expected at least 19"):
            ops.position_mask(positions, ids, torch.tensor([0]), cells=(2, 2), vocab_size=18)
        for backend in ("cpu", "reference"):
            with vqfast.backend(backend), pytest.raises(ValueError, match=r"grain: expected values in 0\.\.1.*got 2"):
                ops.position_mask(positions, ids, torch.tensor([2]), cells=(2, 2))
        with pytest.raises(ValueError, match="grain_ids: expected shape"):
            ops.position_mask(positions, ids[:, :0], torch.tensor([0]), cells=(2, 2))
        with pytest.raises(TypeError, match="positions: expected an int64"):
            ops.position_mask(positions.int(), ids, torch.tensor([0]), cells=(2, 2))
        for cells in (4, (2, 2, 2), (2.0, 2)):
            with pytest.raises(TypeError, match="cells: expected (two|a) whole number"):
                ops.position_mask(positions, ids, torch.tensor([0]), cells=cells)
        with pytest.raises(TypeError, match="vocab_size: expected a whole number, got float"):
            ops.position_mask(positions, ids, torch.tensor([0]), cells=(2, 2), vocab_size=19.0)


class TestGrainEntropy:
    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    def test_golden(self, golden, backend):
        arrays = golden("dq_entropy")
        with vqfast.backend(backend):
            for suffix, patch in (("", 16), ("_p8", 8)):
                entropy = ops.grain_entropy(arrays["image" + suffix], patch)
                torch.testing.assert_close(entropy, arrays["entropy" + suffix], rtol=1e-5, atol=1e-5)
            grain = (ops.grain_entropy(arrays["image"], 16) > arrays["threshold"]).long()
            assert torch.equal(grain, arrays["grain"])

    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    def test_a_nan_is_its_own_patch_s_and_no_other_s(self, backend):
        images = torch.zeros(1, 3, 8, 16)
        images[0, 1, 7, 8] = float("nan")
        with vqfast.backend(backend):
            assert ops.grain_entropy(images, 8).isnan().tolist() == [[[False, True]]]

    def test_flat_is_zero_and_even_is_log_of_the_bins(self):
        flat = ops.grain_entropy(torch.full((1, 1, 8, 8), 1.0), 8)
        levels = torch.linspace(-1, 1, 32).repeat(2).reshape(1, 1, 8, 8)
        assert abs(float(flat)) < 1e-6
        torch.testing.assert_close(
            ops.grain_entropy(levels, 8).log2(), torch.full((1, 1, 1), 5.0).mul(0.6931472).log2()
        )

    def test_errors(self):
        images = torch.zeros(1, 3, 16, 16)
        with pytest.raises(ValueError, match="patch_size: expected a divisor of 16 x 16"):
            ops.grain_entropy(images, 5)
        with pytest.raises(ValueError, match="num_bins: expected 2..1024"):
            ops.grain_entropy(images, 4, num_bins=1)
        with pytest.raises(ValueError, match="sigma > 0"):
            ops.grain_entropy(images, 4, sigma=0.0)
        with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
            ops.grain_entropy(images[:, :2], 4)

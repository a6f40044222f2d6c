"""The DQ-Transformer against the released network, and what its packed training promises."""

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast.models.converters import dq_transformer_state_dict
from vqfast.models.dq_transformer import DQTransformer, DQTransformerConfig
from vqfast.models.grain_sequences import GrainSequences
from vqfast.nn.attention import PackedAttention

K = 11


def model(**options) -> DQTransformer:
    """A network away from its start, which hardly tells tokens apart."""
    torch.manual_seed(0)
    sizes = dict(codebook_size=K, grid=(4, 8), dim=16, heads=2, position_depth=1, content_depth=2)
    net = DQTransformer(DQTransformerConfig(**sizes | options))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net.eval()


def images(net: DQTransformer, batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Codes, all different within a coarse cell, and grains, the first image all coarse, the second all fine."""
    c, generator = net.config, torch.Generator().manual_seed(seed)
    codes = torch.randint(K, (batch, *c.grid), generator=generator)
    grains = torch.randint(c.num_grains, (batch, *c.cells), generator=generator)
    for image, grain in zip(range(batch), (0, c.num_grains - 1), strict=False):
        grains[image] = grain
    return codes, grains


# ---- the released network --------------------------------------------------------------------------------------------


@pytest.fixture
def released(golden):
    """The released network in ours, its arrays, and its tokens, with the padding that stands amid them."""
    arrays = golden("dqtransformer_uncond")
    config = DQTransformerConfig(
        codebook_size=64, grid=(8, 8), dim=64, heads=4, position_depth=2, content_depth=3, max_length=96
    )
    net = DQTransformer(config).eval()
    state = {name.removeprefix("sd/"): value for name, value in arrays.items() if name.startswith("sd/")}
    net.load_state_dict(dq_transformer_state_dict(state))
    return net, arrays, released_tokens(arrays)


def released_tokens(arrays) -> GrainSequences:
    """The released layout: every segment padded to the longest of its batch, so that padding stands mid-sequence.

    Our sequences have none; the network takes any tokens, so it can be given theirs.
    """
    content, position = (
        torch.cat([arrays[f"in/coarse_{name}"], arrays[f"in/fine_{name}"]], dim=1) for name in ("content", "position")
    )
    grain = torch.cat([arrays["in/coarse_seg"], arrays["in/fine_seg"]], dim=1)
    B, L = content.shape
    cu_seqlens = torch.arange(B + 1, dtype=torch.int32) * L
    return GrainSequences(content.flatten(), position.flatten(), grain.flatten(), cu_seqlens, L)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * max(1.0, expected.abs().max().item()))


@torch.no_grad()
def test_logits_are_the_released_ones(released):
    net, arrays, tokens = released
    position, content = (logits.view(3, -1, 67)[:, :-1] for logits in net(tokens))
    coarse = arrays["logits/coarse_position"].shape[1]
    close(position[:, :coarse], arrays["logits/coarse_position"])
    close(position[:, coarse:], arrays["logits/fine_position"])
    close(content, arrays["logits/content"])


def test_losses_and_gradients_are_the_released_ones(released):
    net, arrays, tokens = released
    losses = net.loss(tokens)
    close(losses["content"].detach(), arrays["loss/content"])
    close(losses["position"].detach(), arrays["loss/position"])
    close(losses["loss"].detach(), arrays["loss/total"])
    losses["loss"].backward()
    close(net.position_head[0].weight.grad, arrays["grad/position_head_norm"])
    coarse, fine = net.position_embedding.weight.grad.split((19, 67))
    for got, name, pad in (
        (net.content_embedding.weight.grad, "content_emb", 64),
        (coarse, "coarse_pos_emb", 16),
        (fine, "fine_pos_emb", 64),
    ):
        expected = arrays[f"grad/{name}"]
        # There padding learns nothing; here there is none to learn from.
        assert not expected[pad].any()
        got[pad] = 0
        close(got, expected)


@torch.no_grad()
def test_without_padding_an_image_that_had_none_keeps_its_logits(released):
    """The first image has the longest coarse segment, so padding stands behind its tokens alone."""
    net, arrays, _ = released
    tokens = net.sequences(arrays["codes"], arrays["grain"])
    n = int(tokens.cu_seqlens[1])
    expected = released_tokens(arrays)
    for name in ("content", "position", "grain"):
        assert torch.equal(getattr(tokens, name)[:n], getattr(expected, name)[:n])
    position, content = (logits[: n - 1] for logits in net(tokens))
    close(content, arrays["logits/content"][0, : n - 1])
    close(position, torch.cat([arrays["logits/coarse_position"][0], arrays["logits/fine_position"][0]])[: n - 1])


@pytest.mark.parametrize(("num_classes", "count"), [(None, 308_884_480), (1000, 313_999_360)])
def test_the_base_model_has_the_papers_size(num_classes, count):
    with torch.device("meta"):
        net = DQTransformer(DQTransformerConfig(num_classes=num_classes))
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_training_checkpoint_of_the_released_code_is_read(golden, prefix):
    state = {
        prefix + name.removeprefix("sd/"): value
        for name, value in golden("dqtransformer_uncond").items()
        if name.startswith("sd/")
    }
    converted = dq_transformer_state_dict(state | ({"first_stage_model.x": torch.zeros(1)} if prefix else {}))
    config = DQTransformerConfig(
        codebook_size=64, grid=(8, 8), dim=64, heads=4, position_depth=2, content_depth=3, max_length=96
    )
    DQTransformer(config).load_state_dict(converted)


def test_another_checkpoint_is_refused():
    with pytest.raises(ValueError, match="expected a DQ-Transformer of two grains"):
        dq_transformer_state_dict({"encoder.weight": torch.zeros(1)})


# ---- sequences -------------------------------------------------------------------------------------------------------


def test_a_sequence_is_start_codes_end_of_each_grain():
    net = model(grid=(4, 4), num_classes=3, class_dropout=0.1)
    codes = torch.arange(16).view(1, 4, 4) % K
    grains = torch.tensor([[[0, 1], [0, 0]]])
    tokens = net.sequences(codes, grains, torch.tensor([2]))
    # Content: pad 11, end 12, start of class 2 is 15. Coarse positions: end 5, start 8. Fine: end 17, start 20.
    assert tokens.content.tolist() == [15, 0, 8, 10, 12, 15, 2, 3, 6, 7, 12]
    assert tokens.position.tolist() == [8, 0, 2, 3, 5, 20, 2, 3, 6, 7, 17]
    assert tokens.grain.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert net.sequences(codes, grains, torch.tensor([-1])).content[0] == 16, "the start of no class"


@pytest.mark.parametrize("order", ["row", "region"])
def test_sequences_are_the_released_ones(golden, order):
    """Full size, against the padded sequences of the released code (arrays without start)."""
    arrays = golden("dq_sequences")
    net = DQTransformer(DQTransformerConfig(order=order, dim=8, heads=1, position_depth=1, content_depth=1))
    tokens = net.sequences(arrays["full/codes_raw"], arrays["full/grain"])
    for image, part in enumerate(tokens.split()):
        for grain, name in enumerate(("coarse", "fine")):
            of_grain = part.grain == grain
            for ours, kind, pad in ((part.content, "content", 1024), (part.position, "position", (256, 1024)[grain])):
                theirs = arrays[f"full/{order}/{name}_{kind}"][image]
                assert torch.equal(ours[of_grain][1:], theirs[theirs != pad])


@pytest.mark.parametrize("num_grains", [1, 2, 3])
def test_sequences_hold_every_code_once(num_grains):
    net = model(num_grains=num_grains)
    codes, grains = images(net, 5)
    tokens = net.sequences(codes, grains)
    lengths = (4**grains).flatten(1).sum(1) + 2 * num_grains
    assert tokens.cu_seqlens.diff().tolist() == lengths.tolist()
    assert tokens.max_length >= lengths.max()
    assert torch.equal(tokens.index(), torch.cat([torch.arange(n) for n in lengths.tolist()]))
    for part, map_ in zip(tokens.split(), grains, strict=True):
        for g in range(num_grains):
            places = part.position[(part.grain == g) & (part.position < net.config.positions[g].size)]
            cells = F.interpolate(map_[None, None].float(), scale_factor=2**g)[0, 0].flatten() == g
            assert torch.equal(places.sort().values, cells.nonzero()[:, 0])


# ---- packed training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_grains", "threads"), [(2, 1), (2, 2), (3, 1)])
@torch.no_grad()
def test_a_sequence_yields_the_same_bits_alone_and_together(num_grains, threads):
    # Wide enough for a matrix product to sum in another order where it has few rows.
    net = model(num_grains=num_grains, dim=128, num_classes=3, class_dropout=0.1)
    codes, grains = images(net, 6)
    labels = torch.tensor([0, 1, 2, -1, 0, 1])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tokens = net.sequences(codes, grains, labels)
        together = [logits.split(tokens.cu_seqlens.diff().tolist()) for logits in net(tokens)]
        for i in range(6):
            alone = net(net.sequences(codes[i : i + 1], grains[i : i + 1], labels[i : i + 1]))
            for one, among in zip(alone, together, strict=True):
                assert torch.equal(one, among[i])
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_a_sequence_yields_the_same_in_training():
    """Where they are computed together: the same to rounding."""
    net = model(num_grains=3, dim=128, num_classes=3, class_dropout=0.1, dropout=0.0)
    tokens = net.sequences(*images(net, 6), torch.tensor([0, 1, 2, -1, 0, 1]))
    alone = net(tokens)
    for one, among in zip(alone, net.train()(tokens), strict=True):
        torch.testing.assert_close(among, one, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_token_sees_a_later_one():
    net = model()
    codes, grains = images(net, 3)
    tokens = net.sequences(codes, grains)
    t = int(tokens.cu_seqlens[2]) + 4
    changed = GrainSequences(tokens.content.clone(), tokens.position, tokens.grain, tokens.cu_seqlens, 40)
    changed.content[t] = (changed.content[t] + 1) % K
    for before, after in zip(net(tokens), net(changed), strict=True):
        assert torch.equal(before[:t], after[:t])
        assert not torch.equal(before[t:], after[t:])


@torch.no_grad()
def test_the_content_depends_on_where_it_goes():
    net = model()
    codes, grains = images(net, 3)
    tokens = net.sequences(codes, grains)
    t = int(tokens.cu_seqlens[2]) + 2
    changed = GrainSequences(tokens.content, tokens.position.clone(), tokens.grain, tokens.cu_seqlens, 40)
    changed.position[t] = net.config.positions[0].eos
    (position, content), (other_position, other_content) = net(tokens), net(changed)
    assert torch.equal(position[t - 1], other_position[t - 1])
    assert not torch.equal(content[t - 1], other_content[t - 1])


@torch.no_grad()
def test_the_packed_path_of_a_gpu_computes_the_same():
    net = model(num_grains=3)
    tokens = net.sequences(*images(net, 5))
    packed = net._logits(tokens, PackedAttention(tokens.cu_seqlens, tokens.max_length))
    for one, other in zip(packed, net(tokens), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_grains", [2, 3])
def test_the_loss_counts_every_grains_positions_alike(num_grains):
    net = model(num_grains=num_grains, dropout=0.0)
    codes, grains = images(net, 5)
    got = net.training_step({"codes": codes, "grains": grains})
    tokens = net.sequences(codes, grains)
    position, content = net(tokens)
    of_content, of_grain = [], [[] for _ in range(num_grains)]
    for start, end in zip(tokens.cu_seqlens[:-1].tolist(), tokens.cu_seqlens[1:].tolist(), strict=True):
        for t in range(start, end - 1):
            of_content.append(-content[t].log_softmax(-1)[tokens.content[t + 1]])
            of_grain[tokens.grain[t + 1]].append(-position[t].log_softmax(-1)[tokens.position[t + 1]])
    expected = torch.stack([torch.stack(losses).mean() for losses in of_grain]).mean()
    torch.testing.assert_close(got["position"], expected.detach())
    torch.testing.assert_close(got["loss"], torch.stack(of_content).mean() + expected)
    assert got["loss"].requires_grad and not got["content"].requires_grad
    got["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_training_drops_labels_at_times():
    net = model(num_classes=3, class_dropout=0.5, dropout=0.0)
    codes, grains = images(net, 4)
    batch = {"codes": codes, "grains": grains, "label": torch.tensor([0, 1, 2, 0])}
    losses = lambda: {float(net.training_step(batch)["content"]) for _ in range(8)}
    assert len(losses()) == 1
    net.train()
    assert len(losses()) > 1


# ---- configuration and arguments -------------------------------------------------------------------------------------


def test_the_configuration_goes_through_json_and_back():
    config = DQTransformerConfig(grid=(8, 8), num_grains=3, num_classes=2)
    assert DQTransformerConfig(**asdict(config) | {"grid": [8, 8]}) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(grid=(3, 4)), "num_grains: .* divisor of the grid"),
        (dict(grid=(4,)), "grid: expected two"),
        (dict(order="raster"), "order: expected 'row' or 'region', got 'raster'"),
        (dict(max_length=16), "max_length: expected at least 36"),
        (dict(num_classes=0), "num_classes: expected at least 1"),
        (dict(class_dropout=2.0), "class_dropout: expected a share"),
        (dict(codebook_size=0), "codebook_size: expected at least 1"),
    ],
)
def test_wrong_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DQTransformerConfig(**dict(grid=(4, 8)) | options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(codes=torch.zeros(2, 8, 4, dtype=torch.int64)), ValueError, "codes.*: expected shape"),
        (dict(codes=torch.zeros(2, 4, 8)), TypeError, "codes.*: expected an int64"),
        (dict(codes=torch.full((2, 4, 8), K)), ValueError, "codes.*: expected values in 0..10, got 11..11"),
        (dict(grains=torch.full((2, 2, 4), 2)), ValueError, "grains.*: expected values in 0..1, got 2..2"),
        (dict(grains=torch.zeros(2, 4, 8, dtype=torch.int64)), ValueError, "grains.*: expected shape"),
        (dict(label=None), ValueError, "label.*: missing"),
        (dict(label=torch.tensor([0, 3])), ValueError, "labels: expected values in 0..2"),
        (dict(label=torch.tensor([0, -1])), ValueError, "labels: expected values in 0..2 .the model knows no sample"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(change, error, message):
    net = model(num_classes=3)
    codes, grains = images(net, 2)
    with pytest.raises(error, match=message):
        net.training_step({"codes": codes, "grains": grains, "label": torch.tensor([0, 1])} | change)

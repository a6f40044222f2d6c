"""Sampling from a DQ-Transformer: every image is covered, and the cache changes nothing of what the model says."""

import pytest
import torch
from torch import Tensor

import vqfast
from vqfast.models.dq_sampling import DrawnTokens, draw_tokens
from vqfast.models.dq_transformer import DQTransformer, DQTransformerConfig
from vqfast.models.grain_sequences import GrainSequences
from vqfast.nn.sampling_filters import DrawOptions

K = 11
LIKELIEST = DrawOptions(top_k=1)


def model(**options) -> DQTransformer:
    """A network away from its start, so that sequences vary in length and in what they hold."""
    torch.manual_seed(0)
    sizes = dict(codebook_size=K, grid=(4, 8), dim=16, heads=2, position_depth=1, content_depth=2)
    net = DQTransformer(DQTransformerConfig(**sizes | options))
    for name, p in net.named_parameters():
        if "norm" not in name and p.ndim == 2:
            torch.nn.init.normal_(p, std=0.5)
    return net.eval()


def drawn(net: DQTransformer, starts: list[int], options: DrawOptions = LIKELIEST, **more) -> DrawnTokens:
    return draw_tokens(net, torch.tensor(starts), None, options, options, **more)


def sequences(tokens: DrawnTokens) -> GrainSequences:
    """The drawn tokens packed, without what is behind an image's end."""
    eos = (tokens.grain == tokens.config.num_grains - 1) & (tokens.position == tokens.eos[-1])
    lengths = eos.int().argmax(1) + 1
    real = torch.arange(tokens.position.shape[1]) < lengths[:, None]
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    return GrainSequences(
        tokens.content[real], tokens.position[real], tokens.grain[real], cu_seqlens, int(lengths.max())
    )


def allowed_positions(part: GrainSequences, t: int, config: DQTransformerConfig) -> list[int]:
    """Positions that may follow token t of a sequence, by the rules, one by one; [] where a start is due."""
    grain, vocabulary = int(part.grain[t]), config.positions[int(part.grain[t])]
    if part.position[t] == vocabulary.eos:
        return []
    owner: dict[int, int] = {}
    used = set()
    for place, g in zip(part.position[: t + 1].tolist(), part.grain[: t + 1].tolist(), strict=True):
        if place < config.positions[g].size:
            width = config.cells[1] * 2**g
            owner[place // width // 2**g * config.cells[1] + place % width // 2**g] = g
            used |= {place} if g == grain else set()
    width = config.cells[1] * 2**grain
    cell_of = [p // width // 2**grain * config.cells[1] + p % width // 2**grain for p in range(vocabulary.size)]
    free = [p for p in range(vocabulary.size) if p not in used and owner.get(cell_of[p], grain) == grain]
    last = grain == config.num_grains - 1
    unfinished = any(last or cell_of[p] in owner for p in free)
    return free + ([] if unfinished else [vocabulary.eos])


@pytest.mark.parametrize("num_grains", [1, 2, 3])
@pytest.mark.parametrize("derive_finest", [False, True])
@vqfast.checked()  # unpack then refuses a code that is missing, covered twice or out of its cell
def test_every_image_is_covered_once_by_construction(num_grains, derive_finest):
    net = model(num_grains=num_grains, num_classes=2, class_dropout=0.1)
    codes, grains = net.sample(24, derive_finest=derive_finest, batch_size=10)
    assert codes.shape == (24, 4, 8) and grains.shape == (24, *net.config.cells)
    assert 0 <= codes.min() and codes.max() < K
    assert set(grains.unique().tolist()) <= set(range(num_grains))
    for g in range(num_grains):
        edge = net.config.cell // 2**g
        squares = codes.unfold(1, edge, edge).unfold(2, edge, edge).flatten(3)
        own = (grains == g).repeat_interleave(2**g, 1).repeat_interleave(2**g, 2)
        assert (squares == squares[..., :1])[own].all(), "a coarse code is repeated over what it covers"


@pytest.mark.parametrize("num_grains", [2, 3])
@torch.no_grad()
def test_likeliest_tokens_drawn_with_a_cache_are_those_of_the_whole_sequence(num_grains):
    net = model(num_grains=num_grains, num_classes=4)
    tokens = sequences(drawn(net, [0, 1, 2, 3]))
    assert len(tokens.cu_seqlens.diff().unique()) > 1, "sequences of different lengths"
    for part in tokens.split():
        position, content = net(part)
        for t in range(len(part.content) - 1):
            successor = part.position[t + 1]
            allowed = allowed_positions(part, t, net.config)
            if allowed:
                assert successor == allowed[int(position[t, allowed].argmax())]
            if successor < net.config.positions[int(part.grain[t + 1])].size:
                assert part.content[t + 1] == content[t, :K].argmax()


def test_an_image_is_drawn_alike_alone_and_among_longer_ones():
    net = model(num_classes=4)
    together = drawn(net, [0, 1, 2, 3])
    for i in range(4):
        alone = sequences(drawn(net, [i]))
        part = list(sequences(together).split())[i]
        assert torch.equal(part.content, alone.content) and torch.equal(part.position, alone.position)


@torch.no_grad()
def test_tokens_are_drawn_from_the_model():
    """One cell of 2 x 2: one coarse code, or four fine ones in any order."""
    net, n = model(grid=(2, 2), codebook_size=3), 6000
    tokens = drawn(net, [0] * n, DrawOptions(), generator=torch.Generator().manual_seed(0))

    def share_is(share: Tensor, p: Tensor) -> None:
        assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()

    def logits(*of: Tensor) -> tuple[Tensor, Tensor]:
        """What follows the first tokens of these images, which are all alike."""
        content, position, grain = (values[0] for values in of)
        return net(GrainSequences(content, position, grain, torch.tensor([0, len(content)]).int(), len(content)))

    drawn_tokens = (tokens.content, tokens.position, tokens.grain)
    vocabulary = net.config.positions[0]
    p = logits(*(values[:, :1] for values in drawn_tokens))[0][0][[0, vocabulary.eos]].softmax(-1)
    coarse = tokens.position[:, 1] == 0
    assert set(tokens.position[:, 1].unique().tolist()) == {0, vocabulary.eos}
    share_is(coarse.float().mean(), p[0])
    # The content stack knows the position that was drawn.
    codes = logits(*(values[coarse, :2] for values in drawn_tokens))[1][0, :3].softmax(-1)
    share_is(tokens.content[coarse, 1].bincount(minlength=3) / n, codes * p[0])
    # The first fine position after both kinds of start: start, end, start, then one of four.
    opened = [values[~coarse, :3] for values in drawn_tokens]
    places = logits(*opened)[0][2, :4].softmax(-1)
    share_is(tokens.position[~coarse, 3].bincount(minlength=4) / n, places * p[1])


@pytest.mark.parametrize("order", ["row", "region"])
def test_derived_positions_come_in_the_order_of_training(order):
    net = model(order=order, num_classes=4)
    tokens = drawn(net, [0, 1, 2, 3], DrawOptions(), derive_finest=True)
    codes, grains = tokens.images()
    expected = net.sequences(codes, grains, torch.arange(4))
    finest = expected.grain == 1
    got = sequences(tokens)
    assert torch.equal(got.cu_seqlens, expected.cu_seqlens)
    assert torch.equal(got.position[finest], expected.position[finest])
    assert torch.equal(got.content[finest], expected.content[finest])


def test_guidance_is_of_positions_and_contents():
    net = model(num_classes=4, class_dropout=0.1)
    scale, none = 3.0, torch.tensor([4])
    tokens = sequences(draw_tokens(net, torch.tensor([2]), none, LIKELIEST, LIKELIEST, guidance_scale=scale))
    without = {"content": tokens.content.clone(), "position": tokens.position.clone()}
    starts = torch.tensor([v.sos for v in net.config.positions])[tokens.grain] <= tokens.position
    for values in without.values():
        values[starts] += 2  # the start of no class, instead of class 2
    with torch.no_grad():
        conditional = net(tokens)
        unconditional = net(GrainSequences(**vars(tokens) | without))
    position, content = (u + scale * (c - u) for c, u in zip(conditional, unconditional, strict=True))
    for t in range(len(tokens.content) - 1):
        allowed = allowed_positions(tokens, t, net.config)
        if allowed:
            assert tokens.position[t + 1] == allowed[int(position[t, allowed].argmax())]
        if tokens.content[t + 1] < K:
            assert tokens.content[t + 1] == content[t, :K].argmax()
    plain = sequences(drawn(net, [2]))
    assert not torch.equal(plain.position, tokens.position) or not torch.equal(plain.content, tokens.content)


def test_it_learns_where_codes_are_and_what_they_are():
    torch.manual_seed(0)
    net = DQTransformer(
        DQTransformerConfig(
            codebook_size=K, grid=(4, 4), dim=32, heads=2, position_depth=1, content_depth=1, dropout=0.0, num_classes=2
        )
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    grains = torch.tensor([[[0, 1], [0, 0]], [[1, 0], [0, 1]]])
    codes = torch.randint(K, (2, 4, 4))
    batch = {"codes": codes, "grains": grains, "label": torch.arange(2)}
    for _ in range(80):
        optimizer.zero_grad()
        net.training_step(batch)["loss"].backward()
        optimizer.step()
    got_codes, got_grains = net.sample(2, torch.arange(2), top_k=1, position_top_k=1)
    assert torch.equal(got_grains, grains)
    again = net.sequences(got_codes, got_grains, torch.arange(2))
    assert torch.equal(again.content, net.sequences(codes, grains, torch.arange(2)).content)


def test_the_same_seed_draws_the_same_and_the_mode_stays():
    net = model().train()
    draw = lambda seed: net.sample(3, generator=torch.Generator().manual_seed(seed))
    assert all(torch.equal(a, b) for a, b in zip(draw(1), draw(1), strict=True))
    assert not torch.equal(draw(1)[0], draw(2)[0])
    assert net.training and net.position_stack.blocks[0].training


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (dict(), dict(n=0), "n: expected a whole number, at least 1, got 0"),
        (dict(), dict(n=1, labels=0), "labels: expected None"),
        (dict(num_classes=3), dict(n=2), "labels: missing"),
        (dict(num_classes=3), dict(n=2, labels=0, guidance_scale=2.0), "guidance_scale: expected 1"),
        (dict(), dict(n=2, position_top_k=0), "position_top_k: expected a whole number"),
        (dict(), dict(n=2, temperature=0), "temperature: expected a number above 0"),
    ],
)
def test_a_sample_that_cannot_be_drawn_is_refused(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**config).sample(**arguments)

"""Sampling with a cache of keys and values against the released recomputation: `python -m bench.generation`.

The released DQ-Transformer keeps nothing between steps: it runs the position stack over the whole prefix to draw a
position, then both stacks to draw the content there. Both ways here use one network, the same masks and draws, and
must draw the same tokens; they differ in the network's calls alone. Half of the cells are fine: on 16 x 16 of them
128 coarse codes and 512 fine ones. Exit code 1 if the tokens differ.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.device import others_share
from vqfast.models.dq_sampling import DrawnTokens, draw_tokens
from vqfast.models.dq_transformer import DQTransformer, DQTransformerConfig
from vqfast.nn.sampling_filters import DrawOptions, draw

LIKELIEST = DrawOptions(top_k=1)


class EndAfter(nn.Module):
    """A position head whose coarse segment ends after a given number of codes: untrained, it knows no length."""

    def __init__(self, head: nn.Module, codes: int, eos: int):
        super().__init__()
        self.head, self.codes, self.eos, self.drawn = head, codes, eos, 0

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        if self.drawn <= self.codes:
            logits[..., self.eos] = 1e4 if self.drawn == self.codes else -1e4
        self.drawn += 1
        return logits


def network(cells: int, dim: int, heads: int, position_depth: int, content_depth: int) -> DQTransformer:
    torch.manual_seed(0)
    config = DQTransformerConfig(
        grid=(2 * cells, 2 * cells),
        dim=dim,
        heads=heads,
        position_depth=position_depth,
        content_depth=content_depth,
    )
    net = DQTransformer(config).eval()
    for p in net.parameters():  # away from its start, which hardly tells tokens apart
        nn.init.normal_(p, std=0.08) if p.ndim == 2 else None
    net.position_head = EndAfter(net.position_head, cells**2 // 2, config.positions[0].eos)
    return net


def cached(net: DQTransformer, batch: int, **options) -> DrawnTokens:
    return draw_tokens(net, torch.zeros(batch, dtype=torch.int64), None, LIKELIEST, LIKELIEST, **options)


@torch.no_grad()
def recomputed(net: DQTransformer, batch: int) -> DrawnTokens:
    """As the released code calls the network; the padding amid its sequences, which costs it more, is left out."""
    tokens = DrawnTokens(net.config, torch.zeros(batch, dtype=torch.int64))
    K, last = net.config.codebook_size, net.config.num_grains - 1

    def position_hidden() -> Tensor:
        n = tokens.length
        seen = (values[:, :n] for values in (tokens.content, tokens.position, tokens.grain))
        return net.position_stack(net.embed(*seen, torch.arange(n)))

    while not tokens.complete().all():
        _, last_position, last_grain = tokens.newest()
        opens = (last_position == tokens.eos[last_grain]) & (last_grain < last)
        grain = last_grain + opens
        logits = net.position_head(position_hidden()[:, -1])
        place = draw(logits.masked_fill(~tokens.allowed(grain), -torch.inf), LIKELIEST)
        place = torch.where(opens, tokens.sos[grain], place)

        next_position = torch.cat([tokens.position[:, 1 : tokens.length], place[:, None]], dim=1)
        next_grain = torch.cat([tokens.grain[:, 1 : tokens.length], grain[:, None]], dim=1)
        hidden = net.content_stack(position_hidden() + net.embed_position(next_position, next_grain))
        code = draw(net.content_head(hidden[:, -1])[:, :K], LIKELIEST)
        special = place - tokens.size[grain]
        tokens.append(torch.where(special >= 0, K + special, code), place, grain)
    return tokens


@dataclass(frozen=True)
class Timed:
    """Medians of the rounds; processor time, of all threads, is what other programs disturb less."""

    wall_s: float
    processor_s: float
    tokens: DrawnTokens


def timed(net: DQTransformer, call: Callable[[], DrawnTokens], rounds: int) -> Timed:
    wall, processor = [], []
    for _ in range(rounds):
        net.position_head.drawn = 0
        start, busy = time.perf_counter(), time.process_time()
        tokens = call()
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - busy)
    return Timed(statistics.median(wall), statistics.median(processor), tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """0 if both ways drew the same tokens, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.generation", description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=16, help="a side")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--position-depth", type=int, default=3)
    parser.add_argument("--content-depth", type=int, default=9)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="of the cached way; recomputation is timed once")
    args = parser.parse_args(argv)
    net = network(args.cells, args.dim, args.heads, args.position_depth, args.content_depth)
    busy = others_share()
    ways = {
        "recomputing every prefix": timed(net, lambda: recomputed(net, args.batch), 1),
        "cache of keys and values": timed(net, lambda: cached(net, args.batch), args.rounds),
        "and derived fine positions": timed(net, lambda: cached(net, args.batch, derive_finest=True), args.rounds),
    }
    theirs, ours, _ = ways.values()
    n = theirs.tokens.length
    same = all(
        torch.equal(getattr(ours.tokens, name)[:, :n], getattr(theirs.tokens, name)[:, :n])
        for name in ("content", "position", "grain")
    )
    tokens = ours.tokens
    codes = int((tokens.position < tokens.size[tokens.grain]).logical_and(tokens.grain >= 0).sum()) // args.batch
    print(
        f"DQ-Transformer of width {args.dim}, {args.position_depth} + {args.content_depth} blocks, batch {args.batch}, "
        f"{torch.get_num_threads()} threads, {busy:.0%} of the machine busy before: {codes} codes an image"
    )
    for name, way in ways.items():
        print(
            f"  {name:<28}{way.wall_s:8.2f} s, {theirs.wall_s / way.wall_s:5.1f} times as fast; "
            f"processor {way.processor_s:8.2f} s, {theirs.processor_s / way.processor_s:5.1f} times"
        )
    print(f"  tokens drawn: {'the same' if same else 'NOT the same'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

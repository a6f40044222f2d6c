"""Causal attention: nobody sees a later token or another sequence, and a cache changes nothing."""

import pytest
import torch

from vqfast.nn.attention import CausalTransformer, KVCache, PackedAttention, attend_causal

LENGTHS = (5, 1, 9, 4)


def stack(dropout: float = 0.0) -> CausalTransformer:
    torch.manual_seed(0)
    return CausalTransformer(dim=24, depth=3, heads=4, dropout=dropout).eval()


def packing(lengths=LENGTHS, device="cpu") -> PackedAttention:
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    return PackedAttention(cu_seqlens, max(lengths) + 2)


def test_attention_is_that_of_the_formula():
    q, k, v = torch.randn(3, 2, 6, 4, 8, dtype=torch.float64)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(attend_causal(q, k, v), torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v))


def test_no_token_sees_a_later_one():
    net, x = stack(), torch.randn(2, 7, 24)
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = net(x), net(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amin(dim=(0, 2)).min() > 1e-6


def test_packed_sequences_are_those_alone():
    net, x = stack(), torch.randn(sum(LENGTHS), 24, requires_grad=True)
    weight = torch.randn_like(x)
    packed = net(x, packing())
    (grad,) = torch.autograd.grad((packed * weight).sum(), x)
    parts = x.detach().split(LENGTHS)
    alone = torch.cat([net(part) for part in parts])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
    alone_x = x.detach().clone().requires_grad_()
    loss = (torch.cat([net(part) for part in alone_x.split(LENGTHS)]) * weight).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(loss, alone_x)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_sequences_on_cuda(dtype):
    q, k, v = torch.randn(3, sum(LENGTHS), 4, 16, device="cuda", dtype=dtype)
    packed = packing(device="cuda")(q, k, v)
    parts = zip(*(x.float().split(LENGTHS) for x in (q, k, v)), strict=True)
    alone = torch.cat([attend_causal(*part) for part in parts])
    torch.testing.assert_close(packed.float(), alone, rtol=2e-2, atol=2e-2)
    first = packing(LENGTHS[:1], device="cuda")(*(x[: LENGTHS[0]] for x in (q, k, v)))
    torch.testing.assert_close(first, packed[: LENGTHS[0]], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_a_token_at_a_time_is_the_whole_at_once(batch):
    net, x = stack(), torch.randn(batch, 11, 24)
    cache = KVCache(net, batch, capacity=12)
    steps = torch.stack([net.step(token, cache) for token in x.unbind(1)], dim=1)
    torch.testing.assert_close(steps, net(x), rtol=1e-5, atol=1e-6)
    assert cache.length == 11


def test_a_full_cache_takes_no_more():
    net = stack()
    cache = KVCache(net, 1, capacity=1)
    with torch.no_grad():
        net.step(torch.randn(1, 24), cache)
        with pytest.raises(IndexError):
            net.step(torch.randn(1, 24), cache)


def test_dropout_acts_in_training_alone():
    net, x = stack(dropout=0.5), torch.randn(2, 4, 24)
    assert torch.equal(net(x), net(x))
    net.train()
    assert not torch.equal(net(x), net(x))


@pytest.mark.parametrize(("sizes", "message"), [((10, 1, 4), "dim: expected a multiple of heads = 4, got 10"),
                                                ((8, 0, 4), "depth: expected at least one")])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        CausalTransformer(*sizes)

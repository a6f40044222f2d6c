"""What the blocks of image autoencoders promise: shapes, attention over all positions, alignment."""

import pytest
import torch
import torch.nn.functional as F

from vqfast.nn.blocks import AttentionBlock, Downsample, ResidualBlock, Upsample, group_norm, levels, middle


@pytest.mark.parametrize("out_channels", [None, 64])
def test_a_residual_block_keeps_the_resolution(out_channels):
    block = ResidualBlock(32, out_channels)
    assert block(torch.randn(2, 32, 5, 3)).shape == (2, out_channels or 32, 5, 3)


def test_attention_is_softmax_attention_over_all_positions():
    torch.manual_seed(0)
    block, x = AttentionBlock(32).double(), torch.randn(2, 32, 3, 5, dtype=torch.float64)
    q, k, v = block.qkv(F.group_norm(x, 32, block.norm.weight, block.norm.bias, 1e-6)).flatten(2).chunk(3, dim=1)
    weights = torch.einsum("bci,bcj->bij", q, k).div(32**0.5).softmax(-1)
    attended = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
    torch.testing.assert_close(block(x), x + block.out(attended))


def test_halving_and_doubling_keep_pixels_in_place():
    down, up = Downsample(32), Upsample(32)
    for conv in (down.conv, up.conv):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    x = torch.randn(1, 32, 6, 4)
    # The middle tap of the halving lies on the odd pixels: the window starts at the even ones.
    torch.testing.assert_close(down(x), x[..., 1::2, 1::2])
    torch.testing.assert_close(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_groups_of_several_channels_keep_the_image_s_mean():
    x, brighter = torch.randn(1, 32, 5, 5), 10 * torch.arange(32.0).view(1, 32, 1, 1)
    torch.testing.assert_close(group_norm(32)(x + brighter), group_norm(32)(x), rtol=0, atol=1e-3)
    means = group_norm(32, groups=8)(x + brighter).mean((2, 3))
    assert means.view(8, 4).diff(dim=1).min() > 0.5, "within a group, the brighter channel stays the brighter"


def test_every_block_has_the_groups_asked_for():
    for blocks in (levels((32, 64), 2, (True,), 0.0, groups=4), middle(64, True, 0.0, groups=4)):
        norms = [module for module in blocks.modules() if isinstance(module, torch.nn.GroupNorm)]
        assert norms and {norm.num_groups for norm in norms} == {4}


def test_channels_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="channels: expected a multiple of 32.*got 48"):
        ResidualBlock(48)

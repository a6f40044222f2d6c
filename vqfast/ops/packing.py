"""Variable-length codes: images whose cells have different grains, as packed sequences and back.

A grain map (B, Hc, Wc) gives each cell of the coarse grid its grain, 0 the coarsest of G; a cell of grain g holds
2^g x 2^g codes. The fine grid is Hf = 2^(G-1) Hc by Wf = 2^(G-1) Wc. kernels/pack/README.md draws the order of tokens.
Checked mode is `with vqfast.checked()`, or VQFAST_CHECK=1 in the environment.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqfast.ops.checks import FLOATS, check_device, check_float, check_int64, check_whole, describe
from vqfast.ops.transforms import Function, once_differentiable, wants_gradient

_pack = torch.ops.vqfast.pack.default
_unpack = torch.ops.vqfast.unpack.default
_unpack_backward = torch.ops.vqfast.unpack_backward.default
_position_mask = torch.ops.vqfast.position_mask.default
_grain_entropy = torch.ops.vqfast.grain_entropy.default

ORDERS = ("row", "region")
MOST_GRAINS = 8
MOST_BINS = 1024
_VALUES = frozenset((*FLOATS, torch.int64))


class Packed(NamedTuple):
    """The codes of a batch, image after image, in each image grain after grain, the coarsest first.

    values: (T,) codes or (T, D) features; zero in the unused tail.
    cu_seqlens: (B + 1,) int32; the tokens of image b are cu_seqlens[b] to cu_seqlens[b + 1] - 1.
    positions: (T,) int64, raster index on the grid of the token's grain; -1 in the tail.
    grain_ids: (T,) int64; -1 in the tail.
    """

    values: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    grain_ids: Tensor


def check_order(order: str) -> None:
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")


def check_num_grains(num_grains: int) -> None:
    check_whole("num_grains", num_grains, 1, MOST_GRAINS)


def check_cells(cells: Any) -> tuple[int, int]:
    """(Hc, Wc), both at least 1."""
    if not isinstance(cells, tuple | list) or len(cells) != 2:
        raise TypeError(f"cells: expected two whole numbers (Hc, Wc), got {describe(cells)}")
    for size in cells:
        check_whole("cells", size, 1)
    return cells[0], cells[1]


def check_packed(packed: Any) -> None:
    """The four parts of Packed; what each is, is looked at elsewhere."""
    if not isinstance(packed, tuple) or len(packed) != len(Packed._fields):
        raise TypeError(f"packed: expected what pack returns, {', '.join(Packed._fields)}, got {describe(packed)}")


def check_grains(grains: Any) -> None:
    """(B, Hc, Wc) int64, at least one cell."""
    if not isinstance(grains, Tensor) or grains.dtype != torch.int64:
        raise TypeError(f"grains: expected an int64 tensor (B, Hc, Wc), got {describe(grains)}")
    if grains.ndim != 3 or grains.shape[1] == 0 or grains.shape[2] == 0:
        raise ValueError(f"grains: expected shape (B, Hc, Wc) with at least one cell, got {describe(grains)}")


def _check_values(values: Any, ndims: tuple[int, int], layout: str) -> None:
    if not isinstance(values, Tensor) or values.dtype not in _VALUES:
        raise TypeError(
            f"values: expected an int64, float64, float32, bfloat16 or float16 tensor, got {describe(values)}"
        )
    if values.ndim not in ndims:
        raise ValueError(f"values: expected shape {layout}, got {describe(values)}")


def grains_of_grid(shape: torch.Size, grains: Tensor, name: str = "values") -> int:
    """G of a (B, Hf, Wf, ...) grid over (B, Hc, Wc) cells.

    Raises:
        TypeError, ValueError: as `check_grains`.
        ValueError: Hf / Hc and Wf / Wc are not the same power of two, or the batches differ.
    """
    check_grains(grains)
    images, Hc, Wc = grains.shape
    B, Hf, Wf = shape[:3]
    factor = Hf // Hc
    if images != B or factor < 1 or factor & (factor - 1) or Hf != Hc * factor or Wf != Wc * factor:
        raise ValueError(
            f"{name}: expected a grid of {images} images, 2^(G-1) times the {Hc} x {Wc} cells of grains on "
            f"each side, got {B} images of {Hf} x {Wf}"
        )
    check_num_grains(factor.bit_length())
    return factor.bit_length()


class _PackFeatures(Function):
    @staticmethod
    def forward(values, grains, region, capacity):
        return _pack(values, grains, region, capacity)

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, grains, *_ = inputs
        ctx.save_for_backward(grains, *output[1:])
        ctx.num_grains = (values.shape[1] // grains.shape[1]).bit_length()
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        grains, *layout = ctx.saved_tensors
        return _unpack(grad, *layout, grains, ctx.num_grains, False), None, None, None


class _UnpackFeatures(Function):
    @staticmethod
    def forward(values, cu_seqlens, positions, grain_ids, grains, num_grains):
        return _unpack(values, cu_seqlens, positions, grain_ids, grains, num_grains, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *layout, ctx.num_grains = inputs
        ctx.save_for_backward(*layout)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _unpack_backward(grad, *ctx.saved_tensors, ctx.num_grains), None, None, None, None, None


def pack(values: Tensor, grains: Tensor, *, order: str = "row", capacity: int | None = None) -> Packed:
    """The codes or features of a batch as one sequence an image, each code once (DQ-VAE, arXiv 2305.11718).

    A code coarser than the fine grid takes the value at the top left of what it covers, as the released code does.
    Shapes depend on `capacity` alone, never on what the grain map says: no device sync, and a CUDA graph may hold it.

    Args:
        values: (B, Hf, Wf) codes or (B, Hf, Wf, D) features; int64 or any float dtype, any strides. Channel-first
            features are read in place: pass x.permute(0, 2, 3, 1).
        grains: (B, Hc, Wc) int64, 0 the coarsest. Hf / Hc = Wf / Wc = 2^(G-1) gives the number of grains G.
        order: of the codes of one grain. "row": raster order over the image on that grain's grid. "region": cell by
            cell in raster order, raster order in a cell.
        capacity: T, the length of the result; default B * Hf * Wf, the most there can be. Tokens beyond a smaller one
            are dropped, and cu_seqlens ends at T; in checked mode that is an error.

    Returns:
        Packed. `values` is differentiable: its gradient goes to the top left of what each code covers, zero elsewhere.

    Raises:
        TypeError: dtypes other than these, a capacity that is no int.
        ValueError: shapes or devices that do not fit, an unknown order, a negative capacity, a grain out of range (on
            CUDA in checked mode only; it is clamped without), naming image and cell.
    """
    _check_values(values, (3, 4), "(B, Hf, Wf) or (B, Hf, Wf, D)")
    grains_of_grid(values.shape, grains)
    check_order(order)
    check_device("values", values, grains=grains)
    if capacity is None:
        B, Hf, Wf = values.shape[:3]
        capacity = B * Hf * Wf
    else:
        check_whole("capacity", capacity, 0)
    if wants_gradient(values):
        return Packed(*_PackFeatures.apply(values, grains, order == "region", capacity))
    return Packed(*_pack(values, grains, order == "region", capacity))


def unpack(packed: Packed, grains: Tensor, *, num_grains: int = 2) -> Tensor:
    """Packed codes or features on the fine grid, each repeated over the square that it covers: the inverse of `pack`.

    Tokens are put where their positions say, so those of an image may come in any order, as a model has drawn them. A
    token whose cell has another grain in `grains` is left out; of two at one place the later counts; where there is
    none the grid is zero. In checked mode each of these is an error.

    Args:
        packed: T tokens; values (T,) or (T, D), int64 or any float dtype.
        grains: (B, Hc, Wc) int64, 0 the coarsest.
        num_grains: G; the fine grid is 2^(G-1) times the cells on each side.

    Returns:
        (B, Hf, Wf) or (B, Hf, Wf, D). Differentiable: the gradient of a value is the sum over what it covers.

    Raises:
        TypeError: dtypes other than these, or not the four parts of Packed.
        ValueError: shapes or devices that do not fit; more tokens than the fine grid has positions. In checked mode
            a code covered twice or not at all, a position or grain out of range, naming image and cell.
    """
    check_packed(packed)
    values, cu_seqlens, positions, grain_ids = packed
    _check_values(values, (1, 2), "(T,) or (T, D)")
    check_grains(grains)
    check_num_grains(num_grains)
    T, most = values.shape[0], grains.numel() * 4 ** (num_grains - 1)
    check_int64("positions", positions, (T,), "(T,)")
    check_int64("grain_ids", grain_ids, (T,), "(T,)")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected an int32 tensor (B + 1,), got {describe(cu_seqlens)}")
    if cu_seqlens.shape != (grains.shape[0] + 1,):
        raise ValueError(f"cu_seqlens: expected shape (B + 1,) = {(grains.shape[0] + 1,)}, got {describe(cu_seqlens)}")
    if T > most:
        raise ValueError(
            f"packed: expected at most {most} tokens, the positions of {tuple(grains.shape)} cells with "
            f"num_grains = {num_grains}, got {T}"
        )
    check_device("values", values, cu_seqlens=cu_seqlens, positions=positions, grain_ids=grain_ids, grains=grains)
    if wants_gradient(values):
        return _UnpackFeatures.apply(values, cu_seqlens, positions, grain_ids, grains, num_grains)
    return _unpack(values, cu_seqlens, positions, grain_ids, grains, num_grains, True)


def position_mask(
    positions: Tensor,
    grain_ids: Tensor,
    grain: Tensor,
    *,
    cells: tuple[int, int],
    num_grains: int = 2,
    vocab_size: int | None = None,
) -> Tensor:
    """Which positions may come next, for a whole batch: what is sampled under it covers every image exactly once.

    Positions of grain g are 0..N_g - 1, N_g = Hc Wc 4^g, then pad = N_g, eos = N_g + 1 and sos = N_g + 2 (or a class).
    A position may come while it is free: not drawn yet, and in a cell that no other grain has taken. eos may come when
    every cell that has been begun is finished, and at the finest grain only when the image is covered. After eos only
    pad may come. sos never may. (DQ-Transformer, arXiv 2305.11718; its released sampler also forbids the
    last coarse cell, and lets an image end with holes.)

    Args:
        positions: (B, L) int64, everything drawn so far, of all grains; special tokens may be among them.
        grain_ids: (B, L) int64 of each; -1 where there is nothing.
        grain: (B,) int64 in [0, num_grains), the grain of the position that comes next.
        cells: (Hc, Wc).
        num_grains: G.
        vocab_size: V of the mask, default N_{G-1} + 3, at least that.

    Returns:
        (B, V) bool, True where allowed: logits.masked_fill(~mask, -inf).

    Raises:
        TypeError: tensors that are not int64, sizes that are no ints.
        ValueError: shapes, sizes or devices that do not fit; a grain out of range (on CUDA in checked mode only).
    """
    if not isinstance(positions, Tensor) or positions.dtype != torch.int64:
        raise TypeError(f"positions: expected an int64 tensor (B, L), got {describe(positions)}")
    if positions.ndim != 2:
        raise ValueError(f"positions: expected shape (B, L), got {describe(positions)}")
    check_int64("grain_ids", grain_ids, positions.shape, "(B, L)")
    check_int64("grain", grain, positions.shape[:1], "(B,)")
    check_num_grains(num_grains)
    Hc, Wc = check_cells(cells)
    least = Hc * Wc * 4 ** (num_grains - 1) + 3
    vocab_size = least if vocab_size is None else vocab_size
    check_whole("vocab_size", vocab_size, 0)
    if vocab_size < least:
        raise ValueError(f"vocab_size: expected at least {least}, the finest positions and 3 special, got {vocab_size}")
    check_device("positions", positions, grain_ids=grain_ids, grain=grain)
    return _position_mask(positions, grain_ids, grain, Hc, Wc, num_grains, vocab_size)


def grain_entropy(
    images: Tensor,
    patch_size: int,
    *,
    num_bins: int = 32,
    sigma: float = 0.01,
    value_range: tuple[float, float] = (-1.0, 1.0),
) -> Tensor:
    """Entropy of the grey levels of each patch, by a soft histogram: where an image needs fine codes.

    p_j is proportional to the sum over the patch of exp(-((v - bin_j) / sigma)^2 / 2), bins spaced evenly over
    `value_range`, both ends included; the result is -sum_j p_j log p_j in nats. This is the router of the released
    DQ-VAE. Its published thresholds were computed with bins over (0, 1) on images in [-1, 1]; take quantiles of your
    own data instead.

    Args:
        images: (B, C, H, W) float, C = 3 (red, green, blue, weighted 0.2989, 0.587, 0.114) or 1; any strides.
        patch_size: P; H and W are multiples of it.

    Returns:
        (B, H / P, W / P) float32 (float64 for float64 images). Not differentiable.

    Raises:
        TypeError: images that are not float, sizes that are no ints.
        ValueError: shapes that do not divide, other than 1 or 3 channels, num_bins outside 2..1024, sigma not positive.
    """
    check_float("images", images)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected shape (B, 3, H, W) or (B, 1, H, W), got {describe(images)}")
    check_whole("patch_size", patch_size, 1)
    if images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise ValueError(
            f"patch_size: expected a divisor of {images.shape[2]} x {images.shape[3]}, the size of images, "
            f"got {patch_size}"
        )
    check_whole("num_bins", num_bins, 2, MOST_BINS)
    lowest, highest = value_range
    if not sigma > 0 or not highest > lowest:
        raise ValueError(f"expected sigma > 0 and value_range ascending, got sigma={sigma}, value_range={value_range}")
    return _grain_entropy(images.detach(), patch_size, num_bins, float(sigma), float(lowest), float(highest))

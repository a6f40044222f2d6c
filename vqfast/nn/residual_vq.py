"""Residual quantisation: each stage quantises what the stages before it left over."""

import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqfast.nn.layout import channels_last
from vqfast.nn.peer_checkpoints import drop_copies
from vqfast.nn.vector_quantize import VectorQuantize
from vqfast.ops import residual_nearest
from vqfast.ops.checks import check_float, check_indices, check_mask


class ResidualVQ(nn.Module):
    """The sum of one code from each of Q codebooks (Zeghidour et al. 2021, SoundStream, algorithm 1).

    Stage q quantises the residual r_q = r_{q-1} - sg(code_{q-1}), r_1 = x. Every stage passes its gradient to the
    residual, so that of `quantized` reaches x Q times; quant_grad_frac = 1 lets it through once.

    Quantiser dropout draws, in training mode, the last stage of a call uniformly from quantize_dropout_cutoff_index
    .. Q - 1 and leaves out the rest: their index is -1 and their loss 0. The draw is made on the host, without
    a device sync, from torch's CPU generator; torch.compile breaks its graph there. With torch.distributed
    started, rank 0 draws one seed at the first call, and all processes go through the same stages from then on.

    Input of another float dtype than the codebooks is cast to theirs, residuals included, and `quantized` is cast
    back.

    Args:
        dim: D, channels of the input.
        num_quantizers: Q; None where codebook_size is a tuple.
        codebook_size: K of every stage, or a tuple of one K a stage.
        codebook_dim: size of a code; the input is projected to it and the sum back. None for D.
        shared_codebook: one codebook for all stages. Its moving averages take one step a stage, and the codebook
            follows after the last; a dead code is replaced at once.
        quantize_dropout: leave out stages at random in training.
        quantize_dropout_cutoff_index: number of first stages, less one, that are never left out.
        quantize_dropout_multiple_of: the number of stages kept is rounded up to a multiple of this.
        quant_grad_frac: share of a code's gradient that flows on through the residual.
        channel_last: input (B, ..., D) if true, (B, D, ...) if false.
        accept_image_fmap: input (B, D, H, W), indices (B, H, W, Q).
        return_zeros_for_masked_padding: the output where masked is 0 if true, the input if false.
        options: of every stage's VectorQuantize.

    Raises:
        ValueError: a size or share out of range.
        TypeError: an option that VectorQuantize does not have.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        quant_grad_frac: float = 0.0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        return_zeros_for_masked_padding: bool = True,
        **options: Any,
    ):
        super().__init__()
        sizes = _stage_sizes(num_quantizers, codebook_size)
        codebook_dim = dim if codebook_dim is None else codebook_dim
        for name, value in (("dim", dim), ("codebook_dim", codebook_dim)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        heads = options.pop("heads", 1)
        if heads != 1:
            raise ValueError(f"heads: expected 1, a stage has one code, got {heads}")
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError(f"codebook_size: expected one size for all stages of a shared codebook, got {sizes}")
        if not 0 <= quantize_dropout_cutoff_index < len(sizes):
            raise ValueError(
                f"quantize_dropout_cutoff_index: expected 0..{len(sizes) - 1}, got {quantize_dropout_cutoff_index}"
            )
        if quantize_dropout_multiple_of < 1:
            raise ValueError(f"quantize_dropout_multiple_of: expected at least 1, got {quantize_dropout_multiple_of}")
        if not 0 <= quant_grad_frac <= 1:
            raise ValueError(f"quant_grad_frac: expected a number in [0, 1], got {quant_grad_frac}")
        self.dim, self.codebook_dim = dim, codebook_dim
        self.num_quantizers, self.codebook_sizes = len(sizes), sizes
        self.shared_codebook = shared_codebook
        self.quantize_dropout = quantize_dropout and len(sizes) > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.quant_grad_frac = quant_grad_frac
        self.accept_image_fmap = accept_image_fmap
        self.channel_first = accept_image_fmap or not channel_last
        self.has_projections = codebook_dim != dim
        self.project_in: nn.Module = nn.Linear(dim, codebook_dim) if self.has_projections else nn.Identity()
        self.project_out: nn.Module = nn.Linear(codebook_dim, dim) if self.has_projections else nn.Identity()
        own = sizes[:1] if shared_codebook else sizes
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.layers = nn.ModuleList(VectorQuantize(dim=codebook_dim, codebook_size=K, **options) for K in own)
        # A shared codebook is written after the last stage: it must not move between one search and the next.
        self.layers[0].written_by_owner = shared_codebook
        self._seeds = DropoutSeeds()
        self.register_load_state_dict_pre_hook(drop_copies)

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """(Q, K, codebook_dim), or a tuple of (K_q, codebook_dim) where sizes differ."""
        if len(set(self.codebook_sizes)) == 1:
            return self._stacked_codebooks()
        return tuple(stage.codebook for stage in self.layers)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantise, and in training mode let the codebooks follow.

        Args:
            x: (B, ..., D) float, or (B, D, ...) as configured.
            mask: (B, ...) bool, True where a vector counts. Elsewhere indices are -1 and the output 0, and neither
                the losses nor the codebooks see the vector.
            return_all_codes: return each stage's code too.
            sample_codebook_temp: of stochastic sampling, in place of the constructor's.
            freeze_codebook: leave the codebooks as they are in this call.
            rand_quantize_dropout_fixed_seed: the seed of this call's draw of quantiser dropout.
            weights: (B, ...) float, how much each vector counts in the moving averages.

        Returns:
            quantized: shape and dtype of x.
            indices: (B, ..., Q) int64, -1 where left out.
            losses: (Q,).
            codes: (Q, B, ..., codebook_dim), only where asked for.

        Raises:
            ValueError: a shape that does not fit.
            TypeError: an input that is no float tensor, a mask that is not bool.
        """
        check_float("x", x)
        if self.accept_image_fmap and x.ndim != 4:
            raise ValueError(f"x: expected shape (B, {self.dim}, H, W), got {tuple(x.shape)}")
        vectors = residual = channels_last(x, self.dim, self.channel_first)
        if mask is not None:
            check_mask(mask, vectors)
        if self.has_projections:
            if mask is not None:  # padding may hold anything, and zero times that is not always zero
                residual = torch.where(mask[..., None], residual, 0)
            residual = self.project_in(residual.to(self.project_in.weight.dtype))
        residual = residual.to(self.layers[0].codebook.dtype)
        if self._only_codes(residual):
            total, indices = residual_nearest(residual, self._stacked_codebooks(), mask=mask)
            losses = total.new_zeros(self.num_quantizers, dtype=torch.promote_types(total.dtype, torch.float32))
            result = self._output(total, vectors, mask), indices, losses
            return (*result, self._codes(indices)) if return_all_codes else result
        drops = self.training and self.quantize_dropout
        kept = self._kept_stages(rand_quantize_dropout_fixed_seed) if drops else self.num_quantizers

        total, indices, losses = torch.zeros_like(residual), [], []
        call = {"mask": mask, "weights": weights, "sample_codebook_temp": sample_codebook_temp}
        for stage in self._stages()[:kept]:
            code, index, loss = stage(residual, freeze_codebook=freeze_codebook, **call)
            residual = residual - _with_gradient_share(code, self.quant_grad_frac)
            total = total + code
            indices.append(index)
            losses.append(loss)
        for _ in range(kept, self.num_quantizers):
            indices.append(torch.full_like(indices[0], -1))
            losses.append(torch.zeros_like(losses[0]))
        if self._follows(freeze_codebook):
            self.layers[0].update_ema()

        indices = torch.stack(indices, dim=-1)
        result = (self._output(total, vectors, mask), indices, torch.stack(losses))
        return (*result, self._codes(indices)) if return_all_codes else result

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """(B, ..., Q) int64 to each stage's code (Q, B, ..., codebook_dim), zero where the index is -1.

        With quantiser dropout, indices of the first stages only are taken as well.

        Raises:
            TypeError, ValueError: another dtype or shape, or an index of no code.
        """
        check_indices(indices, max(stage.codebook_size for stage in self._stages()), least=-1)
        if indices.ndim < 2:
            raise ValueError(f"indices: expected shape (B, ..., {self.num_quantizers}), got {tuple(indices.shape)}")
        given = indices.shape[-1]
        fewest = 1 if self.quantize_dropout else self.num_quantizers
        if not fewest <= given <= self.num_quantizers:
            stages = f"1..{self.num_quantizers}" if self.quantize_dropout else self.num_quantizers
            raise ValueError(f"indices: expected shape (B, ..., {stages}), got {tuple(indices.shape)}")
        return self._codes(nn.functional.pad(indices, (0, self.num_quantizers - given), value=-1))

    def _codes(self, indices: Tensor) -> Tensor:
        """(B, ..., Q) to (Q, B, ..., codebook_dim)."""
        codes = [
            nn.functional.embedding(index.clamp(min=0), stage.codebook) * (index >= 0)[..., None]
            for stage, index in zip(self._stages(), indices.unbind(-1), strict=True)
        ]
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """(B, ..., Q) int64 to the quantised vectors (B, ..., D): channels last, for images too."""
        return self.project_out(self.get_codes_from_indices(indices).sum(0))

    def _only_codes(self, residual: Tensor) -> bool:
        """Whether nothing is asked of the stages but their codes: no loss, no gradient, no step of a codebook."""
        plain = not any(stage.use_cosine_sim for stage in self.layers) and len(set(self.codebook_sizes)) == 1
        learns = torch.is_grad_enabled() and (residual.requires_grad or self._stages()[0].codebook.requires_grad)
        return plain and not self.training and not learns

    def _stacked_codebooks(self) -> Tensor:
        """(Q, K, codebook_dim); one that all stages share is not copied."""
        if self.shared_codebook:
            codebook = self.layers[0].codebook
            return codebook.expand(self.num_quantizers, *codebook.shape)
        return torch.stack([stage.codebook for stage in self.layers])

    def _stages(self) -> list[VectorQuantize]:
        return list(self.layers) * (self.num_quantizers if self.shared_codebook else 1)

    def _follows(self, freeze_codebook: bool | None) -> bool:
        """Whether it is this call's part to write a shared codebook."""
        layer = self.layers[0]
        frozen = layer.freeze_codebook if freeze_codebook is None else freeze_codebook
        moves = self.training and not frozen and layer.ema_update and not layer.accumulating
        return moves and layer.written_by_owner and not layer.manual_ema_update

    @torch.compiler.disable(reason="quantiser dropout draws the number of stages on the host")
    def _kept_stages(self, seed: int | None) -> int:
        """Number of first stages that this call goes through."""
        draw = random.Random(self._seeds.draw() if seed is None else seed)
        kept = draw.randrange(self.quantize_dropout_cutoff_index, self.num_quantizers) + 1
        multiple = self.quantize_dropout_multiple_of
        return min(-(-kept // multiple) * multiple, self.num_quantizers)

    def extra_repr(self) -> str:
        shared = ", shared_codebook=True" if self.shared_codebook else ""
        dropout = ", quantize_dropout=True" if self.quantize_dropout else ""
        return f"dim={self.dim}, num_quantizers={self.num_quantizers}{shared}{dropout}"

    def _output(self, total: Tensor, vectors: Tensor, mask: Tensor | None) -> Tensor:
        """Sum of codes (B, ..., codebook_dim) to the layout, channels and dtype of the input (B, ..., D)."""
        if self.has_projections:
            total = self.project_out(total)
        total = total.to(vectors.dtype)
        if mask is not None and (self.has_projections or not self.return_zeros_for_masked_padding):
            total = torch.where(mask[..., None], total, 0 if self.return_zeros_for_masked_padding else vectors)
        return total.movedim(-1, 1) if self.channel_first else total


class GroupedResidualVQ(nn.Module):
    """Channels cut into equal groups, a ResidualVQ for each (Yang et al. 2023, HiFi-Codec).

    Quantiser dropout leaves out the same stages in every group.

    Args:
        dim: D, channels of the input, a multiple of groups.
        groups: G.
        channel_last, accept_image_fmap: layout of the input, as in ResidualVQ.
        options: of every group's ResidualVQ.

    Raises:
        ValueError: dim not a multiple of groups, or what ResidualVQ finds wrong.
    """

    def __init__(
        self,
        *,
        dim: int,
        groups: int = 1,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        **options: Any,
    ):
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"groups: expected a divisor of dim = {dim}, got {groups}")
        self.dim, self.groups = dim, groups
        self.accept_image_fmap = accept_image_fmap
        self.channel_first = accept_image_fmap or not channel_last
        layout = {"channel_last": channel_last, "accept_image_fmap": accept_image_fmap}
        self.rvqs = nn.ModuleList(ResidualVQ(dim=dim // groups, **layout, **options) for _ in range(groups))
        self._seeds = DropoutSeeds()

    @property
    def codebooks(self) -> Tensor | tuple[tuple[Tensor, ...], ...]:
        """(G, Q, K, codebook_dim), or tuples where the sizes of stages differ."""
        codebooks = tuple(rvq.codebooks for rvq in self.rvqs)
        return torch.stack(codebooks) if isinstance(codebooks[0], Tensor) else codebooks

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantise each group of channels; arguments as ResidualVQ's.

        Returns:
            quantized: shape and dtype of x.
            indices: (G, B, ..., Q) int64.
            losses: (G, Q).
            codes: (G, Q, B, ..., codebook_dim), only where asked for.
        """
        channels_last(x, self.dim, self.channel_first)  # the error names the whole input, not a group's part
        seed = rand_quantize_dropout_fixed_seed
        if seed is None and self.training and self.rvqs[0].quantize_dropout:
            seed = self._seeds.draw()
        channels = 1 if self.channel_first else -1
        results = [
            rvq(
                part,
                mask=mask,
                return_all_codes=return_all_codes,
                sample_codebook_temp=sample_codebook_temp,
                freeze_codebook=freeze_codebook,
                rand_quantize_dropout_fixed_seed=seed,
                weights=weights,
            )
            for rvq, part in zip(self.rvqs, x.chunk(self.groups, dim=channels), strict=True)
        ]
        quantized, *rest = zip(*results, strict=True)
        return (torch.cat(quantized, dim=channels), *(torch.stack(part) for part in rest))

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """(G, B, ..., Q) int64 to (G, Q, B, ..., codebook_dim)."""
        return torch.stack([rvq.get_codes_from_indices(part) for rvq, part in self._by_group(indices)])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """(G, B, ..., Q) int64 to the quantised vectors (B, ..., D): channels last, for images too."""
        return torch.cat([rvq.get_output_from_indices(part) for rvq, part in self._by_group(indices)], dim=-1)

    def _by_group(self, indices: Tensor) -> Iterator[tuple[ResidualVQ, Tensor]]:
        if len(indices) != self.groups:
            raise ValueError(f"indices: expected {self.groups} groups first, got shape {tuple(indices.shape)}")
        return zip(self.rvqs, indices, strict=True)


class DropoutSeeds:
    """Seeds of quantiser dropout: one a call, drawn on the host, the same in every process."""

    def __init__(self) -> None:
        self._shared: random.Random | None = None

    def draw(self) -> int:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return _host_seed()
        if self._shared is None:
            # Once in a run: processes that left out different stages would wait for each other for ever.
            seed = [_host_seed()]
            dist.broadcast_object_list(seed, src=0)
            self._shared = random.Random(seed[0])
        return self._shared.randrange(2**31)


def _host_seed() -> int:
    return int(torch.randint(2**31, (), device="cpu"))


def _stage_sizes(num_quantizers: int | None, codebook_size: int | tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(codebook_size, int):
        if num_quantizers is None or num_quantizers < 1:
            raise ValueError(f"num_quantizers: expected at least 1 with one codebook_size, got {num_quantizers}")
        return (codebook_size,) * num_quantizers
    sizes = tuple(codebook_size)
    if not sizes or num_quantizers not in (None, len(sizes)):
        raise ValueError(f"codebook_size: expected one size for each of {num_quantizers} stages, got {sizes}")
    return sizes


def _with_gradient_share(code: Tensor, share: float) -> Tensor:
    """The value of code, with `share` of its gradient."""
    return code.detach() if share == 0 else code.detach() + share * (code - code.detach())

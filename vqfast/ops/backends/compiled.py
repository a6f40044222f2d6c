"""From tensors to the launchers of a compiled extension: memory for the results, addresses, sizes, strides."""

from types import ModuleType

import torch
from torch import Tensor

from vqfast.kernels.residual_nearest.reference import residual_nearest
from vqfast.ops.backends.layout import DTYPE, METRIC, as_heads, as_rows, as_vectors


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _levels(levels: Tensor, noise: Tensor | None, cumulative: Tensor | None = None) -> tuple[int, int, int, int, int]:
    """A family's tables as the extension takes them: vqfast_levels of csrc/include/vqfast.h."""
    return levels.data_ptr(), levels.shape[0] - 1, levels.shape[1], _address(noise), _address(cumulative)


class _Step:
    """A step's matrices as the extension takes them: vqfast_step of csrc/include/vqfast.h. Keeps their memory."""

    def __init__(self, prior: Tensor, likelihood: Tensor, transposed: bool):
        # An expanded matrix serves all samples.
        strides = [0 if m.stride(0) == 0 else m.shape[1] * m.shape[2] for m in (prior, likelihood)]
        prior, likelihood = (
            m[:1] if stride == 0 else m for m, stride in zip((prior, likelihood), strides, strict=True)
        )
        self.owners = _contiguous(prior, likelihood, prior.mT if transposed else None)
        self.view = *map(_address, self.owners), *strides


class CompiledKernels:
    """The ops as methods; `kernels()` lists them by name.

    Args:
        extension: a module with the launchers of csrc/include/vqfast.h, without their prefix.
    """

    def __init__(self, extension: ModuleType):
        self.extension = extension

    transposes = False  # whether the launchers want a matrix's transpose written out beside it

    def where(self, tensor: Tensor) -> tuple[int, ...]:
        """The launchers' last arguments: where to run."""
        return ()

    def search_memory(self, x: Tensor, codebook: Tensor, reranked: Tensor | None) -> tuple[Tensor | None, ...]:
        """Further buffers of `nearest`, between its results and `where`; `reranked` takes the count, if not None."""
        return ()

    def stats_memory(self, x: Tensor, codebook_size: int) -> tuple[Tensor | None, ...]:
        """Further buffers of `codebook_stats`, between its results and `where`."""
        return ()

    def pack_memory(self, grains: Tensor, num_grains: int) -> tuple[Tensor | None, ...]:
        """Further buffers of `pack`, between its results and `where`."""
        return ()

    def unpack_memory(self, grains: Tensor, num_grains: int) -> tuple[Tensor | None, ...]:
        """Further buffers of `unpack` and `unpack_backward`, between their results and `where`."""
        return ()

    def kernels(self) -> dict:
        return {
            "nearest": self.nearest,
            "nearest_counted": self.nearest_counted,
            "residual_nearest": self.residual_nearest,
            "lookup": self.lookup,
            "lookup_backward": self.lookup_backward,
            "codebook_stats": self.codebook_stats,
            "q_sample": self.q_sample,
            "posterior": self.posterior,
            "posterior_backward": self.posterior_backward,
            "diffusion_loss": self.diffusion_loss,
            "scale_rows_": self.scale_rows_,
            "p_sample": self.p_sample,
            "matrix_loss": self.matrix_loss,
            "matrix_sample": self.matrix_sample,
            "pack": self.pack,
            "unpack": self.unpack,
            "unpack_backward": self.unpack_backward,
            "position_mask": self.position_mask,
            "grain_entropy": self.grain_entropy,
        }

    def _search(
        self,
        x: Tensor,
        codebook: Tensor,
        mask: Tensor | None,
        prepared: Tensor | None,
        metric: str,
        exact: bool,
        reranked: Tensor | None,
    ) -> tuple[Tensor, int | None]:
        shape, codebook = x.shape, codebook.contiguous()
        if codebook.ndim == 3:
            rows, heads, stride_head = as_heads(x)
        else:
            rows, heads, stride_head = as_rows(x), 1, 0
        if mask is not None:
            mask = mask.contiguous()
        # By keyword: torch reads a size given by position a microsecond slower.
        indices = x.new_empty(size=shape[:-1], dtype=torch.int64)
        memory = self.search_memory(x, codebook, reranked)
        counted = self.extension.nearest(
            DTYPE[x.dtype], METRIC[metric], exact, rows.view, heads, stride_head, shape[-1], codebook.data_ptr(),
            codebook.shape[-2], _address(mask), _address(prepared), indices.data_ptr(),
            *map(_address, memory), *self.where(x),
        )  # fmt: skip
        return indices, counted

    def nearest(
        self,
        x: Tensor,
        codebook: Tensor,
        mask: Tensor | None = None,
        prepared: Tensor | None = None,
        metric: str = "l2",
        exact: bool = True,
    ) -> Tensor:
        return self._search(x, codebook, mask, prepared, metric, exact, None)[0]

    def nearest_counted(
        self,
        x: Tensor,
        codebook: Tensor,
        mask: Tensor | None = None,
        prepared: Tensor | None = None,
        metric: str = "l2",
        exact: bool = True,
    ) -> tuple[Tensor, Tensor]:
        reranked = torch.zeros((), dtype=torch.int64, device=x.device)
        indices, counted = self._search(x, codebook, mask, prepared, metric, exact, reranked)
        # A launcher on the host returns its count; one on a device has written it.
        return indices, reranked if counted is None else reranked.fill_(counted)

    def residual_nearest(self, x: Tensor, codebooks: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A search a stage."""
        return residual_nearest(x, codebooks, mask, self.nearest)

    def lookup(self, x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, codebook, indices = as_rows(x), codebook.contiguous(), indices.contiguous()
        K, D = codebook.shape
        quantized = x.new_empty(x.shape)
        error = x.new_empty(x.shape[:-1], dtype=_accumulator(x))
        counts = x.new_empty(K, dtype=torch.int64)
        self.extension.lookup(
            DTYPE[x.dtype], rows.view, D, codebook.data_ptr(), K, indices.data_ptr(),
            quantized.data_ptr(), error.data_ptr(), counts.data_ptr(), *self.where(x),
        )  # fmt: skip
        return quantized, error, counts

    def lookup_backward(
        self, grad_quantized: Tensor, grad_error: Tensor, x: Tensor, codebook: Tensor, indices: Tensor
    ) -> Tensor:
        grad_rows, rows = as_rows(grad_quantized), as_rows(x)
        grad_error, codebook, indices = grad_error.contiguous(), codebook.contiguous(), indices.contiguous()
        K, D = codebook.shape
        grad_x = x.new_empty(x.shape)
        self.extension.lookup_backward(
            DTYPE[x.dtype], grad_rows.view, grad_error.data_ptr(), rows.view, D, codebook.data_ptr(), K,
            indices.data_ptr(), grad_x.data_ptr(), *self.where(x),
        )  # fmt: skip
        return grad_x

    def codebook_stats(
        self, x: Tensor, indices: Tensor, weights: Tensor | None, codebook_size: int
    ) -> tuple[Tensor, Tensor]:
        rows, indices = as_rows(x), indices.contiguous()
        D, accumulator = x.shape[-1], _accumulator(x)
        if weights is not None:
            weights = weights.to(accumulator).contiguous()
        counts = x.new_empty(codebook_size, dtype=accumulator)
        sums = x.new_empty(codebook_size, D, dtype=accumulator)
        memory = self.stats_memory(x, codebook_size)
        self.extension.codebook_stats(
            DTYPE[x.dtype], rows.view, D, indices.data_ptr(), _address(weights), codebook_size,
            counts.data_ptr(), sums.data_ptr(), *map(_address, memory), *self.where(x),
        )  # fmt: skip
        return counts, sums

    def q_sample(
        self, x0: Tensor, t: Tensor, levels: Tensor, noise: Tensor | None, codebook_size: int, key: Tensor
    ) -> Tensor:
        x0, t, levels, noise, key = _contiguous(x0, t, levels, noise, key)
        cumulative = None if noise is None else noise.cumsum(0)
        x_t = x0.new_empty(x0.shape)
        self.extension.q_sample(
            x0.data_ptr(), t.data_ptr(), _levels(levels, noise, cumulative), *x0.shape, codebook_size, key.data_ptr(),
            x_t.data_ptr(), *self.where(x0),
        )  # fmt: skip
        return x_t

    def posterior(
        self,
        logits: Tensor,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        levels: Tensor,
        noise: Tensor | None,
        marginal: bool,
    ) -> Tensor:
        logits, x_t, t, s, levels, noise = _contiguous(logits, x_t, t, s, levels, noise)
        B, L, K = logits.shape
        log_p = logits.new_empty(B, L, K + levels.shape[1] - 1)
        self.extension.posterior(
            DTYPE[logits.dtype], logits.data_ptr(), x_t.data_ptr(), t.data_ptr(), s.data_ptr(), _levels(levels, noise),
            B, L, K, marginal, log_p.data_ptr(), *self.where(logits),
        )  # fmt: skip
        return log_p

    def posterior_backward(
        self,
        grad: Tensor,
        logits: Tensor,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        levels: Tensor,
        noise: Tensor | None,
        marginal: bool,
    ) -> Tensor:
        grad, logits, x_t, t, s = _contiguous(grad, logits, x_t, t, s)
        levels, noise = _contiguous(levels, noise)
        grad_logits = torch.empty_like(logits)
        self.extension.posterior_backward(
            DTYPE[logits.dtype], grad.data_ptr(), logits.data_ptr(), x_t.data_ptr(), t.data_ptr(), s.data_ptr(),
            _levels(levels, noise), *logits.shape, marginal, grad_logits.data_ptr(), *self.where(logits),
        )  # fmt: skip
        return grad_logits

    def diffusion_loss(
        self,
        logits: Tensor,
        x0: Tensor,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        levels: Tensor,
        noise: Tensor | None,
        scale: Tensor,
        marginal: bool,
        aux_weight: float,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        logits, x0, x_t, t, s = _contiguous(logits, x0, x_t, t, s)
        levels, noise, scale = _contiguous(levels, noise, scale)
        loss = logits.new_empty(x0.shape, dtype=_accumulator(logits))
        grad = logits.new_empty(logits.shape if with_grad else (0,))
        self.extension.diffusion_loss(
            DTYPE[logits.dtype], logits.data_ptr(), x0.data_ptr(), x_t.data_ptr(), t.data_ptr(), s.data_ptr(),
            _levels(levels, noise), *logits.shape, scale.data_ptr(), marginal, aux_weight,
            loss.data_ptr(), grad.data_ptr() if with_grad else 0, *self.where(logits),
        )  # fmt: skip
        return loss, grad

    def scale_rows_(self, rows: Tensor, scale: Tensor) -> None:
        if not rows.is_contiguous():
            rows.mul_(scale[..., None])
            return
        K = rows.shape[-1]
        # One number for all rows (the gradient of a mean or a sum) is read in place.
        one = all(step == 0 or size == 1 for size, step in zip(scale.shape, scale.stride(), strict=True))
        scale = scale.to(_accumulator(rows))
        scale = scale if one else scale.contiguous()
        self.extension.scale_rows(
            DTYPE[rows.dtype], rows.data_ptr(), rows.numel() // max(K, 1), K, scale.data_ptr(), 0 if one else 1,
            *self.where(rows),
        )  # fmt: skip

    def p_sample(
        self,
        logits: Tensor,
        unconditional: Tensor | None,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        levels: Tensor,
        noise: Tensor | None,
        known: Tensor | None,
        marginal: bool,
        temperature: float,
        guidance: float,
        top_k: int,
        top_p: float,
        key: Tensor,
    ) -> Tensor:
        logits, unconditional, x_t, t, s = _contiguous(logits, unconditional, x_t, t, s)
        levels, noise, known, key = _contiguous(levels, noise, known, key)
        cumulative = None if noise is None else noise.cumsum(0)
        x_s = x_t.new_empty(x_t.shape)
        self.extension.p_sample(
            DTYPE[logits.dtype], logits.data_ptr(), _address(unconditional), x_t.data_ptr(), t.data_ptr(),
            s.data_ptr(), _levels(levels, noise, cumulative), *logits.shape, _address(known), marginal, temperature,
            guidance, top_k, top_p, key.data_ptr(), x_s.data_ptr(), *self.where(logits),
        )  # fmt: skip
        return x_s

    def matrix_loss(
        self,
        logits: Tensor,
        x0: Tensor,
        x_t: Tensor,
        s: Tensor,
        prior: Tensor,
        likelihood: Tensor,
        scale: Tensor,
        marginal: bool,
        aux_weight: float,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        logits, x0, x_t, s, scale = _contiguous(logits, x0, x_t, s, scale)
        step = _Step(prior, likelihood, self.transposes and (marginal or with_grad))
        loss = logits.new_empty(x0.shape, dtype=_accumulator(logits))
        grad = logits.new_empty(logits.shape if with_grad else (0,))
        self.extension.matrix_loss(
            DTYPE[logits.dtype], logits.data_ptr(), x0.data_ptr(), x_t.data_ptr(), s.data_ptr(), step.view,
            *logits.shape, scale.data_ptr(), marginal, aux_weight, loss.data_ptr(),
            grad.data_ptr() if with_grad else 0, *self.where(logits),
        )  # fmt: skip
        return loss, grad

    def matrix_sample(
        self,
        logits: Tensor,
        unconditional: Tensor | None,
        x_t: Tensor,
        s: Tensor,
        prior: Tensor,
        likelihood: Tensor,
        known: Tensor | None,
        marginal: bool,
        temperature: float,
        guidance: float,
        top_k: int,
        top_p: float,
        key: Tensor,
    ) -> Tensor:
        logits, unconditional, x_t, s, known, key = _contiguous(logits, unconditional, x_t, s, known, key)
        step = _Step(prior, likelihood, self.transposes and marginal)
        x_s = x_t.new_empty(x_t.shape)
        self.extension.matrix_sample(
            DTYPE[logits.dtype], logits.data_ptr(), _address(unconditional), x_t.data_ptr(), s.data_ptr(), step.view,
            *logits.shape, _address(known), marginal, temperature, guidance, top_k, top_p, key.data_ptr(),
            x_s.data_ptr(), *self.where(logits),
        )  # fmt: skip
        return x_s

    def pack(
        self, values: Tensor, grains: Tensor, region: bool, capacity: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (rows, D), grains = as_vectors(values, 3), grains.contiguous()
        num_grains = (values.shape[1] // grains.shape[1]).bit_length()
        packed = values.new_empty(size=(capacity, *values.shape[3:]))
        cu_seqlens = grains.new_empty(grains.shape[0] + 1, dtype=torch.int32)
        positions, grain_ids = grains.new_empty(capacity), grains.new_empty(capacity)
        memory = self.pack_memory(grains, num_grains)
        self.extension.pack(
            values.element_size(), rows.view, D, grains.data_ptr(), *grains.shape, num_grains, region, capacity,
            packed.data_ptr(), cu_seqlens.data_ptr(), positions.data_ptr(), grain_ids.data_ptr(),
            *map(_address, memory), *self.where(values),
        )  # fmt: skip
        return packed, cu_seqlens, positions, grain_ids

    def unpack(
        self,
        values: Tensor,
        cu_seqlens: Tensor,
        positions: Tensor,
        grain_ids: Tensor,
        grains: Tensor,
        num_grains: int,
        replicate: bool,
    ) -> Tensor:
        (rows, D), cu_seqlens = as_vectors(values, 1), cu_seqlens.contiguous()
        positions, grain_ids, grains = positions.contiguous(), grain_ids.contiguous(), grains.contiguous()
        B, Hc, Wc = grains.shape
        factor = 1 << (num_grains - 1)
        grid = values.new_empty((B, Hc * factor, Wc * factor, *values.shape[1:]))
        memory = self.unpack_memory(grains, num_grains)
        self.extension.unpack(
            values.element_size(), rows.view, D, cu_seqlens.data_ptr(), positions.data_ptr(),
            grain_ids.data_ptr(), grains.data_ptr(), B, Hc, Wc, num_grains, replicate, grid.data_ptr(),
            *map(_address, memory), *self.where(values),
        )  # fmt: skip
        return grid

    def unpack_backward(
        self,
        grad: Tensor,
        cu_seqlens: Tensor,
        positions: Tensor,
        grain_ids: Tensor,
        grains: Tensor,
        num_grains: int,
    ) -> Tensor:
        (rows, D), cu_seqlens = as_vectors(grad, 3), cu_seqlens.contiguous()
        positions, grain_ids, grains = positions.contiguous(), grain_ids.contiguous(), grains.contiguous()
        T = positions.shape[0]
        grad_values = grad.new_empty((T, *grad.shape[3:]))
        memory = self.unpack_memory(grains, num_grains)
        self.extension.unpack_backward(
            DTYPE[grad.dtype], rows.view, D, cu_seqlens.data_ptr(), positions.data_ptr(),
            grain_ids.data_ptr(), T, grains.data_ptr(), *grains.shape, num_grains, grad_values.data_ptr(),
            *map(_address, memory), *self.where(grad),
        )  # fmt: skip
        return grad_values

    def position_mask(
        self, positions: Tensor, grain_ids: Tensor, grain: Tensor, Hc: int, Wc: int, num_grains: int, vocab_size: int
    ) -> Tensor:
        positions, grain_ids, grain = positions.contiguous(), grain_ids.contiguous(), grain.contiguous()
        mask = positions.new_empty((positions.shape[0], vocab_size), dtype=torch.bool)
        self.extension.position_mask(
            positions.data_ptr(), grain_ids.data_ptr(), grain.data_ptr(), *positions.shape, Hc, Wc, num_grains,
            vocab_size, mask.data_ptr(), *self.where(positions),
        )  # fmt: skip
        return mask

    def grain_entropy(
        self, images: Tensor, patch_size: int, num_bins: int, sigma: float, lowest: float, highest: float
    ) -> Tensor:
        B, _, H, W = images.shape
        entropy = images.new_empty((B, H // patch_size, W // patch_size), dtype=_accumulator(images))
        self.extension.grain_entropy(
            DTYPE[images.dtype], images.data_ptr(), images.shape, images.stride(), patch_size, num_bins, sigma,
            lowest, highest, entropy.data_ptr(), *self.where(images),
        )  # fmt: skip
        return entropy

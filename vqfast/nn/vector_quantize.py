"""A vector quantiser as a module: codebook, its upkeep by moving averages, the losses that train the rest."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqfast.ops import codebook_stats, nearest_code, quantize

USAGE_WINDOW = 100


class VectorQuantize(nn.Module):
    """Replaces each vector by its nearest code; called as users of vector-quantize-pytorch call theirs.

    By default the codebook follows the vectors by exponential moving averages (van den Oord et al. 2017,
    appendix A.1, with Laplace smoothing of the counts) and the only loss is the commitment term. With
    `decay=None` or `ema_update=False` the codebook is a parameter that the codebook term of the loss moves.

    The gradient of `quantized` passes straight through to the input, or by the rotation trick. Input of another float
    dtype than the codebook is cast to the codebook's for the search and the losses, and `quantized` is cast back: keep
    the module in float32 under mixed precision. With torch.distributed started, every process ends each step with the
    same codebook, at the price of one all-reduce.

    Args:
        dim: D, size of a vector.
        codebook_size: K, number of codes.
        decay: of the moving averages; None makes the codebook a parameter.
        eps: of the Laplace smoothing.
        commitment_weight: weight of mean |x - sg(code)|^2.
        codebook_weight: weight of mean |sg(x) - code|^2; used by a learnable codebook only.
        ema_update: False makes the codebook a parameter.
        threshold_ema_dead_code: a code whose moving-average count falls below this is replaced by a vector
            of the batch; 0 never replaces any. The choice is made on the device, without a sync.
        kmeans_init: start the codebook from k-means over the first training batch.
        kmeans_iters: its iterations.
        freeze_codebook: never change the codebook (can be overridden in a call).
        rotation_trick: turn and scale the gradient as each vector was turned and scaled to reach its code (Fifty et
            al. 2024), in place of the straight-through estimator.
        channel_last: input (B, ..., D) if true, (B, D, ...) if false.
        accept_image_fmap: input (B, D, H, W), indices (B, H, W).

    Buffers: codebook (K, D), a parameter where learnable; cluster_size (K,); embed_avg (K, D); idle (K,)
    int64, the number of training batches since each code was last chosen.

    Raises:
        ValueError: a size, weight or decay out of range.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        decay: float | None = 0.8,
        eps: float = 1e-5,
        commitment_weight: float = 1.0,
        codebook_weight: float = 1.0,
        ema_update: bool = True,
        threshold_ema_dead_code: float = 0.0,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        freeze_codebook: bool = False,
        rotation_trick: bool = False,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
    ):
        super().__init__()
        for name, value in (("dim", dim), ("codebook_size", codebook_size)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number in [0, 1) or None, got {decay}")
        weights = {
            "commitment_weight": commitment_weight,
            "codebook_weight": codebook_weight,
            "threshold_ema_dead_code": threshold_ema_dead_code,
        }
        for name, value in weights.items():
            if value < 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {value}")
        self.dim, self.codebook_size = dim, codebook_size
        self.learnable_codebook = decay is None or not ema_update
        # A learnable codebook keeps the averages too: dead codes are found by them.
        self.decay = 0.99 if decay is None else decay
        self.eps = eps
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.kmeans_iters = kmeans_iters
        self.freeze_codebook = freeze_codebook
        self.estimator = "rotation" if rotation_trick else "ste"
        self.channel_first = accept_image_fmap or not channel_last
        self.accept_image_fmap = accept_image_fmap

        codes = torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        if self.learnable_codebook:
            self.codebook = nn.Parameter(codes)
        else:
            self.register_buffer("codebook", codes)
        self.register_buffer("cluster_size", torch.ones(codebook_size))
        self.register_buffer("embed_avg", codes.clone())
        self.register_buffer("idle", torch.zeros(codebook_size, dtype=torch.int64))
        self.register_buffer("initialised", torch.tensor(not kmeans_init))
        # The same fact on the host: reading the buffer at every step would wait for the device.
        self._initialised = not kmeans_init
        self.register_load_state_dict_post_hook(VectorQuantize._after_load)

    def _after_load(self, incompatible_keys) -> None:
        self._initialised = bool(self.initialised)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, freeze_codebook: bool | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise, and in training mode let the codebook follow.

        Args:
            x: (B, ..., D) float, or (B, D, ...) as configured.
            mask: (B, ...) bool, True where a vector counts. Elsewhere the index is -1 and the output 0, and neither the
                loss nor the codebook sees the vector.
            freeze_codebook: leave the codebook as it is in this call.

        Returns:
            quantized: shape and dtype of x.
            indices: (B, ...) int64.
            loss: scalar, the commitment term (plus the codebook term where learnable); 0 in eval mode.

        Raises:
            TypeError: a mask that is not bool.
            ValueError: a shape that does not fit.
        """
        vectors = self._channels_last(x)
        rows = vectors.to(self.codebook.dtype)
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        follow = self.training and not frozen
        if follow and not self._initialised:
            self._start_from_kmeans(rows.detach().reshape(-1, self.dim), None if mask is None else mask.reshape(-1))
        codebook = self.codebook.detach() if frozen else self.codebook
        # Backward reads the codes that were looked up, and the update below writes in place.
        result = quantize(
            rows,
            codebook.clone() if follow else codebook,
            beta=self.commitment_weight,
            codebook_weight=self.codebook_weight if self.learnable_codebook and not frozen else 0.0,
            estimator=self.estimator,
            mask=mask,
        )
        if follow:
            self._follow(rows.detach().reshape(-1, self.dim), result.indices.reshape(-1))
        quantized = result.quantized.to(x.dtype)
        if self.channel_first:
            quantized = quantized.movedim(-1, 1)
        return quantized, result.indices, result.loss if self.training else torch.zeros_like(result.loss)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """(B, ...) int64 to the codes (B, ..., D), or (B, D, ...) where the input is channel-first."""
        codes = nn.functional.embedding(indices, self.codebook)
        return codes.movedim(-1, 1) if self.channel_first else codes

    @property
    def usage(self) -> Tensor:
        """Share of the codes chosen in the last 100 training batches: scalar float32 on the device."""
        return (self.idle < USAGE_WINDOW).float().mean()

    @property
    def perplexity(self) -> Tensor:
        """exp of the entropy of the moving-average counts, 1..K: scalar on the device."""
        share = self.cluster_size / self.cluster_size.sum().clamp(min=self.eps)
        return torch.exp(torch.special.entr(share).sum())

    def _channels_last(self, x: Tensor) -> Tensor:
        channel = 1 if self.channel_first else -1
        if x.ndim < 2 or (self.accept_image_fmap and x.ndim != 4) or x.shape[channel] != self.dim:
            if self.accept_image_fmap:
                layout = f"(B, {self.dim}, H, W)"
            else:
                layout = f"(B, {self.dim}, ...)" if self.channel_first else f"(B, ..., {self.dim})"
            raise ValueError(f"x: expected shape {layout}, got {tuple(x.shape)}")
        return x.movedim(1, -1) if self.channel_first else x

    @torch.no_grad()
    def _follow(self, rows: Tensor, indices: Tensor) -> None:
        """One step of the moving averages. rows: (N, D) in the codebook's dtype; indices: (N,), -1 where masked."""
        revive = self.threshold_ema_dead_code > 0
        counts, sums = codebook_stats(rows, indices, self.codebook_size)
        packed = [counts[:, None], sums, self._random_rows(rows, indices >= 0)] if revive else [counts[:, None], sums]
        packed = _sum_over_processes(torch.cat(packed, dim=1))
        counts, sums, candidates = packed[:, 0], packed[:, 1 : 1 + self.dim], packed[:, 1 + self.dim :]

        self.idle.copy_(torch.where(counts > 0, 0, self.idle + 1))
        self.cluster_size.lerp_(counts.to(self.cluster_size), 1 - self.decay)
        self.embed_avg.lerp_(sums.to(self.embed_avg), 1 - self.decay)
        if not self.learnable_codebook:
            total = self.cluster_size.sum()
            smoothed = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
            self.codebook.copy_(self.embed_avg / smoothed[:, None])
        if revive:
            self._revive(candidates)

    def _random_rows(self, rows: Tensor, counted: Tensor | None) -> Tensor:
        """K different rows of this batch, each with a 1 after it; 0 where the batch, or this process, gives none.

        rows: (N, D); counted: (N,) bool, which of them may be taken, or None for all.

        (K, D + 1). Processes take turns: summed over them, every place holds one row of one process.
        """
        offered = rows.new_zeros(self.codebook_size, self.dim + 1)
        chance = torch.rand(len(rows), device=rows.device)
        if counted is not None:
            chance = torch.where(counted, chance, 2.0)
        chosen = chance.argsort()[: self.codebook_size]
        given = 1.0 if counted is None else counted[chosen].to(rows.dtype)
        offered[: len(chosen), -1] = given
        offered[: len(chosen), :-1] = torch.where(offered[: len(chosen), -1:] > 0, rows[chosen], 0)
        if _world() > 1:
            turn = torch.arange(self.codebook_size, device=rows.device) % _world() == dist.get_rank()
            offered = torch.where(turn[:, None], offered, 0)
        return offered

    def _revive(self, candidates: Tensor) -> None:
        """Give each dead code a candidate of its own, as far as they go. candidates: (K, D + 1)."""
        dead = self.cluster_size < self.threshold_ema_dead_code
        place = (dead.cumsum(0) - 1).clamp(min=0)
        candidates = candidates[place]
        dead = dead & (candidates[:, -1] > 0)
        codes, size = candidates[:, :-1], self.threshold_ema_dead_code
        self.codebook.data.copy_(torch.where(dead[:, None], codes.to(self.codebook), self.codebook))
        self.cluster_size.masked_fill_(dead, size)
        self.embed_avg.copy_(torch.where(dead[:, None], codes * size, self.embed_avg))

    @torch.no_grad()
    def _start_from_kmeans(self, rows: Tensor, counted: Tensor | None) -> None:
        """Lloyd's algorithm from random rows; a cluster that loses all its vectors keeps its centre."""
        seeds = _sum_over_processes(self._random_rows(rows, counted))
        centres = torch.where(seeds[:, -1:] > 0, seeds[:, :-1], self.codebook)
        counts = torch.zeros_like(self.cluster_size)
        for _ in range(self.kmeans_iters):
            nearest = nearest_code(rows, centres)
            if counted is not None:
                nearest = torch.where(counted, nearest, -1)
            counts, sums = codebook_stats(rows, nearest, self.codebook_size)
            packed = _sum_over_processes(torch.cat([counts[:, None], sums], dim=1)).to(centres)
            counts, sums = packed[:, 0], packed[:, 1:]
            centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
        self.codebook.data.copy_(centres)
        self.cluster_size.copy_(counts.clamp(min=1))
        self.embed_avg.copy_(centres * self.cluster_size[:, None])
        self.initialised.fill_(True)
        self._initialised = True

    def extra_repr(self) -> str:
        learned = "learnable" if self.learnable_codebook else f"decay={self.decay}"
        return f"dim={self.dim}, codebook_size={self.codebook_size}, {learned}"


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum_over_processes(values: Tensor) -> Tensor:
    if _world() > 1:
        dist.all_reduce(values)
    return values

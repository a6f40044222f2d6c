"""A codebook that follows the vectors it is used for: moving averages, revival of dead codes, start from k-means."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vqfast.nn.codebook import (
    averaged_codes,
    kmeans,
    packed_stats,
    process_count,
    random_vectors,
    revived,
    sum_over_processes,
)
from vqfast.nn.peer_checkpoints import rename_codebook

USAGE_WINDOW = 100


class FollowingCodebook(nn.Module):
    """One codebook (K, d), or one for each of H heads, and its upkeep. `VectorQuantize` documents options and buffers.

    The class that builds on this one sets heads, separate_codebook_per_head, codebook_size, codebook_dim, decay, eps,
    use_cosine_sim, learnable_codebook, ema_update, manual_ema_update, threshold_ema_dead_code, kmeans_start,
    kmeans_iters, sync_kmeans and sync_codebook, then calls `_begin`.
    """

    def _begin(self, codes: Tensor, *, parameter: bool, kmeans_init: bool) -> None:
        """Register the codebook (K, d), or (H, K, d), and what is kept of it."""
        if parameter:
            self.codebook = nn.Parameter(codes)
        else:
            self.register_buffer("codebook", codes)
        self.register_buffer("cluster_size", torch.ones(codes.shape[:-1]))
        self.register_buffer("embed_avg", codes.clone())
        self.register_buffer("idle", torch.zeros(codes.shape[:-1], dtype=torch.int64))
        self.register_buffer("initialised", torch.tensor(not kmeans_init))
        # The same fact on the host: reading the buffer at every step would wait for the device.
        self._initialised = not kmeans_init
        self.register_load_state_dict_pre_hook(rename_codebook)
        self.register_load_state_dict_post_hook(FollowingCodebook._after_load)
        self.accumulating = False
        self.written_by_owner = False  # who calls `update_ema` where stages share the codebook
        self._turn = (0, 1)
        self._pending: Tensor | None = None

    def _after_load(self, incompatible_keys) -> None:
        if not self.initialised.is_meta:  # where loading does nothing
            self._initialised = bool(self.initialised)

    @torch.no_grad()
    def update_ema(self) -> None:
        """Write the codes of the moving averages to the codebook: what training does by itself at every step, unless
        `manual_ema_update` leaves it to the caller.
        """
        codes = averaged_codes(self.cluster_size, self.embed_avg, self.eps, cosine=self.use_cosine_sim)
        self.codebook.data.copy_(codes)

    def update_codebook(self) -> None:
        """One step of the moving averages with all that `accum_ema_update` or `accumulate_codebooks` kept, if anything.

        Every process calls this alike: it is one all-reduce.
        """
        if self._pending is not None:
            packed, self._pending = self._pending, None
            self._step(packed, None, self.ema_update and not self.manual_ema_update)

    @property
    def usage(self) -> Tensor:
        """Share of the codes chosen in the last 100 training batches, 1 of a codebook that training leaves as it is:
        scalar float32 on the device.
        """
        return (self.idle < USAGE_WINDOW).float().mean()

    @property
    def perplexity(self) -> Tensor:
        """exp of the entropy of the moving-average counts, 1..K, mean over separate codebooks: scalar on the device."""
        share = self.cluster_size / self.cluster_size.sum(-1, keepdim=True).clamp(min=self.eps)
        return torch.exp(torch.special.entr(share).sum(-1)).mean()

    @torch.no_grad()
    def _follow(
        self,
        z: Tensor,
        indices: Tensor,
        weights: Tensor | None,
        ema_update_weight: Tensor | Callable[[Tensor, Tensor], Tensor] | None,
        accumulate: bool,
    ) -> None:
        """Statistics of one call, and unless they wait for the next one, a step of the moving averages.

        z: (..., d); indices: (...), -1 where masked; both with H where there are heads. weights: (...) without H.
        """
        if self.accumulating and ema_update_weight is not None:
            raise ValueError("ema_update_weight: expected None inside accumulate_codebooks, got one for a single pass")
        if not self.ema_update and self.threshold_ema_dead_code == 0 and not self.learnable_codebook:
            return
        if weights is not None:
            weights = self._per_head(weights)
        packed = packed_stats(z, self._stacked(indices), self.cluster_size.numel(), weights=weights, sync=False)
        if self.threshold_ema_dead_code > 0:
            rows, counted = self._by_codebook(z), self._by_codebook((indices >= 0)[..., None])[..., 0]
            candidates = random_vectors(
                rows, self.codebook_size, mask=counted, sync=self.sync_codebook, turn=self._turn
            )
            packed = torch.cat([packed, candidates.flatten(0, -2).to(packed)], dim=1)
        if self._pending is not None:
            # Statistics add up. Candidates for revival do where passes take turns; else the newest are as good as any.
            added = packed.shape[1] if self._turn[1] > 1 else 1 + self.codebook_dim
            packed[:, :added] += self._pending[:, :added]
        self._turn = (self._turn[0] + 1, self._turn[1]) if self._turn[1] > 1 else self._turn
        if accumulate or self.accumulating:
            self._pending = packed
            return
        self._pending = None
        writes = self.ema_update and not self.manual_ema_update and not self.written_by_owner
        self._step(packed, ema_update_weight, writes)

    @torch.no_grad()
    def _step(
        self,
        packed: Tensor,
        ema_update_weight: Tensor | Callable[[Tensor, Tensor], Tensor] | None,
        writes: bool,
    ) -> None:
        """Sum over processes, move the averages and, where it writes, the codebook, revive.

        packed: (K, 1 + d) counts and sums, and candidates for revival (K, d + 1) beside them where codes may die.
        """
        packed = sum_over_processes(packed, self.sync_codebook).view(*self.cluster_size.shape, -1)
        # Vectors that are not finite have index 0, so no other code can meet one: of that code this batch says nothing.
        # (A sum that is not finite is NaN, and so not 0, when it is multiplied by 0: two launches fewer than isfinite.)
        first = packed[..., 0, : 1 + self.codebook_dim]
        first.masked_fill_(first.sum(-1, keepdim=True).mul_(0) != 0, 0)
        counts, sums = packed[..., 0].to(self.cluster_size), packed[..., 1 : 1 + self.codebook_dim].to(self.embed_avg)
        self.idle.copy_(torch.where(counts > 0, 0, self.idle + 1))
        if callable(ema_update_weight):
            ema_update_weight = ema_update_weight(sums, counts)
        if ema_update_weight is None:
            self.cluster_size.lerp_(counts, 1 - self.decay)
            self.embed_avg.lerp_(sums, 1 - self.decay)
        else:
            share = ((1 - self.decay) * ema_update_weight).to(self.cluster_size).expand_as(self.cluster_size)
            self.cluster_size.lerp_(counts, share)
            self.embed_avg.lerp_(sums, share[..., None])
        if writes:
            self.update_ema()
        if self.threshold_ema_dead_code > 0:
            self._revive(packed[..., 1 + self.codebook_dim :])

    def _revive(self, candidates: Tensor) -> None:
        """Replace dead codes and all that is kept of them. candidates: (..., K, d + 1)."""
        size = self.threshold_ema_dead_code
        dead, codes = revived(self.cluster_size < size, candidates.to(self.embed_avg))
        self.codebook.data.copy_(torch.where(dead[..., None], codes, self.codebook))
        self.cluster_size.masked_fill_(dead, size)
        self.embed_avg.copy_(torch.where(dead[..., None], codes * size, self.embed_avg))

    @torch.no_grad()
    def _start_from_kmeans(self, z: Tensor, counted: Tensor | None) -> None:
        """Start the codebooks from k-means. z: (..., d); counted: (...) bool, or None for all."""
        if z.numel() == 0 and process_count(self.sync_kmeans) == 1:
            return  # nothing to start from: the next batch will do
        kept = self.codebook.data.view(-1, self.codebook_size, self.codebook_dim)
        rows = self._by_codebook(z).view(len(kept), -1, self.codebook_dim)
        masks = [None] * len(kept)
        if counted is not None:
            masks = self._by_codebook(counted[..., None]).view(len(kept), -1).unbind()
        started = []
        for codes, own, mask in zip(kept, rows, masks, strict=True):
            start: str | Tensor = self.kmeans_start
            if start == "random":
                # With fewer vectors than codes the rest stay what they are; the peer repeats vectors.
                drawn = random_vectors(own, self.codebook_size, mask=mask, sync=self.sync_kmeans)
                drawn = sum_over_processes(drawn, self.sync_kmeans)
                start = torch.where(drawn[:, -1:] > 0, drawn[:, :-1], codes)
            started.append(
                kmeans(
                    own,
                    self.codebook_size,
                    start=start,
                    iters=self.kmeans_iters,
                    mask=mask,
                    cosine=self.use_cosine_sim,
                    sync=self.sync_kmeans,
                )
            )
        self.codebook.data.copy_(torch.stack([result.centres for result in started]).view_as(self.codebook))
        counts = torch.stack([result.counts for result in started])
        self.cluster_size.copy_(counts.view_as(self.cluster_size).clamp(min=1))
        self.embed_avg.copy_(self.codebook * self.cluster_size[..., None])
        self.initialised.fill_(True)
        self._initialised = True

    def _by_codebook(self, values: Tensor) -> Tensor:
        """(..., d), or (..., H, d), to the vectors of each codebook: (N, d), or (H, N, d) for separate ones."""
        if self.separate_codebook_per_head:
            return values.flatten(0, -3).movedim(1, 0)
        return values.flatten(0, -2)

    def _stacked(self, indices: Tensor) -> Tensor:
        """Indices (..., H) of each head's own codebook to those in all of them one after another; -1 stays."""
        if not self.separate_codebook_per_head:
            return indices
        first = torch.arange(self.heads, device=indices.device) * self.codebook_size
        return torch.where(indices >= 0, indices + first, -1)

    def _per_head(self, values: Tensor) -> Tensor:
        """(B, ...) to (B, ..., H), or as it is with one head."""
        return values[..., None].expand(*values.shape, self.heads) if self.heads > 1 else values


@contextmanager
def accumulate_codebooks(model: nn.Module, passes: int = 1) -> Iterator[None]:
    """One step of every codebook's moving averages for all training passes within, at the end: gradient accumulation.

    Statistics of the passes add up in one packed [K, D + 1] buffer a codebook; leaving the context is one all-reduce
    each, so every process enters and leaves alike. Nothing moves where the body raises.

    Args:
        model: any module; its codebooks, wherever they are.
        passes: how many there will be, where that is known: dead codes then get vectors of all of them, and passes in
            one process end with the codebook that as many processes of one pass each would have.
    """
    quantizers = [module for module in model.modules() if isinstance(module, FollowingCodebook)]
    for quantizer in quantizers:
        quantizer.accumulating, quantizer._turn = True, (0, passes)
    try:
        yield
    except BaseException:
        for quantizer in quantizers:
            quantizer._pending = None
        raise
    finally:
        for quantizer in quantizers:
            quantizer.accumulating, quantizer._turn = False, (0, 1)
    for quantizer in quantizers:
        quantizer.update_codebook()

"""A vector quantiser as a module: projections, heads, search, and the losses that train the rest."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.nn.code_sampling import sample_code
from vqfast.nn.codebook import STARTS
from vqfast.nn.cross_entropy import code_cross_entropy
from vqfast.nn.following import FollowingCodebook
from vqfast.nn.layout import channels_last
from vqfast.nn.orthogonal import orthogonal_loss
from vqfast.nn.precision import full_precision
from vqfast.ops import Quantized, quantize
from vqfast.ops.checks import check_float, check_indices, check_mask
from vqfast.ops.reduction import ordered_sum


class LossBreakdown(NamedTuple):
    """The unweighted parts of VectorQuantize's loss, scalars; 0 in eval mode and where their weight is 0.

    commitment: mean |x - code|^2, or the cross entropy in its place.
    orthogonal_reg: mean squared cosine between codes.
    """

    commitment: Tensor
    orthogonal_reg: Tensor


class VectorQuantize(FollowingCodebook):
    """Replaces each vector by its nearest code; called as users of vector-quantize-pytorch call theirs.

    By default the codebook follows the vectors by exponential moving averages (van den Oord et al. 2017,
    appendix A.1, with Laplace smoothing of the counts) and the only loss is the commitment term. A learnable codebook
    is a parameter that the loss moves.

    The gradient of `quantized` passes straight through to the input, or by the rotation trick. Input of another float
    dtype than the codebook is cast to the codebook's for the search and the losses, and `quantized` is cast back: keep
    the module in float32 under mixed precision. With torch.distributed started, every process ends each step with the
    same codebook, at the price of one all-reduce. A training step reads nothing back from the device.

    A vector with a NaN or an infinity gets index 0, and the loss of its batch is not finite: a step of the optimiser by
    it ruins the network, so leave such steps out (`torch.amp.GradScaler` does). The codebook stays finite: of code 0
    such a batch counts nothing, and no code is revived by such a vector. The first batch, where k-means starts from it,
    must be finite.

    With `heads` = H, or another `codebook_dim` = d than D, vectors are projected to H d channels, each head's d are
    quantised on their own, and the result is projected back.

    Args:
        dim: D, channels of the input.
        codebook_size: K, number of codes.
        codebook_dim: d, size of a code; None for D.
        heads: H, codes a vector.
        separate_codebook_per_head: each head has its own codebook, in place of one for all.
        decay: of the moving averages; None makes the codebook learnable.
        eps: of the Laplace smoothing.
        freeze_codebook: never change the codebook (can be overridden in a call).
        kmeans_init: start the codebook from k-means over the first training batch.
        kmeans_iters: its iterations.
        kmeans_start: "random" or "afkmc2", what k-means starts from.
        sync_kmeans: over the batches of all processes.
        use_cosine_sim: vectors and codes are scaled to unit length, so the nearest code is that of the least angle.
        layernorm_after_project_in: LayerNorm of the projected input.
        threshold_ema_dead_code: a code whose moving-average count falls below this is replaced by a vector
            of the batch; 0 never replaces any. The choice is made on the device, without a sync.
        channel_last: input (B, ..., D) if true, (B, D, ...) if false.
        accept_image_fmap: input (B, D, H, W), indices (B, H, W).
        accept_3d_fmap: input (B, D, X, Y, Z), indices (B, X, Y, Z).
        commitment_weight: weight of mean |x - sg(code)|^2.
        codebook_weight: weight of mean |sg(x) - code|^2, used by a learnable codebook only. None makes one term of the
            two, commitment_weight * mean |x - code|^2.
        commitment_use_cross_entropy_loss: the commitment term is the cross entropy of the codes chosen under the
            softmax over -|x - code| (the cosine with use_cosine_sim).
        orthogonal_reg_weight: weight of the mean squared cosine between codes (`orthogonal_loss`). Makes the codebook
            a parameter, which the moving averages go on overwriting unless it is learnable.
        orthogonal_reg_active_codes_only: over the codes chosen in the batch.
        orthogonal_reg_max_codes: over so many of them, drawn at random.
        stochastic_sample_codes: in training, draw each code from softmax(-|x - code| / sample_codebook_temp).
        sample_codebook_temp: see above; 0 takes the nearest.
        rotation_trick: turn and scale the gradient as each vector was turned and scaled to reach its code (Fifty et
            al. 2024), in place of the straight-through estimator.
        sync_codebook: the moving averages are over the batches of all processes; None for where there are several.
        ema_update: follow by moving averages; None for where the codebook is not learnable.
        manual_ema_update: training moves the averages but not the codebook, which `update_ema` writes.
        learnable_codebook: the codebook is a parameter; None for where decay is None or ema_update False.
        return_zeros_for_masked_padding: the output where masked is 0 if true, the input if false.

    Buffers: codebook (K, d), a parameter where learnable; cluster_size (K,); embed_avg (K, d); idle (K,)
    int64, the number of training batches since each code was last chosen. With separate codebooks all begin with H.

    Raises:
        ValueError: a size, weight or decay out of range, options that exclude each other.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float | None = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        *,
        kmeans_start: str = "random",
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0.0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        codebook_weight: float | None = None,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        rotation_trick: bool = False,
        sync_codebook: bool | None = None,
        ema_update: bool | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        return_zeros_for_masked_padding: bool = True,
    ):
        super().__init__()
        codebook_dim = dim if codebook_dim is None else codebook_dim
        most = orthogonal_reg_max_codes
        for name, value in (
            ("dim", dim),
            ("codebook_size", codebook_size),
            ("codebook_dim", codebook_dim),
            ("heads", heads),
            ("orthogonal_reg_max_codes", 1 if most is None else most),
        ):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number in [0, 1) or None, got {decay}")
        if kmeans_start not in STARTS:
            raise ValueError(f"kmeans_start: expected one of {', '.join(STARTS)}, got {kmeans_start!r}")
        for name, value in (
            ("commitment_weight", commitment_weight),
            ("codebook_weight", codebook_weight or 0.0),
            ("threshold_ema_dead_code", threshold_ema_dead_code),
            ("orthogonal_reg_weight", orthogonal_reg_weight),
            ("sample_codebook_temp", sample_codebook_temp),
        ):
            if value < 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {value}")
        if learnable_codebook is None:
            learnable_codebook = decay is None or ema_update is False
        if ema_update is None:
            ema_update = not learnable_codebook
        if ema_update and (learnable_codebook or decay is None):
            raise ValueError("ema_update: expected False or None with a learnable codebook or decay=None, got True")
        if learnable_codebook and use_cosine_sim:
            raise ValueError("use_cosine_sim: expected False with a learnable codebook, whose codes leave the sphere")

        self.dim, self.codebook_size, self.codebook_dim = dim, codebook_size, codebook_dim
        self.heads, self.separate_codebook_per_head = heads, separate_codebook_per_head and heads > 1
        self.learnable_codebook, self.ema_update = learnable_codebook, ema_update
        self.manual_ema_update = manual_ema_update
        # A learnable codebook keeps the averages too: dead codes are found by them.
        self.decay = 0.99 if decay is None else decay
        self.eps = eps
        self.use_cosine_sim = use_cosine_sim
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        self.commitment_use_cross_entropy_loss = commitment_use_cross_entropy_loss
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.stochastic_sample_codes, self.sample_codebook_temp = stochastic_sample_codes, sample_codebook_temp
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.kmeans_iters, self.kmeans_start, self.sync_kmeans = kmeans_iters, kmeans_start, sync_kmeans
        self.sync_codebook = sync_codebook is not False
        self.freeze_codebook = freeze_codebook
        self.estimator = "rotation" if rotation_trick else "ste"
        self.accept_image_fmap, self.accept_3d_fmap = accept_image_fmap, accept_3d_fmap
        self.channel_first = accept_image_fmap or accept_3d_fmap or not channel_last
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding

        width = heads * codebook_dim
        self.has_projections = width != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in, self.project_out = nn.Linear(dim, width), nn.Linear(width, dim)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(width))

        stacked = (heads,) if self.separate_codebook_per_head else ()
        codes = torch.empty(*stacked, codebook_size, codebook_dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        if use_cosine_sim:
            codes = F.normalize(codes, dim=-1)
        self._begin(codes, parameter=learnable_codebook or orthogonal_reg_weight > 0, kmeans_init=kmeans_init)

    # ---- forward -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        *,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        weights: Tensor | None = None,
        ema_update_weight: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None,
        accum_ema_update: bool = False,
    ) -> tuple[Tensor, ...]:
        """Quantise, and in training mode let the codebook follow.

        Args:
            x: (B, ..., D) float, or (B, D, ...) as configured.
            indices: (B, ...) int64, or (B, ..., H): return quantized and the cross entropy of these codes under the
                softmax over -|x - code| (the cosine with use_cosine_sim), mean over those that are not -1.
            mask: (B, ...) bool, True where a vector counts. Elsewhere the index is -1 and the output 0, and neither the
                loss nor the codebook sees the vector.
            lens: (B,) the same as lengths, for one dimension of positions.
            sample_codebook_temp: in place of the constructor's.
            freeze_codebook: leave the codebook as it is in this call.
            return_loss_breakdown: return the parts of the loss too.
            weights: (B, ...) float, how much each vector counts in the moving averages.
            ema_update_weight: factor of 1 - decay, (K,) or (H, K), or a function of sums and counts that gives it.
            accum_ema_update: keep the statistics of this call for the next update of the codebook.

        Returns:
            quantized: shape and dtype of x.
            indices: (B, ...) int64, (B, ..., H) with several heads.
            loss: scalar, the commitment term (plus the others asked for); 0 in eval mode.
            breakdown: LossBreakdown, only where asked for.

        Raises:
            TypeError: an input that is no float tensor, a mask that is not bool.
            ValueError: a shape that does not fit.
        """
        vectors = self._channels_last(x)
        mask = self._mask(vectors, mask, lens)
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        follow = self.training and not frozen
        if indices is not None:
            check_indices(indices, self.codebook_size, least=-1)
        z = self._project(vectors, mask)  # (B, ..., d), or (B, ..., H, d)
        counted = None if mask is None else self._per_head(mask)
        temperature = self.sample_codebook_temp if sample_codebook_temp is None else sample_codebook_temp
        learns = self.learnable_codebook and not frozen
        with full_precision(x):
            if follow and not self._initialised:
                self._start_from_kmeans(z.detach(), counted)
            codebook = self.codebook if learns else self.codebook.detach()
            if follow:  # backward reads the codes that were looked up, and the update below writes in place
                codebook = codebook.clone()
            result = self._quantize(z, codebook, counted, temperature, learns)
            if follow:
                self._follow(z.detach(), result.indices, weights, ema_update_weight, accum_ema_update)
            if indices is None:
                loss, parts = self._losses(z, codebook, result, learns)
            else:
                loss = self._cross_entropy(z, codebook, indices)
        quantized = self._output(result.quantized, vectors, mask)
        if indices is not None:
            return quantized, loss
        return (quantized, result.indices, loss, parts) if return_loss_breakdown else (quantized, result.indices, loss)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes before project_out: (B, ..., d), heads side by side, channels where the input has them; 0 for -1.

        Args:
            indices: (B, ...) int64, or (B, ..., H).

        Raises:
            TypeError, ValueError: another dtype or shape, or an index of no code.
        """
        codes = self._codes(indices)
        return codes.movedim(-1, 1) if self.channel_first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """`quantized` of these indices: (B, ..., D), or (B, D, ...) where the input is channel-first."""
        output = self.project_out(self._codes(indices))
        return output.movedim(-1, 1) if self.channel_first else output

    def _channels_last(self, x: Tensor) -> Tensor:
        check_float("x", x)
        for accepted, ndim, layout in (
            (self.accept_image_fmap, 4, f"(B, {self.dim}, H, W)"),
            (self.accept_3d_fmap, 5, f"(B, {self.dim}, X, Y, Z)"),
        ):
            if accepted and x.ndim != ndim:
                raise ValueError(f"x: expected shape {layout}, got {tuple(x.shape)}")
        return channels_last(x, self.dim, self.channel_first)

    @staticmethod
    def _mask(vectors: Tensor, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
        """Which vectors (B, ..., D) count, of `mask` or `lens`."""
        if lens is not None:
            if mask is not None:
                raise ValueError("lens: expected None with a mask, got both")
            if vectors.ndim != 3 or lens.shape != vectors.shape[:1]:
                raise ValueError(
                    f"lens: expected shape (B,) with x of one dimension of positions, got {tuple(lens.shape)} with "
                    f"positions {tuple(vectors.shape[:-1])}"
                )
            mask = torch.arange(vectors.shape[1], device=vectors.device) < lens[:, None]
        if mask is not None:
            check_mask(mask, vectors)
        return mask

    def _project(self, vectors: Tensor, mask: Tensor | None) -> Tensor:
        """(B, ..., D) to (B, ..., d), or (B, ..., H, d) with several heads, in the codebook's dtype."""
        if mask is not None:  # padding may hold anything, and zero times that is not always zero
            vectors = torch.where(mask[..., None], vectors, 0)
        if self.has_projections:
            vectors = self.project_in(vectors.to(next(self.project_in.parameters()).dtype))
        z = vectors.to(self.codebook.dtype)
        if self.heads > 1:
            z = z.unflatten(-1, (self.heads, self.codebook_dim))
        return F.normalize(z, dim=-1, eps=1e-6) if self.use_cosine_sim else z

    def _output(self, codes: Tensor, vectors: Tensor, mask: Tensor | None) -> Tensor:
        """Codes (B, ..., d) or (B, ..., H, d) to the channels, layout and dtype of the input (B, ..., D)."""
        output = codes.flatten(-2) if self.heads > 1 else codes
        if self.has_projections:
            output = self.project_out(output)
        output = output.to(vectors.dtype)
        if mask is not None and (self.has_projections or not self.return_zeros_for_masked_padding):
            output = torch.where(mask[..., None], output, 0 if self.return_zeros_for_masked_padding else vectors)
        return output.movedim(-1, 1) if self.channel_first else output

    def _quantize(
        self, z: Tensor, codebook: Tensor, mask: Tensor | None, temperature: float, learns: bool
    ) -> Quantized:
        """`quantize` of every head's vectors in its codebook.

        On the unit sphere the nearest code is that of the largest cosine: |z - c|^2 = 2 - 2 <z, c>.
        """
        beta, codebook_weight = self._error_weights(learns)
        indices = None
        if self.training and self.stochastic_sample_codes and temperature > 0:
            indices = self._sample(z, codebook, temperature)
        return quantize(
            z,
            codebook,
            beta=beta,
            codebook_weight=codebook_weight,
            estimator=self.estimator,
            mask=mask,
            indices=indices,
        )

    def _sample(self, z: Tensor, codebook: Tensor, temperature: float) -> Tensor:
        if not self.separate_codebook_per_head:
            return sample_code(z, codebook, temperature, cosine=self.use_cosine_sim)
        heads = zip(z.unbind(-2), codebook, strict=True)
        return torch.stack([sample_code(*own, temperature, cosine=self.use_cosine_sim) for own in heads], dim=-1)

    def _codes(self, indices: Tensor) -> Tensor:
        """(B, ...) or (B, ..., H) to (B, ..., H d); 0 where the index is -1."""
        check_indices(indices, self.codebook_size, least=-1)
        if self.heads > 1 and indices.shape[-1:] != (self.heads,):
            raise ValueError(f"indices: expected shape (B, ..., {self.heads}), got {tuple(indices.shape)}")
        codes = F.embedding(self._stacked(indices.clamp(min=0)), self.codebook.reshape(-1, self.codebook_dim))
        codes = torch.where(indices[..., None] >= 0, codes, 0)
        return codes.flatten(-2) if self.heads > 1 else codes

    # ---- losses ------------------------------------------------------------------------------------------------------

    def _error_weights(self, learns: bool) -> tuple[float, float]:
        """Weights of mean |z - code|^2 in the gradients of the vectors and of the codes."""
        if self.commitment_use_cross_entropy_loss:
            return 0.0, 0.0
        own = self.commitment_weight if self.codebook_weight is None else self.codebook_weight
        return self.commitment_weight, own if learns else 0.0

    def _losses(self, z: Tensor, codebook: Tensor, result: Quantized, learns: bool) -> tuple[Tensor, LossBreakdown]:
        none = torch.zeros_like(result.loss)
        if not self.training:
            return none, LossBreakdown(none, none)
        if self.commitment_use_cross_entropy_loss:
            commitment = self._cross_entropy(z, codebook, result.indices) if self.commitment_weight > 0 else none
            loss = self.commitment_weight * commitment
        else:
            loss, weight = result.loss, sum(self._error_weights(learns))
            if learns and self.codebook_weight is None:
                # One term whose gradient reaches both sides: the value counts it once.
                loss, weight = loss - loss.detach() / 2, weight / 2
            commitment = loss / weight if weight > 0 else none
        if self.orthogonal_reg_weight == 0:
            return loss, LossBreakdown(commitment, none)
        # A copy: another call before backward may write the codebook.
        orthogonal = orthogonal_loss(
            self.codebook.clone(),
            result.counts > 0 if self.orthogonal_reg_active_codes_only else None,
            self.orthogonal_reg_max_codes,
        )
        return loss + self.orthogonal_reg_weight * orthogonal, LossBreakdown(commitment, orthogonal)

    def _cross_entropy(self, z: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
        if indices.shape != z.shape[:-1]:
            raise ValueError(f"indices: expected shape {tuple(z.shape[:-1])}, got {tuple(indices.shape)}")
        if self.separate_codebook_per_head:
            losses = [
                code_cross_entropy(z[..., head, :], codebook[head], indices[..., head], cosine=self.use_cosine_sim)
                for head in range(self.heads)
            ]
            loss = torch.stack(losses)
        else:
            loss = code_cross_entropy(z, codebook, indices, cosine=self.use_cosine_sim)
        return ordered_sum(loss) / (indices >= 0).sum().clamp(min=1)

    def extra_repr(self) -> str:
        learned = "learnable" if self.learnable_codebook else f"decay={self.decay}"
        heads = f"heads={self.heads}, " if self.heads > 1 else ""
        cosine = ", use_cosine_sim=True" if self.use_cosine_sim else ""
        return f"dim={self.dim}, codebook_size={self.codebook_size}, {heads}{learned}{cosine}"

"""Lookup-free quantisation: the signs of the channels are the code."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast.nn.constants import register_constant
from vqfast.nn.lookup_free import LookupFreeQuantizer
from vqfast.nn.peer_checkpoints import drop_powers_of_two
from vqfast.nn.precision import full_precision


class LFQOutput(NamedTuple):
    """What `LFQ` returns.

    quantized: shape and dtype of the input.
    indices: (B, ...) int64, or (B, ..., num_codebooks).
    entropy_aux_loss: scalar, the weighted sum of all losses; 0 in eval mode.
    """

    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class LFQLosses(NamedTuple):
    """The unweighted parts of LFQ's loss, scalars; 0 in eval mode.

    per_sample_entropy: in nats, mean over vectors.
    batch_entropy: in nats, of the mean distribution over codes.
    commitment: mean squared error.
    """

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class LFQ(LookupFreeQuantizer):
    """Each channel becomes its sign, times codebook_scale: 2^d codes and no table (Yu et al. 2023, MAGVIT-v2).

    The index reads the signs as binary digits, first channel highest. In training mode gradients pass straight
    through the signs, and the loss is, with weights, mean H(p_n) - diversity_gamma H(mean p_n) + commitment.
    p_n is the softmax over all K = 2^d codes of 2 inv_temperature <z_n, code>: a product over independent bits
    of logit 4 inv_temperature scale z_ni. Both entropies are computed exactly from that, and no N x K array
    is ever made:

    - H(p_n) is the sum of the entropies of the bits: O(N d).
    - The mean distribution does not factorise. Its first d/2 bits and its last give two arrays of N x sqrt(K), and
      mean p_n is their matrix product over n: O(N K) multiply-adds, O(N sqrt(K) + K) memory.

    The peer library cuts probabilities off at 1e-5 inside the logarithm; this does not: its batch entropy goes on
    rising to log K beyond 100,000 codes. The mean is over this process's batch.

    Quantisation and losses run in float32 (float64 for float64 input), also under autocast.

    Args:
        dim: channels of the input; None for log2(codebook_size) * num_codebooks. Others are projected linearly.
        codebook_size: K, a power of two; None for 2^dim.
        entropy_loss_weight: of the difference of entropies; at 0 they are not computed.
        commitment_loss_weight: of mean |z - sg(code)|^2.
        diversity_gamma: weight of the batch entropy within that difference.
        num_codebooks: codes a vector.
        keep_num_codebooks_dim: indices (..., num_codebooks) rather than (...); None for several codebooks.
        codebook_scale: magnitude of a channel of a code.
        has_projections: None for where dim differs from log2(codebook_size) * num_codebooks.
        projection_has_bias: of the projections.
        soft_clamp_input_value: c, at least codebook_scale: z becomes c tanh(z / c) first.
        channel_first: input (B, dim, ...); None for input of four or more dimensions only.
        spherical: vectors and codes are scaled to length codebook_scale (Zhao et al. 2024, binary spherical
            quantisation).

    Raises:
        ValueError: neither size given, one that does not fit, or a weight below 0.
    """

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        channel_first: bool | None = None,
        spherical: bool = False,
    ):
        if codebook_size is None:
            if dim is None or not 1 <= dim < 63:
                raise ValueError(f"codebook_size: expected a power of two, or dim in 1..62 in its place, got dim={dim}")
            codebook_size = 2**dim
        bits = codebook_size.bit_length() - 1
        if not 1 <= bits < 63 or codebook_size != 2**bits:
            raise ValueError(f"codebook_size: expected a power of two in 2..2^62, got {codebook_size}")
        weights = {
            "entropy_loss_weight": entropy_loss_weight,
            "commitment_loss_weight": commitment_loss_weight,
            "diversity_gamma": diversity_gamma,
        }
        for name, value in weights.items():
            if value < 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {value}")
        if codebook_scale <= 0:
            raise ValueError(f"codebook_scale: expected a number above 0, got {codebook_scale}")
        if soft_clamp_input_value is not None and soft_clamp_input_value < codebook_scale:
            raise ValueError(
                f"soft_clamp_input_value: expected at least codebook_scale = {codebook_scale}, "
                f"got {soft_clamp_input_value}"
            )
        super().__init__(
            dim, bits, num_codebooks, keep_num_codebooks_dim, channel_first, has_projections, projection_has_bias
        )
        self.codebook_size = codebook_size
        self.entropy_loss_weight, self.diversity_gamma = entropy_loss_weight, diversity_gamma
        self.commitment_loss_weight = commitment_loss_weight
        self.codebook_scale, self.spherical = codebook_scale, spherical
        self.soft_clamp_input_value = soft_clamp_input_value
        self.magnitude = codebook_scale * bits**-0.5 if spherical else codebook_scale
        self.register_load_state_dict_pre_hook(drop_powers_of_two)
        register_constant(self, "_place", [2**place for place in range(bits - 1, -1, -1)])

    def forward(
        self,
        x: Tensor,
        inv_temperature: float = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
    ) -> LFQOutput | tuple[LFQOutput, LFQLosses]:
        """Quantise.

        Args:
            x: (B, ..., dim) float, or (B, dim, ...) where channel-first.
            inv_temperature: of the distribution over codes in the entropies.
            return_loss_breakdown: return LFQLosses too.
            mask: (B, ...) bool, the vectors that count in the losses; quantized and indices are those of all.

        Returns:
            LFQOutput(quantized, indices, entropy_aux_loss), or that and LFQLosses.

        Raises:
            TypeError: not a float tensor.
            ValueError: a shape that does not fit.
        """
        z = self._split(x)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != z.shape[:-2]):
            raise ValueError(
                f"mask: expected bool of shape {tuple(z.shape[:-2])}, got {mask.dtype} {tuple(mask.shape)}"
            )
        if self.soft_clamp_input_value is not None:
            z = torch.tanh(z / self.soft_clamp_input_value) * self.soft_clamp_input_value
        if self.spherical:
            z = F.normalize(z, dim=-1) * self.codebook_scale
        bits = z > 0
        codes = (2 * bits.to(z.dtype) - 1) * self.magnitude
        indices = self._shown((bits * self._place).sum(-1))
        losses = self._losses(z, codes, inv_temperature, return_loss_breakdown, mask)
        if self.training:
            # Adding 0 with the gradient of z: the codes stay what they are to the last bit.
            codes = codes + (z - z.detach())
        loss = self.entropy_loss_weight * (losses.per_sample_entropy - self.diversity_gamma * losses.batch_entropy)
        loss = loss + self.commitment_loss_weight * losses.commitment
        output = LFQOutput(self._merge(codes, x.dtype), indices, loss)
        return (output, losses) if return_loss_breakdown else output

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """Inverse of forward's indices: its quantized, in the layout of the input, float32.

        Without project_out, in log2(codebook_size) * num_codebooks channels.
        """
        codes = self._codes(self._taken(indices))
        if project_out:
            return self._merge(codes)
        codes = codes.flatten(-2)
        return codes.movedim(-1, 1) if self._is_channel_first(codes.ndim) else codes

    @property
    def codebook(self) -> Tensor:
        """Every code in order of its index: (codebook_size, log2(codebook_size)) float32, computed at each call."""
        return self._codes(torch.arange(self.codebook_size, device=self._place.device))

    def _codes(self, indices: Tensor) -> Tensor:
        return torch.where((indices.unsqueeze(-1) & self._place) != 0, self.magnitude, -self.magnitude)

    def _losses(
        self, z: Tensor, codes: Tensor, inv_temperature: float, all_parts: bool, mask: Tensor | None
    ) -> LFQLosses:
        """z, codes: (B, ..., C, d); mask: (B, ...)."""
        zero = z.new_zeros(())
        if not self.training:
            return LFQLosses(zero, zero, zero)
        rows = z.flatten(0, -3)  # (N, C, d)
        # Weights in place of a selection: their number is not needed on the host.
        counted = rows.new_ones(len(rows)) if mask is None else mask.flatten().to(rows.dtype)
        weights = counted / counted.sum().clamp(min=1)
        per_sample = batch = commitment = zero
        if all_parts or self.entropy_loss_weight > 0:
            logits = rows * (4 * inv_temperature * self.magnitude)
            per_sample = (_binary_entropy(logits).sum(-1).mean(-1) * weights).sum()
            batch = _entropy(_mean_distribution(logits, weights)).mean()
        if all_parts or self.commitment_loss_weight > 0:
            error = (rows - codes.flatten(0, -3)).square().mean((-2, -1))
            commitment = (error * weights).sum()
        return LFQLosses(per_sample, batch, commitment)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}, num_codebooks={self.num_codebooks}"


def _binary_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of a bit of these logits; through |logit|, where no two large numbers cancel."""
    size = logits.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)


def _entropy(probability: Tensor) -> Tensor:
    """Entropy over the last dimension. The clamp keeps the gradient of p log p finite where p underflowed to 0."""
    return -(probability * probability.clamp(min=torch.finfo(probability.dtype).tiny).log()).sum(-1)


def _joint(logits: Tensor) -> Tensor:
    """(N, C, d) logits of independent bits to the probabilities (N, C, 2^d) of their values, first bit highest."""
    joint = logits.new_ones(*logits.shape[:-1], 1)
    for bit in logits.unbind(-1):
        bit = torch.stack([torch.sigmoid(-bit), torch.sigmoid(bit)], dim=-1)
        joint = (joint[..., :, None] * bit[..., None, :]).flatten(-2)
    return joint


def _mean_distribution(logits: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights_n p_n: (N, C, d) logits of bits and (N,) weights to (C, 2^d)."""
    half = logits.shape[-1] // 2
    high, low = _joint(logits[..., :half]), _joint(logits[..., half:])
    # bfloat16 products would put an error of 0.4 % on every probability.
    with full_precision(logits):
        return torch.einsum("n,nca,ncb->cab", weights, high, low).flatten(-2)

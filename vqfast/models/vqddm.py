"""VQ-DDM (arXiv 2112.01799): discrete diffusion over the codes of a vector-quantised auto-encoder."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqfast.diffusion import (
    Absorbing,
    DiscreteDiffusion,
    Gaussian,
    Marginal,
    MaskAndReplace,
    SymmetricRate,
    Transition,
    Uniform,
    WindowedDenoiser,
    gaussian_betas,
    interpolate,
    mask_and_replace,
    sample,
    sample_by_confidence,
    schedule,
)
from vqfast.models.batch import entry
from vqfast.models.conditioning import batch_labels, check_guidance, flat_codes, known_codes, sampling_labels
from vqfast.models.drawing import check_count, evaluating
from vqfast.models.transformer import Transformer
from vqfast.models.unet import UNet
from vqfast.ops import neighbour_rate

DENOISERS = ("unet", "transformer")
TRANSITIONS = ("uniform", "absorbing", "mask_and_replace", "marginal", "gaussian", "nearest")
DECODINGS = ("chain", "confidence")


@dataclass
class VQDDMConfig:
    """Everything that makes a VQDDM; plain values, so that `dataclasses.asdict` goes through JSON and back.

    The defaults are the paper's model; `schedule="cosine_released"` is the one that its authors trained.

    codebook_size: K of the auto-encoder. grid: (H, W) of its codes.
    denoiser: "unet" (sizes: dim, mults) or "transformer" (sizes: dim, depth, heads).
    transition: family of the forward chain, one of TRANSITIONS, see vqfast.ops. T, schedule: its tables, see
        vqfast.diffusion.schedules; for "mask_and_replace" also "vq_diffusion", the tables of that paper's code.
    mask_share: for "mask_and_replace", which share of the noise is the mask state. marginal: for "marginal", the K
        probabilities of the noise, such as `smoothed_frequencies` of the training codes. betas: for "gaussian", in
        place of schedule, the first and the last width of a step, see vqfast.diffusion.gaussian_betas. neighbours,
        nearest: for "nearest", how many neighbours a code has, and which: (K, neighbours) code numbers, such as
        vqfast.ops.embedding_neighbours(codebook, neighbours).tolist(). Not with the rule "marginal".
    num_classes: None for an unconditional model. class_dropout: share of labels dropped in training, which
        guidance and unconditional samples need.
    rule, parameterisation, aux_weight, aux_schedule, time_sampling, weighting: see vqfast.diffusion.DiscreteDiffusion.
    """

    codebook_size: int
    grid: tuple[int, int] = (16, 16)
    denoiser: str = "unet"
    dim: int = 128
    mults: tuple[int, ...] = (1, 2, 4, 8)
    depth: int = 12
    heads: int = 8
    transition: str = "uniform"
    T: int = 4000
    schedule: str = "cosine"
    mask_share: float = 0.9
    marginal: tuple[float, ...] | None = None
    betas: tuple[float, float] = (1e-4, 0.02)
    neighbours: int | None = None
    nearest: tuple[tuple[int, ...], ...] | None = None
    num_classes: int | None = None
    class_dropout: float = 0.1
    rule: str = "joint"
    parameterisation: str = "x0"
    aux_weight: float = 0.0
    aux_schedule: str = "constant"
    time_sampling: str = "importance"
    weighting: str = "elbo"

    def __post_init__(self):
        self.grid, self.mults = tuple(self.grid), tuple(self.mults)  # JSON has lists only
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"grid: expected two positive numbers (H, W), got {self.grid}")
        if self.denoiser not in DENOISERS:
            raise ValueError(f"denoiser: expected one of {', '.join(DENOISERS)}, got {self.denoiser!r}")
        if self.transition not in TRANSITIONS:
            raise ValueError(f"transition: expected one of {', '.join(TRANSITIONS)}, got {self.transition!r}")
        if not 0 <= self.mask_share <= 1:
            raise ValueError(f"mask_share: expected a share in 0..1, got {self.mask_share!r}")
        self.betas = tuple(self.betas)
        if len(self.betas) != 2 or not min(self.betas) > 0:
            raise ValueError(f"betas: expected two numbers above 0, got {self.betas}")
        if self.marginal is not None:
            self.marginal = tuple(float(p) for p in self.marginal)
        if self.transition == "marginal" and len(self.marginal or ()) != self.codebook_size:
            raise ValueError(
                f"marginal: expected {self.codebook_size} probabilities for the transition 'marginal', "
                f"got {None if self.marginal is None else len(self.marginal)}"
            )
        if self.nearest is not None:
            self.nearest = tuple(tuple(codes) for codes in self.nearest)
        if self.transition == "nearest":
            self._check_nearest()

    def _check_nearest(self) -> None:
        K, n = self.codebook_size, self.neighbours
        if self.rule == "marginal":
            raise ValueError(
                "rule: expected 'joint' for the transition 'nearest', got 'marginal', which divides by probabilities "
                "that are known to 1e-15 at best"
            )
        if n is None or not 1 <= n < K:
            raise ValueError(f"neighbours: expected 1..{K - 1} (codebook_size = {K}), got {n!r}")
        expected = f"nearest: expected {n} other codes of each of {K} for the transition 'nearest'"
        if self.nearest is None or len(self.nearest) != K:
            raise ValueError(f"{expected}, got {None if self.nearest is None else f'those of {len(self.nearest)}'}")
        for code, others in enumerate(self.nearest):
            if len(others) != n or len(set(others) - {code}) != n or not (0 <= min(others) and max(others) < K):
                raise ValueError(f"{expected}, got {list(others)} of code {code}")


def smoothed_frequencies(counts: Tensor) -> tuple[float, ...]:
    """Probabilities for the transition "marginal": each code counted once more, so that none has probability 0.

    Args:
        counts: (K,) int64, how often each code occurs in the training images.
    """
    return tuple(((counts + 1).double() / (counts + 1).sum()).tolist())


def build_transition(config: VQDDMConfig) -> Transition:
    """The forward chain that the configuration names."""
    K = config.codebook_size
    if config.transition == "mask_and_replace" and config.schedule == "vq_diffusion":
        return MaskAndReplace(K, *mask_and_replace(config.T))
    if config.transition == "gaussian":
        return Gaussian(K, gaussian_betas(config.T, first=config.betas[0], last=config.betas[1]))
    alpha_bar = schedule(config.schedule, config.T)
    if config.transition == "absorbing":
        return Absorbing(K, alpha_bar)
    if config.transition == "mask_and_replace":
        return MaskAndReplace(K, alpha_bar, config.mask_share * (1 - alpha_bar))
    if config.transition == "marginal":
        return Marginal(torch.tensor(config.marginal, dtype=torch.float64, device="cpu"), alpha_bar)
    if config.transition == "nearest":
        return _neighbour_noise(torch.tensor(config.nearest, device="cpu"), alpha_bar)
    return Uniform(K, alpha_bar)


def _neighbour_noise(nearest: Tensor, alpha_bar: Tensor) -> SymmetricRate:
    noise = SymmetricRate(neighbour_rate(nearest), alpha_bar=alpha_bar)
    if noise.groups > 1:
        # Samples start anywhere: one that starts among codes that images never have could not get away from them.
        raise ValueError(
            f"neighbours: {nearest.shape[1]} of each code leave {noise.groups} groups of codes that no noise connects; "
            "expected more"
        )
    return noise


def _build_denoiser(config: VQDDMConfig) -> nn.Module:
    common = dict(
        grid=config.grid,
        T=config.T,
        dim=config.dim,
        mask_state=config.transition in ("absorbing", "mask_and_replace"),
        num_classes=config.num_classes,
        class_dropout=config.class_dropout,
    )
    if config.denoiser == "unet":
        return UNet(config.codebook_size, mults=config.mults, **common)
    return Transformer(config.codebook_size, depth=config.depth, heads=config.heads, **common)


class VQDDM(nn.Module):
    """A generative model of grids of codes.

    Batches are mappings: "codes", (B, H, W) or (B, L) int64; with classes also "label", (B,) int64.

    Args:
        config: the model's make.

    Raises:
        ValueError: a configuration that does not fit together.
    """

    def __init__(self, config: VQDDMConfig):
        super().__init__()
        self.config = config
        self.denoiser = _build_denoiser(config)
        self.diffusion = DiscreteDiffusion(
            build_transition(config),
            rule=config.rule,
            parameterisation=config.parameterisation,
            aux_weight=config.aux_weight,
            aux_schedule=config.aux_schedule,
            time_sampling=config.time_sampling,
            weighting=config.weighting,
        )

    @property
    def device(self) -> torch.device:
        return self.denoiser.head.weight.device

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits of the clean codes, (B, L, K), from codes x_t (B, L) at levels t (B,)."""
        return self.diffusion.predict(self.denoiser, x_t, t, labels)

    def training_step(self, batch: Mapping[str, Tensor], step: int = 0) -> dict[str, Tensor]:
        """Loss of one batch.

        Returns:
            "loss": scalar with gradient, bits per code, an estimate of the bound (plus the auxiliary term);
            "bits_per_dim": the bound alone, detached.

        Raises:
            TypeError, ValueError: codes that are not on the grid, or labels that are missing or out of range.
        """
        codes, labels = self._read(batch)
        loss, bits = self.diffusion(self.denoiser, codes, labels)
        return {"loss": loss, "bits_per_dim": bits}

    @torch.no_grad()
    def evaluate_step(self, batch: Mapping[str, Tensor], step: int = 0) -> dict[str, Tensor]:
        """The training figures of a batch that is not trained on: no dropout, nothing recorded.

        One unbiased draw; `bits_per_dim` gives the whole bound, at one denoiser call per noise level.
        """
        with evaluating(self):
            result = self.training_step(batch, step)
        return {name: value.detach() for name, value in result.items()}

    @torch.no_grad()
    def bits_per_dim(
        self,
        codes: Tensor,
        labels: Tensor | int | None = None,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Bound on -log2 p(codes) per code, (B,) float64.

        Args:
            codes: (B, H, W) or (B, L) int64.
            labels: (B,) int64, or one class for all.
            steps: None for the model's T steps; n for the looser bound of sampling in n steps.
            generator: source of the random numbers.
        """
        codes = self._flat("codes", codes)
        labels = self._labels(labels, codes.shape[0])
        with evaluating(self):
            return self.diffusion.bits_per_dim(self.denoiser, codes, labels, steps=steps, generator=generator)

    def sample(
        self,
        n: int,
        labels: Tensor | int | None = None,
        *,
        steps: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        decoding: str = "chain",
        choice_temperature: float = 4.5,
        grid: tuple[int, int] | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw n grids of codes.

        Args:
            n: how many, at least 1.
            labels: (n,) int64 classes, or one class for all; None draws without a class.
            steps: denoiser calls per grid, 1..T; None takes all T, or 8 in decoding by confidence.
            temperature: divides the logits.
            top_k, top_p: draw among the most likely codes only, see vqfast.ops.p_sample.
            guidance_scale: strength of classifier-free guidance; 1 is none.
            decoding: "chain", the reverse of the noise, or with the transition "absorbing" also "confidence": what the
                model is surest of first, see vqfast.diffusion.sample_by_confidence.
            choice_temperature: of decoding by confidence.
            grid: (H, W) of what to draw, at least the model's, which then looks through windows of its own size that
                overlap by half, see vqfast.diffusion.WindowedDenoiser. None for the model's.
            batch_size: grids at a time; None takes all n at once.
            generator: source of the random numbers.
            progress: show a bar.

        Returns:
            (n, H, W) int64.

        Raises:
            TypeError, ValueError: labels missing, not wanted or out of range; guidance without labels, or of a model
                trained without class_dropout; temperature or filters out of range; steps not in 1..T; a grid smaller
                than the model's; decoding by confidence of a model with another transition.
        """
        check_count(n)
        return self._draw(
            n, None, labels, guidance_scale, grid=grid, decoding=decoding, choice_temperature=choice_temperature,
            steps=steps, temperature=temperature, top_k=top_k, top_p=top_p, batch_size=batch_size,
            generator=generator, progress=progress,
        )  # fmt: skip

    def inpaint(
        self,
        codes: Tensor,
        mask: Tensor,
        labels: Tensor | int | None = None,
        *,
        steps: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        decoding: str = "chain",
        choice_temperature: float = 4.5,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw codes where `mask` is true, given the others, which come back as they are.

        Args:
            codes: (B, H, W) or (B, L) int64; under the mask any value.
            mask: bool, of the shape of `codes`, or (H, W) or (L,) for all of them: true where to draw.
            labels and the rest: as for `sample`.

        Returns:
            (B, H, W) int64.

        Raises:
            TypeError, ValueError: as `sample`; a mask that is not bool or does not fit.
        """
        known = known_codes(codes, mask, self.config.grid, self.config.codebook_size).to(self.device)
        return self._draw(
            len(known), known, labels, guidance_scale, decoding=decoding, choice_temperature=choice_temperature,
            steps=steps, temperature=temperature, top_k=top_k, top_p=top_p, batch_size=batch_size,
            generator=generator, progress=progress,
        )  # fmt: skip

    def interpolate(
        self,
        first: Tensor,
        second: Tensor,
        labels: Tensor | int | None = None,
        *,
        level: int,
        weight: float = 0.5,
        steps: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw grids of codes between two, see vqfast.diffusion.interpolate.

        Args:
            first, second: (B, H, W) or (B, L) int64.
            level: noise level in 1..T that both are taken to: low keeps what they agree on, T forgets both.
            weight: share of the second, 0..1.
            steps: denoiser calls, 1..level; None takes every level.
            labels and the rest: as for `sample`.

        Returns:
            (B, H, W) int64.

        Raises:
            TypeError, ValueError: as `sample`; level or weight out of range; codes that do not fit.
        """
        first, second = (
            self._flat(name, codes).to(self.device) for name, codes in (("first", first), ("second", second))
        )
        labels = self._labels(labels, len(first))
        check_guidance(guidance_scale, labels, self.config.num_classes, self.config.class_dropout)
        with evaluating(self):
            codes = interpolate(
                self, first, second, self.diffusion.transition, level=level, weight=weight, rule=self.config.rule,
                labels=labels, steps=steps, temperature=temperature, top_k=top_k, top_p=top_p,
                guidance_scale=guidance_scale, batch_size=batch_size, generator=generator, progress=progress,
            )  # fmt: skip
        return codes.view(-1, *self.config.grid)

    def _draw(
        self,
        n: int,
        known: Tensor | None,
        labels: Tensor | int | None,
        guidance_scale: float,
        *,
        grid: tuple[int, int] | None = None,
        decoding: str,
        choice_temperature: float,
        steps: int | None,
        **options,
    ) -> Tensor:
        """(n, H, W) codes; known: (n, L) with -1 where to draw, None to draw all."""
        labels = self._labels(labels, n)
        check_guidance(guidance_scale, labels, self.config.num_classes, self.config.class_dropout)
        if decoding not in DECODINGS:
            raise ValueError(f"decoding: expected one of {', '.join(DECODINGS)}, got {decoding!r}")
        if decoding == "confidence" and self.config.transition != "absorbing":
            raise ValueError(
                f"decoding: 'confidence' needs the transition 'absorbing', this model has {self.config.transition!r}"
            )
        grid, denoiser = self.config.grid if grid is None else tuple(grid), self
        if grid != self.config.grid:
            if len(grid) != 2 or any(size < own for size, own in zip(grid, self.config.grid, strict=True)):
                raise ValueError(f"grid: expected at least the model's, {self.config.grid}, got {grid}")
            denoiser = WindowedDenoiser(self, grid, self.config.grid)
        shared = dict(labels=labels, known=known, guidance_scale=guidance_scale, device=self.device, **options)
        shape, transition = (n, grid[0] * grid[1]), self.diffusion.transition
        with evaluating(self):
            if decoding == "chain":
                codes = sample(denoiser, shape, transition, rule=self.config.rule, steps=steps, **shared)
            else:
                calls = {} if steps is None else {"steps": steps}
                codes = sample_by_confidence(
                    denoiser, shape, transition, choice_temperature=choice_temperature, **calls, **shared
                )
        return codes.view(n, *grid)

    def _flat(self, name: str, codes: Tensor) -> Tensor:
        return flat_codes(name, codes, self.config.grid)

    def _read(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Flat codes, and the labels if the model has classes; labels that it has no use for are left."""
        return self._flat('batch["codes"]', entry(batch, "codes", self)), batch_labels(batch, self.config.num_classes)

    def _labels(self, labels: Tensor | int | None, n: int) -> Tensor | None:
        return sampling_labels(labels, n, self.config.num_classes, self.config.class_dropout, self.device)

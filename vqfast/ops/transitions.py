"""Transition families of discrete diffusion in closed form: what the forward chain does to a token.

Those that take a matrix are in `matrix_transitions`. Here a token keeps its code with probability alpha_bar_t, is
masked with probability gamma_bar_t, and is otherwise replaced by a code drawn from a fixed distribution m:

    q(x_t | x_0) = alpha_bar_t [x_t = x_0] + (1 - alpha_bar_t - gamma_bar_t) m(x_t) + gamma_bar_t [x_t = mask]

A masked token stays masked. Codes are 0..K-1; the mask state, where a family has one, is K.
"""

import torch
from torch import Tensor

from vqfast.ops.checks import check_whole

# A share of replaced tokens below this is a rounding error of 1 - alpha_bar - gamma_bar, not a choice.
_NEGLIGIBLE = 1e-12


def _check_table(name: str, table: object) -> Tensor:
    if not isinstance(table, Tensor) or not table.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor (T + 1,), got {type(table).__name__}")
    if table.ndim != 1 or table.numel() < 2:
        raise ValueError(f"{name}: expected shape (T + 1,) with T >= 1, got {tuple(table.shape)}")
    return table.detach().double()


def _ends(table: Tensor) -> str:
    return f"{table[:3].tolist()}..{table[-3:].tolist()}"


def check_alpha_bar(alpha_bar: object) -> Tensor:
    """(T + 1,) float64, or TypeError, ValueError where it is no table of probabilities of being untouched."""
    table = _check_table("alpha_bar", alpha_bar)
    host = table.cpu()
    if host[0] != 1 or not (host[1:] <= host[:-1]).all() or not (host[:-1] > 0).all() or host[-1] < 0:
        raise ValueError(
            "alpha_bar: expected 1 at level 0, then values that never rise and stay above 0 (the last may be 0), "
            f"got {_ends(host)}"
        )
    return table


class Transition:
    """What the ops read of a family, whether in closed form or through matrices.

    Make one of `Uniform`, `Absorbing`, `MaskAndReplace`, `Marginal`, `Gaussian`, `Nearest`, `SymmetricRate`, `Dense`.

    Attributes:
        codebook_size: K. T: number of noise levels.
        states: K, or K + 1 with a mask state. mask_id: K, or None.
        noise: (K,) float64 distribution of a code of which nothing is left, or None for 1 / K each.
    """

    codebook_size: int
    T: int
    states: int
    mask_id: int | None = None
    noise: Tensor | None

    def prior(self) -> Tensor:
        """(states,) float64: the distribution of x_T that a sampler starts from."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}(codebook_size={self.codebook_size}, T={self.T})"


class ClosedForm(Transition):
    """A family of two numbers a level. Make one of `Uniform`, `Absorbing`, `MaskAndReplace` or `Marginal`.

    Attributes, besides those of `Transition`:
        levels: (T + 1, 1) float64, alpha_bar; with a mask state (T + 1, 2), alpha_bar and gamma_bar. On the device
            that the tables were given on.
        noise: (K,) float64 distribution m that replaces codes, or None for 1 / K each.
    """

    def __init__(self, codebook_size: int, levels: Tensor, noise: Tensor | None = None):
        check_whole("codebook_size", codebook_size, 1)
        self.codebook_size = codebook_size
        self.T = levels.shape[0] - 1
        self.mask_id = codebook_size if levels.shape[1] == 2 else None
        self.states = codebook_size + levels.shape[1] - 1
        levels = levels.contiguous()
        self._tables = {levels.device: (levels, noise)}

    @property
    def levels(self) -> Tensor:
        return next(iter(self._tables.values()))[0]

    @property
    def noise(self) -> Tensor | None:
        return next(iter(self._tables.values()))[1]

    @property
    def alpha_bar(self) -> Tensor:
        """(T + 1,) float64."""
        return self.levels[:, 0]

    @property
    def mask_bar(self) -> Tensor:
        """(T + 1,) float64 probabilities of the mask state, 0 where the family has none."""
        return self.levels[:, 1] if self.mask_id is not None else torch.zeros_like(self.alpha_bar)

    def tables_on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """levels and noise on `device`, copied there once."""
        tables = self._tables.get(device)
        if tables is None:
            noise = self.noise
            tables = self._tables[device] = (self.levels.to(device), None if noise is None else noise.to(device))
        return tables

    def levels_on(self, device: torch.device) -> Tensor:
        """`levels` on `device`, copied there once."""
        return self.tables_on(device)[0]

    def prior(self) -> Tensor:
        """(states,) float64: the distribution of x_T that a sampler starts from, q(x_T | x_0) without its x_0 part."""
        K, device = self.codebook_size, self.levels.device
        noise = torch.full((K,), 1 / K, dtype=torch.float64, device=device) if self.noise is None else self.noise
        if self.mask_id is None:
            return noise
        masked = self.mask_bar[-1]
        replaced = (1 - self.alpha_bar[-1]) - masked
        # A chain that ends where it began has no x_T of its own: it is taken to end in the mask.
        share = torch.where(masked + replaced > 0, masked / (masked + replaced), 1.0)
        return torch.cat([(1 - share) * noise, share[None]])


class Uniform(ClosedForm):
    """Multinomial diffusion: a token stays, or is replaced by one of the K codes drawn uniformly.

    q(x_t | x_0) = alpha_bar_t [x_t = x_0] + (1 - alpha_bar_t) / K (Hoogeboom et al. 2021, eq. 12; VQ-DDM, section 3).

    Args:
        codebook_size: K >= 1.
        alpha_bar: (T + 1,) probabilities that a token is untouched at noise level 0..T: alpha_bar[0] = 1, never
            rising, positive but for the last. Kept in float64. See vqfast.diffusion.schedules.

    Raises:
        TypeError: K is no int, or alpha_bar no floating-point tensor.
        ValueError: K or the table is not as described.
    """

    def __init__(self, codebook_size: int, alpha_bar: Tensor):
        super().__init__(codebook_size, check_alpha_bar(alpha_bar)[:, None])


class Absorbing(ClosedForm):
    """Masking: a token stays, or becomes the mask state K for good.

    D3PM (Austin et al. 2021), section 3.1; Unleashing Transformers (Bond-Taylor et al. 2022).

    Args:
        codebook_size: K >= 1, without the mask state.
        alpha_bar: as for `Uniform`; gamma_bar = 1 - alpha_bar. A last value above 0 leaves the bound infinite.

    Raises:
        TypeError, ValueError: as for `Uniform`.
    """

    def __init__(self, codebook_size: int, alpha_bar: Tensor):
        table = check_alpha_bar(alpha_bar)
        super().__init__(codebook_size, torch.stack([table, 1 - table], dim=1))


class MaskAndReplace(ClosedForm):
    """A token stays, is replaced by a code drawn uniformly, or becomes the mask state K for good.

    VQ-Diffusion (Gu et al. 2022), eq. 7.

    Args:
        codebook_size: K >= 1, without the mask state.
        alpha_bar: as for `Uniform`.
        mask_bar: (T + 1,) probabilities gamma_bar of the mask state: 0 at level 0, never falling, at most
            1 - alpha_bar, and such that no step un-replaces a code: alpha_bar / (1 - mask_bar) never rises.

    Raises:
        TypeError, ValueError: tables other than these.
    """

    def __init__(self, codebook_size: int, alpha_bar: Tensor, mask_bar: Tensor):
        alpha, mask = check_alpha_bar(alpha_bar), _check_table("mask_bar", mask_bar)
        if mask.shape != alpha.shape:
            raise ValueError(f"mask_bar: expected shape {tuple(alpha.shape)} as alpha_bar has, got {tuple(mask.shape)}")
        mask = mask.to(alpha.device)
        replaced = (1 - alpha) - mask
        if mask[0] != 0 or not (mask[1:] >= mask[:-1]).all() or not (replaced >= -_NEGLIGIBLE).all():
            raise ValueError(
                "mask_bar: expected 0 at level 0, then values that never fall, at most 1 - alpha_bar, "
                f"got {_ends(mask)} beside alpha_bar {_ends(alpha)}"
            )
        mask = torch.where(replaced < _NEGLIGIBLE, 1 - alpha, mask)
        kept = alpha[:-1] / (1 - mask[:-1])
        if not (alpha[1:] <= kept * (1 - mask[1:]) + _NEGLIGIBLE).all():
            raise ValueError(
                "mask_bar: expected alpha_bar / (1 - mask_bar), the share of unmasked tokens that kept their code, "
                f"never to rise, got {_ends(mask)} beside alpha_bar {_ends(alpha)}"
            )
        super().__init__(codebook_size, torch.stack([alpha, mask], dim=1))


class Marginal(ClosedForm):
    """A token stays, or is replaced by a code drawn from a fixed distribution, such as that of the training codes.

    Args:
        distribution: (K,) float probabilities, at least 0, of sum 1 within 1e-4; normalised. Kept as multiples of
            2^-53, so that its partial sums are exact in any order and every backend draws the same codes.
        alpha_bar: as for `Uniform`.

    Raises:
        TypeError, ValueError: a distribution or a table other than these.
    """

    def __init__(self, distribution: Tensor, alpha_bar: Tensor):
        if not isinstance(distribution, Tensor) or not distribution.is_floating_point() or distribution.ndim != 1:
            raise TypeError(f"distribution: expected a floating-point tensor (K,), got {distribution!r}")
        table = check_alpha_bar(alpha_bar)
        m = distribution.detach().double().to(table.device)
        if m.numel() < 1 or not (m >= 0).all() or not abs(m.sum().item() - 1) <= 1e-4:
            raise ValueError(f"distribution: expected probabilities of sum 1, got a sum of {m.sum().item()!r}")
        unit = 2.0**53
        cumulative = (m.cumsum(0) / m.sum() * unit).round().clamp(max=unit)
        cumulative[int(m.nonzero().max()) :] = unit
        noise = torch.diff(cumulative, prepend=cumulative.new_zeros(1)) / unit
        super().__init__(m.numel(), table[:, None], noise)

"""Transition families of discrete diffusion through matrices: what cannot be said in two numbers a level.

D3PM (Austin et al. 2021): q(x_t | x_{t-1} = i) is row i of a (K, K) matrix Q_t. Tables and products are float64. No
family keeps T matrices that it was not given: `Gaussian` and `Dense` keep products some levels apart, between 2 sqrt(T)
and T / 4 of them, and go on from these step by step, `SymmetricRate` and `Nearest` keep one basis.
"""

from math import isqrt

import torch
from torch import Tensor

from vqfast.kernels.transition_matmul.library import products_ahead
from vqfast.ops.checks import check_whole, describe
from vqfast.ops.transforms import Function, once_differentiable
from vqfast.ops.transitions import Transition, check_alpha_bar

# How far a row that is given may be from the sum 1, and a rate from symmetry.
_TOLERANCE = 1e-6
# Levels between the products that are kept, where those take no more than so many bytes.
_STRIDE, _KEPT_AHEAD = 8, 1 << 27
# A mode that decays slower than this share of the fastest is a set of codes that none leaves, and rounding.
_SLOWEST = 1e-10
# What counts as nothing left of a token: a process in continuous time never gets to 0.
_NOTHING = 1e-12

_matmul = torch.ops.vqfast.transition_matmul.default


def _check_float_table(name: str, table: object, shape: str) -> Tensor:
    if not isinstance(table, Tensor) or not table.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor {shape}, got {describe(table)}")
    return table.detach().double()


class MatrixTransition(Transition):
    """A family without a mask state whose transitions are products of rows with matrices."""

    _tables: dict[torch.device, tuple[Tensor | None, ...]]

    def __init__(self, codebook_size: int, T: int, tables: tuple[Tensor | None, ...], device: torch.device):
        self.codebook_size = self.states = codebook_size
        self.T = T
        self._tables = {device: tables}
        self.noise = None

    def tables_on(self, device: torch.device) -> tuple[Tensor | None, ...]:
        """The family's float64 tables on `device`, copied there once."""
        tables = self._tables.get(device)
        if tables is None:
            first = next(iter(self._tables.values()))
            tables = self._tables[device] = tuple(None if table is None else table.to(device) for table in first)
        return tables

    @property
    def device(self) -> torch.device:
        """Of the tables that the family was made of."""
        return next(iter(self._tables))

    def product(self, rows: Tensor, s: Tensor | None, t: Tensor, *, transpose: bool = False, span: int = 0) -> Tensor:
        """rows Q_{s+1} ... Q_t, or with `transpose` rows (Q_{s+1} ... Q_t)^T. Gradient to rows.

        Args:
            rows: (B, L, K) float, or (B, L) int64 codes for their one-hots.
            s, t: (B,) int64, 0 <= s <= t <= T; s None for 0.
            span: t - s where it is known to be the same number everywhere, else 0.

        Returns:
            (B, L, K) float64.
        """
        raise NotImplementedError

    def codes_per_row(self, passes: int) -> float:
        """K for each row up to which the matrices of a step are less work than `passes` times the rows to its start.

        Measured on the CPU: kernels/matrix_loss/README.md.
        """
        raise NotImplementedError

    def last_rows(self) -> Tensor:
        """(K, K) float64: row k is q(x_T | x_0 = k)."""
        codes = torch.arange(self.codebook_size, device=self.device)[None]
        return self.product(codes, None, torch.full((1,), self.T, device=self.device))[0]

    def prior(self) -> Tensor:
        """(K,) float64: the mean of q(x_T | x_0) over all x_0, 1 / K each where the matrices are doubly stochastic."""
        K = self.codebook_size
        return (
            self.noise if self.noise is not None else torch.full((K,), 1 / K, dtype=torch.float64, device=self.device)
        )


def _check_times(times: object) -> Tensor:
    table = _check_float_table("times", times, "(T + 1,)")
    host = table.cpu()
    if table.ndim != 1 or table.numel() < 2:
        raise ValueError(f"times: expected shape (T + 1,) with T >= 1, got {tuple(table.shape)}")
    if host[0] != 0 or not (host[1:] >= host[:-1]).all() or not host[-1].isfinite():
        raise ValueError(f"times: expected 0 at level 0, then finite values that never fall, got {host.tolist()}")
    return table


class _Product(Function):
    @staticmethod
    def forward(rows, s, t, steps, diagonal, cumulative, blocks, stride, transpose, span):
        return _matmul(rows, s, t, steps, diagonal, cumulative, blocks, stride, transpose, span)

    @staticmethod
    def setup_context(ctx, inputs, output):
        rows, *tensors = inputs[:-3]
        ctx.save_for_backward(*tensors)
        ctx.options = inputs[-3:]
        ctx.dtype = rows.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        s, t, *tables = ctx.saved_tensors
        stride, transpose, span = ctx.options
        grad_rows = _matmul(grad, s, t, *tables, stride, not transpose, span)
        return grad_rows.to(ctx.dtype), *([None] * 9)


def default_stride(T: int, K: int) -> int:
    """Levels between the products that a chain of T steps keeps: the fewer, the shorter the way from one of them."""
    fitting = -(-2 * T * K * K * 8 // _KEPT_AHEAD)
    return max(min(max(fitting, _STRIDE), isqrt(T)), 1)


class _Chain(MatrixTransition):
    """Steps that need not commute, with the products of blocks of `stride` steps made ahead."""

    def __init__(self, steps: Tensor, diagonal: Tensor | None, stride: int | None):
        T, K = steps.shape[:2]
        if stride is None:
            stride = default_stride(T, K)
        if not isinstance(stride, int) or isinstance(stride, bool) or not 1 <= stride <= T:
            raise ValueError(f"stride: expected a whole number of levels in 1..{T} (T = {T}), got {stride!r}")
        self.stride = stride
        tables = steps, diagonal, *products_ahead(steps, diagonal, stride)
        super().__init__(K, T, tables, steps.device)

    def codes_per_row(self, passes: int) -> float:
        return 2 * passes

    def product(self, rows: Tensor, s: Tensor | None, t: Tensor, *, transpose: bool = False, span: int = 0) -> Tensor:
        return _Product.apply(rows, s, t, *self.tables_on(rows.device), self.stride, transpose, span)


class Gaussian(_Chain):
    """A token moves to codes nearby in number, as grey levels do: banded, doubly stochastic, discretised Gaussian.

    Off the diagonal, Q_t[i, j] = exp(-(2 d / (K - 1))^2 / beta_t) / sum_{n=1-K}^{K-1} exp(-(2 n / (K - 1))^2 / beta_t)
    at distance d = |i - j|; on it, what makes the row sum 1. D3PM (Austin et al. 2021), appendix A.2.3, with the K of
    the codebook where the released code has the 256 of its images. For few codes betas must be larger: neighbours are
    reached about as often as 4 / (K - 1)^2 is below beta.

    Args:
        codebook_size: K >= 2.
        betas: (T,) float, above 0: widths of steps 1..T. See vqfast.diffusion.schedules.gaussian_betas.
        stride: levels between the products that are kept, 2 (T // stride) K^2 float64 in all. Level t takes t % stride
            products besides: 1 keeps every level. Default: 8, up to sqrt(T) where the products would exceed 128 MB.

    Raises:
        TypeError: betas is not a floating-point tensor. ValueError: K, betas or stride out of range.
    """

    def __init__(self, codebook_size: int, betas: Tensor, *, stride: int | None = None):
        betas = _check_float_table("betas", betas, "(T,)")
        check_whole("codebook_size", codebook_size, 2)
        if betas.ndim != 1 or betas.numel() < 1:
            raise ValueError(f"betas: expected shape (T,) with T >= 1, got {tuple(betas.shape)}")
        if not ((betas > 0) & betas.isfinite()).all():
            raise ValueError(f"betas: expected finite numbers above 0, got {betas.min().item()}..{betas.max().item()}")
        distance = torch.arange(codebook_size, dtype=torch.float64, device=betas.device) * 2 / (codebook_size - 1)
        weight = (-distance.square() / betas[:, None]).exp()
        weight = weight / (weight[:, :1] + 2 * weight[:, 1:].sum(1, keepdim=True))
        # What code i would lose beyond the first or the last code stays with it: distances above i and K - 1 - i.
        beyond = weight.flip(1).cumsum(1).flip(1)[:, 1:]
        beyond = torch.cat([beyond, torch.zeros_like(beyond[:, :1])], dim=1)
        super().__init__(weight, weight[:, :1] + beyond + beyond.flip(1), stride)


class Dense(_Chain):
    """Any chain: a matrix for each step.

    Args:
        matrices: (T, K, K) float, at least 0, rows of sum 1 within 1e-6; [i] leads from level i to i + 1.
            Normalised. Neither symmetric nor doubly stochastic need they be.
        stride: as for `Gaussian`.

    Raises:
        TypeError: not a floating-point tensor. ValueError: a shape or values other than these, stride out of range.
    """

    def __init__(self, matrices: Tensor, *, stride: int | None = None):
        matrices = _check_float_table("matrices", matrices, "(T, K, K)")
        if matrices.ndim != 3 or matrices.shape[1] != matrices.shape[2] or 0 in matrices.shape:
            raise ValueError(f"matrices: expected shape (T, K, K), T and K at least 1, got {tuple(matrices.shape)}")
        sums = matrices.sum(2, keepdim=True)
        worst = (sums - 1).abs().max().item()
        if not (matrices >= 0).all() or not worst <= _TOLERANCE:
            raise ValueError(
                f"matrices: expected probabilities in rows of sum 1, got a smallest entry of {matrices.min().item()} "
                f"and a sum that is off by {worst}"
            )
        super().__init__(matrices / sums, None, stride)
        self.noise = self.last_rows().mean(0)


def _decays(eigenvalues: Tensor) -> Tensor:
    """(K,) bool."""
    return eigenvalues < _SLOWEST * eigenvalues.min()


def times_like_uniform(eigenvalues: Tensor, alpha_bar: Tensor) -> Tensor:
    """Times at which as much is left of a token as under uniform noise.

    P(x_t = x_0), the mean over all x_0, is sum_k exp(time_t lambda_k) / K, and alpha_bar_t + (1 - alpha_bar_t) / K for
    `Uniform`. They are the same where the mean of exp(time_t lambda_k) over the modes that decay is alpha_bar_t.

    Args:
        eigenvalues: (K,) float64, at most 0, of the rate.
        alpha_bar: (T + 1,) float64, as for `Uniform`; below 1e-12 it counts as that.

    Returns:
        (T + 1,) float64 from 0, never falling.
    """
    decaying = eigenvalues[_decays(eigenvalues)]
    left = alpha_bar.to(eigenvalues.device).clamp(min=_NOTHING)[:, None]
    if not decaying.numel():
        return torch.zeros_like(left[:, 0])
    # Between these, as the mean is at least exp of the mean (Jensen), and at most its slowest part.
    early, late = left.log() / decaying.mean(), left.log() / decaying.max()
    for _ in range(64):
        middle = (early + late) / 2
        is_late = (middle * decaying).exp().mean(1, keepdim=True) < left
        early, late = torch.where(is_late, early, middle), torch.where(is_late, middle, late)
    return early[:, 0].cummax(0).values


class SymmetricRate(MatrixTransition):
    """A symmetric jump process at given times: Q from level s to t is expm((times[t] - times[s]) rate).

    Its steps commute and are doubly stochastic. One eigenbasis, taken in float64 when the family is made, serves every
    level: two products with a (K, K) matrix whatever t. Entries carry an absolute error of about 1e-15, so
    probabilities below that are noise (never less than that of a token that does not move), and the marginal rule,
    which divides by them, is refused.

    Args:
        rate: (K, K) float, symmetric within 1e-6, at least 0 off the diagonal, rows of sum 0: jumps per unit of time.
        times: (T + 1,) float, 0 at level 0, never falling. Kept in float64.
        alpha_bar: (T + 1,) in place of times, a table as `Uniform` takes: level t comes when a token is what it was as
            often as under that noise, see `times_like_uniform`. With each jump as likely as another it is that noise.

    Attributes, besides those of `Transition`:
        groups: number of sets of codes that no token leaves: 1 where every code leads to every other.

    Raises:
        TypeError: not floating-point tensors; both of times and alpha_bar, or none. ValueError: a shape or values other
            than these.
    """

    def __init__(self, rate: Tensor, times: Tensor | None = None, *, alpha_bar: Tensor | None = None):
        rate = _check_float_table("rate", rate, "(K, K)")
        if (times is None) == (alpha_bar is None):
            raise TypeError(f"times, alpha_bar: expected one of them, got {'none' if times is None else 'both'}")
        if rate.ndim != 2 or rate.shape[0] != rate.shape[1] or not rate.numel():
            raise ValueError(f"rate: expected shape (K, K), K at least 1, got {tuple(rate.shape)}")
        off = rate - rate.diagonal().diag()
        largest = max(off.abs().max().item(), 1e-300)
        skew = (rate - rate.T).abs().max().item()
        sums = rate.sum(1).abs().max().item()
        if not ((off >= 0).all() and skew <= _TOLERANCE * largest and sums <= _TOLERANCE * largest * rate.shape[0]):
            raise ValueError(
                "rate: expected a symmetric matrix, at least 0 off the diagonal, with rows of sum 0, got a smallest "
                f"entry off the diagonal of {off.min().item()}, a skewness of {skew} and a sum of {sums}"
            )
        # Before the basis is taken, which may last: a table that is none.
        table = check_alpha_bar(alpha_bar) if times is None else _check_times(times)
        off = (off + off.T) / 2
        eigenvalues, basis = torch.linalg.eigh(off - off.sum(1).diag())
        eigenvalues = eigenvalues.clamp(max=0)  # but for rounding, which a long time would multiply
        times = times_like_uniform(eigenvalues, table) if times is None else table.to(rate.device)
        self.groups = int((~_decays(eigenvalues)).sum())
        super().__init__(rate.shape[0], times.numel() - 1, (times, eigenvalues, basis, -off.sum(1)), rate.device)

    def codes_per_row(self, passes: int) -> float:
        # A pass of rows is two products, however far; a matrix is one, of K rows, and a step has two of them.
        return (1 + passes) / 2

    def product(self, rows: Tensor, s: Tensor | None, t: Tensor, *, transpose: bool = False, span: int = 0) -> Tensor:
        times, eigenvalues, basis, leaving = self.tables_on(rows.device)
        t = t.clamp(0, self.T)
        elapsed = (times[t] if s is None else times[t] - times[s.clamp(0, self.T)])[:, None, None]
        moved = elapsed > 0
        decay = (elapsed * eigenvalues).exp() * moved
        # At least what never jumped, and that alone where no time has passed.
        if rows.dtype == torch.int64:
            product = (basis[rows].mul_(decay) @ basis.T).clamp_(min=0)
            stays = (elapsed[..., 0] * leaving[rows]).exp()[..., None]
            return product.scatter_(-1, rows[..., None], torch.maximum(product.gather(-1, rows[..., None]), stays))
        given = rows.double()
        product, stays = (given @ basis).mul_(decay) @ basis.T, (elapsed * leaving).exp() * given
        return torch.where((product > stays) & moved, product, stays)


def embedding_neighbours(embeddings: Tensor, neighbours: int) -> Tensor:
    """The codes whose embeddings are nearest to that of each code.

    Args:
        embeddings: (K, D) float, finite: the codebook.
        neighbours: how many, 1..K - 1. Ties go to the lowest index.

    Returns:
        (K, neighbours) int64, the nearest first.

    Raises:
        TypeError, ValueError: arguments other than these.
    """
    embeddings = _check_float_table("embeddings", embeddings, "(K, D)")
    if embeddings.ndim != 2 or embeddings.shape[0] < 2 or not embeddings.isfinite().all():
        raise ValueError(f"embeddings: expected finite values of shape (K, D) with K >= 2, got {describe(embeddings)}")
    K = embeddings.shape[0]
    if not isinstance(neighbours, int) or isinstance(neighbours, bool) or not 1 <= neighbours < K:
        raise ValueError(f"neighbours: expected a whole number in 1..{K - 1} (K = {K}), got {neighbours!r}")
    # Differences, not the expansion of the square: near codes far from the origin would be lost in it.
    distance = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
    distance.fill_diagonal_(torch.inf)
    return distance.sort(dim=1, stable=True).indices[:, :neighbours]


def neighbour_rate(neighbours: Tensor) -> Tensor:
    """The rate of jumps between neighbours, for `SymmetricRate` (D3PM, Austin et al. 2021, appendix A.2.4).

    With G[i, j] = 1 where j is among the n neighbours of i, the rate of a jump is (G + G^T) / (2 n).

    Args:
        neighbours: (K, n) int64, as `embedding_neighbours` gives them: n other codes of each code.

    Returns:
        (K, K) float64, rows of sum 0.

    Raises:
        TypeError, ValueError: neighbours other than these.
    """
    if not isinstance(neighbours, Tensor) or neighbours.dtype != torch.int64:
        raise TypeError(f"neighbours: expected an int64 tensor (K, n), got {describe(neighbours)}")
    if neighbours.ndim != 2 or 0 in neighbours.shape or not 0 <= neighbours.min() <= neighbours.max() < len(neighbours):
        raise ValueError(f"neighbours: expected codes in 0..K - 1 of shape (K, n), got {describe(neighbours)}")
    K, n = neighbours.shape
    graph = torch.zeros(K, K, dtype=torch.float64, device=neighbours.device).scatter(1, neighbours, 1.0)
    rate = (graph + graph.T) / (2 * n)
    return rate - rate.sum(1).diag()


class Nearest(SymmetricRate):
    """A token moves to codes whose embeddings are near: `neighbour_rate` of `embedding_neighbours`.

    Args:
        embeddings: (K, D) float, finite: the codebook.
        neighbours: how many, 1..K - 1.
        times, alpha_bar: as for `SymmetricRate`.

    Raises:
        TypeError, ValueError: arguments other than these.
    """

    def __init__(
        self,
        embeddings: Tensor,
        neighbours: int,
        times: Tensor | None = None,
        *,
        alpha_bar: Tensor | None = None,
    ):
        super().__init__(neighbour_rate(embedding_neighbours(embeddings, neighbours)), times, alpha_bar=alpha_bar)

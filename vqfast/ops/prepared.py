"""A codebook made ready once for many searches."""

import torch
from torch import Tensor

from vqfast.ops.checks import check_choice, check_codes, check_float

_prepare = torch.ops.vqfast.nearest_prepare.default

METRICS = ("l2", "dot", "cosine")


class PreparedCodebook:
    """A codebook with what a search computes of it: centred, scaled and packed codes, and the bound of their scores.

    `nearest_code` and `quantize` take it in place of the codebook. It follows nothing: after a change of the codebook
    in place every use raises, until `refresh` is called. The change is found by the tensor's version counter, address
    and shape; writing through `codebook.data` or from outside torch leaves all three, and must be followed by
    `refresh` without being asked. Moving or casting the codebook makes another tensor: prepare that one.

    On the CPU kernels this saves the packing, which dominates where there are fewer rows than a few hundred. Backends
    that pack nothing ahead (CUDA, Triton, reference) read the codebook at each search, as without it; so does a
    graph of torch.compile. The packed memory belongs to this process: it cannot be saved or sent.

    Attributes:
        codebook: (K, D) or (H, K, D), the tensor itself, not a copy.
        metric: "l2", "dot" or "cosine".
        packed: uint8, opaque; empty where the backend packs nothing.
    """

    def __init__(self, codebook: Tensor, metric: str):
        self.codebook, self.metric = codebook, metric
        self.refresh()

    def refresh(self) -> "PreparedCodebook":
        """Prepare the codebook as it is now; returns self."""
        self._state = self._present()
        self._units: Tensor | None = None
        self.packed = _prepare(self.codebook.detach(), self.metric)
        return self

    def check(self) -> None:
        """Raise RuntimeError, naming what changed, if the codebook is not the one that was prepared."""
        present = self._present()
        if present == self._state:
            return
        names = ("version", "address", "shape")
        changed = [f"{n} {was} -> {now}" for n, was, now in zip(names, self._state, present, strict=True) if was != now]
        raise RuntimeError(f"codebook: changed since it was prepared ({', '.join(changed)}); call refresh() first")

    def units(self) -> Tensor:
        """The codes at unit length, computed once where they need no gradient."""
        if self.codebook.requires_grad and torch.is_grad_enabled():
            return unit_vectors(self.codebook)
        if self._units is None:
            self._units = unit_vectors(self.codebook.detach())
        return self._units

    def _present(self) -> tuple[int, int, tuple[int, ...]]:
        return self.codebook._version, self.codebook.data_ptr(), tuple(self.codebook.shape)

    def __repr__(self) -> str:
        return f"PreparedCodebook(shape={tuple(self.codebook.shape)}, metric={self.metric!r})"


def unit_vectors(vectors: Tensor) -> Tensor:
    """Divided by their norms, at least 1e-12, in float32 or wider; a zero vector stays zero."""
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return torch.nn.functional.normalize(wide, dim=-1).to(vectors.dtype)


def prepare(codebook: Tensor, *, metric: str = "l2") -> PreparedCodebook:
    """Make a codebook ready for many searches, as at inference, where it does not change between calls.

    Args:
        codebook: (K, D) or (H, K, D) float64, float32, bfloat16 or float16, K >= 1.
        metric: that of the searches: "l2", "dot" or "cosine".

    Returns:
        PreparedCodebook, which `nearest_code` and `quantize` take in place of the codebook.

    Raises:
        TypeError: not a float tensor.
        ValueError: a rank that does not fit, an empty codebook, an unknown metric, a tensor made under
            torch.inference_mode, whose changes cannot be seen.
    """
    check_float("codebook", codebook)
    check_codes(codebook)
    check_choice("metric", metric, METRICS)
    if codebook.is_inference():
        raise ValueError(
            "codebook: expected a tensor with a version counter, got one made under torch.inference_mode; "
            "its changes could not be seen, clone it outside"
        )
    return PreparedCodebook(codebook, metric)

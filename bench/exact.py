"""The exact nearest code at benchmark sizes, where the definition's N x K x D differences would take minutes."""

import torch
from torch import Tensor

from vqfast.kernels.nearest.reference import nearest

_CHUNK_ELEMENTS = 1 << 25
# A float64 score of D terms is off by less than D * 2^-52 of |x||c| + |c|^2; this allows for D = 20,000.
_SLACK = 1e-11


def exact_nearest(x: Tensor, codebook: Tensor, metric: str = "l2") -> Tensor:
    """The nearest code of finite x (N, D) and codebook (K, D) by `metric`: (N,) int64, the lowest index of a tie.

    Scores from a float64 matrix product; a row whose two best are closer than rounding can tell apart is decided by
    the definition.
    """
    codes = codebook.double()
    mean = codes.mean(0) if metric == "l2" else torch.zeros_like(codes[0])
    codes = torch.nn.functional.normalize(codes, dim=-1, eps=1e-300) if metric == "cosine" else codes - mean
    largest = codes.norm(dim=-1).max()
    half_norm = codes.square().sum(-1) / 2 if metric == "l2" else torch.zeros_like(codes[:, 0])
    out = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    step = max(1, _CHUNK_ELEMENTS // codes.shape[0])
    for start in range(0, x.shape[0], step):
        rows = x[start : start + step].double() - mean
        score = torch.addmm(-half_norm, rows, codes.T)
        best, index = score.max(-1, keepdim=True)
        second = score.scatter_(-1, index, -torch.inf).amax(-1)
        slack = _SLACK * (rows.norm(dim=-1) * largest + half_norm.max())
        open_rows = (best[:, 0] - second <= 2 * slack).nonzero()[:, 0]
        index = index[:, 0]
        if len(open_rows):
            index[open_rows] = nearest(x[start : start + step][open_rows], codebook, metric=metric)
        out[start : start + step] = index
    return out

"""Benchmarks of nearest-code search."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench.backends import vqfast_backends
from bench.case import (
    PEER,
    YARDSTICK,
    Case,
    Contender,
    Run,
    Verdict,
    judge_indices,
)
from bench.exact import exact_nearest
from bench.installed import missing, version_of
from vqfast.kernels.specs import NEAREST
from vqfast.ops import nearest_code

# The definition writes N x K x D differences: it competes where those are few.
REFERENCE_ELEMENTS = 1e8
DECAY, EPS = 0.99, 1e-5


class SearchProblem:
    """x (N, D), codebook (K, D), and the exact nearest codes."""

    def __init__(self, shape: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int):
        self.x, self.codebook = NEAREST.inputs(shape, dtype, device, seed)
        generator = torch.Generator(device).manual_seed(seed + 1)
        self.grad = torch.randn(self.x.shape, generator=generator, device=device).to(dtype)

    @cached_property
    def exact(self) -> Tensor:
        return exact_nearest(self.x, self.codebook)


def cdist_argmin(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(x, codebook).argmin(-1)


def addmm_argmax(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.addmm(codebook.square().sum(-1) * -0.5, x, codebook.T).argmax(-1)


def _of_tensors(function, problem: SearchProblem) -> Run:
    return Run(lambda: function(problem.x, problem.codebook))


def _in_float32(function, problem: SearchProblem) -> Run:
    return Run(lambda: function(problem.x.float(), problem.codebook.float()))


def _vqfast_search(problem: SearchProblem):
    return lambda: nearest_code(problem.x, problem.codebook)


def _faiss(problem: SearchProblem) -> Run:
    import faiss

    x, codebook = problem.x.numpy(), problem.codebook.numpy()

    def search() -> Tensor:
        # A codebook changes at every training step, so adding it belongs to the search; it is one copy.
        index = faiss.IndexFlatL2(codebook.shape[1])
        index.add(codebook)
        return torch.from_numpy(index.search(x, 1)[1][:, 0])

    return Run(search)


def _sklearn(problem: SearchProblem) -> Run:
    from sklearn.metrics import pairwise_distances_argmin

    x, codebook = problem.x.numpy(), problem.codebook.numpy()
    return Run(lambda: torch.from_numpy(pairwise_distances_argmin(x, codebook)))


def peer_quantizer(problem: SearchProblem):
    """vector-quantize-pytorch's module on our codebook, with the same losses and averages as ours."""
    from vector_quantize_pytorch import VectorQuantize

    K, D = problem.codebook.shape
    module = VectorQuantize(dim=D, codebook_size=K, decay=DECAY, eps=EPS, rotation_trick=False).to(problem.x.device)
    codes = problem.codebook.float()
    books = module._codebook

    @torch.no_grad()
    def reset() -> None:
        module.codebook = codes
        books.embed_avg.copy_(codes[None])
        books.cluster_size.fill_(1)

    reset()
    return module, reset


def _peer_search(problem: SearchProblem) -> Run:
    module, _ = peer_quantizer(problem)
    module.eval()
    x = problem.x[None]

    @torch.no_grad()
    def search() -> Tensor:
        return module(x)[1][0]

    return Run(search)


def _fast_bfloat16(device: str) -> bool:
    """Whether torch multiplies bfloat16 matrices in hardware; elsewhere it takes minutes."""
    return torch.device(device).type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _product(dtype: torch.dtype, problem: SearchProblem) -> Run:
    x, codebook = problem.x.to(dtype), problem.codebook.to(dtype)
    return Run(lambda: x @ codebook.T)


def nearest_case(shape: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    # Peers answer in the dtype of their input: to be right, they are given float32.
    low = dtype in (torch.bfloat16, torch.float16)
    elements = shape["N"] * shape["K"] * shape["D"]
    torch_version = torch.__version__

    def peer(name, function, compiled=False, prepare=_in_float32 if low else _of_tensors) -> Contender:
        return Contender(name, PEER, lambda p: prepare(function, p), torch_version, compiled=compiled)

    contenders = vqfast_backends(device, ("nearest",), _vqfast_search, reference=elements <= REFERENCE_ELEMENTS)
    contenders += [
        peer("torch cdist + argmin", cdist_argmin),
        peer("torch addmm + argmax", addmm_argmax),
        peer("torch.compile(addmm + argmax)", torch.compile(addmm_argmax, dynamic=False), compiled=True),
    ]
    if low:
        contenders.append(peer(f"torch addmm + argmax in {str(dtype)[6:]}", addmm_argmax, prepare=_of_tensors))
    if torch.device(device).type == "cpu" and not low:
        contenders += [
            Contender("faiss IndexFlatL2", PEER, _faiss, version_of("faiss-cpu"), missing("faiss")),
            Contender(
                "scikit-learn pairwise_distances_argmin",
                PEER,
                _sklearn,
                version_of("scikit-learn"),
                missing("sklearn"),
            ),
        ]
    contenders.append(
        Contender(
            "vector-quantize-pytorch (eval)",
            PEER,
            _peer_search,
            version_of("vector-quantize-pytorch"),
            missing("vector_quantize_pytorch"),
            captured=False,
        )
    )
    for product in (torch.float32, torch.bfloat16) if _fast_bfloat16(device) else (torch.float32,):
        contenders.append(
            Contender(
                f"x @ codebook.T alone ({str(product)[6:]})",
                YARDSTICK,
                lambda p, product=product: _product(product, p),
                torch_version,
            )
        )

    def judge(contender: Contender, run: Run, problem: SearchProblem) -> Verdict:
        got = run.call()
        return Verdict() if contender.role == YARDSTICK else judge_indices(contender, got, problem.exact)

    return Case(
        op="nearest",
        shape=shape,
        dtype=dtype,
        device=device,
        problem=lambda seed: SearchProblem(shape, dtype, device, seed),
        judge=judge,
        contenders=tuple(contenders),
        bytes_moved=NEAREST.bytes_moved(shape, dtype),
        flops=NEAREST.flops(shape),
        matmul=True,
    )

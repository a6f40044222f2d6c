"""Which source files a figure of vqfast depends on, as one hash: where it has changed, the figure is STALE."""

import hashlib
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_DYNAMIC = ("nearest", "lookup", "codebook_stats", "pack", "unpack", "dynamic_lookup")

# Folders of kernels/ that a benchmark goes through.
KERNELS = {
    "nearest": ("nearest",),
    "residual_nearest": ("nearest", "residual_nearest"),
    "quantize_step": ("nearest", "lookup", "codebook_stats"),
    "codebook_stats": ("codebook_stats",),
    "q_sample": ("q_sample", "posterior"),
    "posterior": ("posterior",),
    "diffusion_loss": ("diffusion_loss", "posterior"),
    "p_sample": ("p_sample", "q_sample", "posterior"),
    "matrix_loss": ("matrix_loss", "transition_matmul"),
    "matrix_sample": ("matrix_sample", "matrix_loss", "transition_matmul"),
    "pack": ("pack",),
    "unpack": ("unpack",),
    "dynamic_quantize": _DYNAMIC,
    "dynamic_quantize_step": _DYNAMIC,
    "position_mask": ("position_mask",),
    "grain_entropy": ("grain_entropy",),
}

# First words of file names in csrc that belong to some ops only; every other file counts for all.
_FAMILIES = {
    "nearest": {"nearest", "tensor", "bfloat16"},
    "residual_nearest": {"residual"},
    "lookup": {"codebook", "lookup"},
    "codebook_stats": {"codebook"},
    "q_sample": {"diffusion", "sampling", "truncate", "random"},
    "posterior": {"diffusion", "posterior"},
    "diffusion_loss": {"diffusion"},
    "p_sample": {"diffusion", "sampling", "truncate", "random"},
    "matrix_loss": {"matrix", "diffusion", "truncate"},
    "matrix_sample": {"matrix", "diffusion", "truncate"},
    "transition_matmul": {"matrix", "diffusion", "truncate"},
    "pack": {"pack", "packing", "grain"},
    "unpack": {"pack", "packing", "grain"},
    "dynamic_lookup": {"dynamic", "grain", "codebook", "lookup"},
    "position_mask": {"position", "packing", "grain"},
    "grain_entropy": {"entropy", "grain", "packing"},
}
_PARTICULAR = set().union(*_FAMILIES.values())
_FOLDER = {"vqfast cpu": "cpu", "vqfast cuda": "cuda"}


def source_files(contender: str, op: str, root: Path = ROOT) -> list[Path]:
    """Files that a row of vqfast was measured through.

    Args:
        contender: "vqfast cpu", "vqfast cuda", "vqfast triton" or "vqfast reference".
        op: name of the benchmark.
    """
    kernels = KERNELS[op]
    # What backends share in Python: products by a library.
    library = [file for op in kernels if (file := root / "kernels" / op / "library.py").is_file()]
    if contender not in _FOLDER:
        what = "triton" if contender.endswith("triton") else "reference"
        shared = ("fusion_triton.py", "philox_triton.py") if what == "triton" else ("philox.py",)
        own = [file for op in kernels for file in sorted((root / "kernels" / op).glob(f"*{what}.py"))]
        return [root / "kernels" / file for file in shared] + own + library
    mine = set().union(*(_FAMILIES[op] for op in kernels))
    files = library
    for folder in ("include", _FOLDER[contender]):
        for file in (root / "csrc" / folder).glob("*"):
            word = file.stem.split("_")[0]
            if file.is_file() and (word not in _PARTICULAR or word in mine):
                files.append(file)
    return sorted(files)


@cache
def kernel_hash(contender: str, op: str, root: Path = ROOT) -> str:
    """12 hex digits over names and contents; empty for a contender that is not vqfast's."""
    if not contender.startswith("vqfast "):
        return ""
    digest = hashlib.sha256()
    for file in source_files(contender, op, root):
        digest.update(f"{file.relative_to(root)}\0".encode())
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()[:12]


def commit(root: Path = ROOT) -> str:
    """The commit that is checked out, with a + where tracked files differ from it; empty outside git."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""

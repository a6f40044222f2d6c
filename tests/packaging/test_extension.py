"""What the build leaves: symbols, instruction sets, a wheel that holds everything and needs no compiler."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from vqfast import _cpu, doctor

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, cwd=ROOT / "tests"
    )


ISAS = ["generic", "avx2", "avx512", "avx512bf16", "amx"]


@pytest.mark.parametrize("isa", ISAS)
def test_files_with_their_own_instruction_set_export_no_weak_symbol(isa):
    """The linker keeps one copy of a weak symbol: it could be the one that a lesser processor cannot run."""
    objects = BUILD / f"isa_{isa}.o"
    if not objects.exists():
        pytest.skip(f"{objects.name} is not in {BUILD.relative_to(ROOT)}: vqfast was installed from a wheel")
    symbols = subprocess.run(["nm", "-C", str(objects)], capture_output=True, text=True, check=True).stdout
    weak = [line for line in symbols.splitlines() if re.match(r"^[0-9a-f]+ [VWu] ", line)]
    assert weak == []
    assert f"vqfast::{isa}::" in symbols


def test_a_change_of_the_table_of_search_paths_is_built():
    ninja = pytest.importorskip("ninja")
    if not (BUILD / "nearest_path.o").exists():
        pytest.skip(f"nearest_path.o is not in {BUILD.relative_to(ROOT)}: vqfast was installed from a wheel")
    program = Path(ninja.BIN_DIR) / "ninja"
    deps = subprocess.run(
        [program, "-t", "deps", "nearest_path.o"], cwd=BUILD, capture_output=True, text=True, check=True
    )
    assert "csrc/include/nearest_paths.inc" in deps.stdout


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_of_this_processor_gives_the_same_indices(isa):
    code = (
        "import torch, vqfast\nfrom vqfast import _cpu\n"
        "g = torch.Generator().manual_seed(0)\n"
        "x, c = torch.randn(300, 70, generator=g), torch.randn(130, 70, generator=g)\n"
        "print(_cpu.isa(), _cpu.isa_error(), vqfast.ops.nearest_code(x, c).sum().item())"
    )
    run = python(code, VQFAST_ISA=isa)
    assert run.returncode == 0, run.stderr
    name, error, total = run.stdout.split(maxsplit=1)[0], *run.stdout.split(maxsplit=1)[1].rsplit(maxsplit=1)
    if name != isa:
        assert isa in error
        pytest.skip(f"this processor has no {isa}")
    g = torch.Generator().manual_seed(0)
    x, c = torch.randn(300, 70, generator=g), torch.randn(130, 70, generator=g)
    import vqfast

    assert int(total) == vqfast.ops.nearest_code(x, c).sum().item()


def test_an_unknown_instruction_set_is_reported_and_the_widest_used():
    run = python("from vqfast import _cpu; print(_cpu.isa(), '|', _cpu.isa_error())", VQFAST_ISA="mmx")
    assert run.stdout.split(" | ")[0] == _cpu.isa()
    assert "VQFAST_ISA=mmx is not an instruction set of this processor" in run.stdout


def test_doctor_names_every_backend_and_the_reason_where_one_is_off():
    text = doctor.report()
    for words in (f"instruction set {_cpu.isa()}", torch.__version__, "cpu: ready", "reference: ready"):
        assert words in text
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert re.search(r"triton: (it takes CPU tensors only in the interpreter|triton is not installed)", text)


def test_wheel_holds_the_kernels_and_imports_without_a_compiler(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listing, cwd=ROOT, text=True).splitlines():
        if name.startswith(("csrc/", "kernels/", "vqfast/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)],
        env=os.environ | {"VQFAST_CUDA": "0"}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("vqfast-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    modules = {str(path.relative_to(source)) for path in source.glob("vqfast/**/*.py")}
    modules |= {f"vqfast/{path.relative_to(source)}" for path in source.glob("kernels/**/*.py")}
    assert modules - set(names) == set()
    assert any(re.fullmatch(r"vqfast/_cpu\..*so", n) for n in names)
    assert not any("_cuda." in n or n.startswith(("tests/", "bench/")) for n in names)
    run = subprocess.run(
        [sys.executable, "-c", "import vqfast, vqfast.kernels.specs as s; print(vqfast.__file__, len(s.SPECS))"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/nonexistent"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(tmp_path / "site"))


@pytest.mark.slow
def test_isolated_build_needs_no_torch(tmp_path):
    """`pip install .` into an empty environment's build step: only setuptools, pybind11 and ninja come in."""
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)],
        env=os.environ | {"VQFAST_CUDA": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.glob("vqfast-*.whl"))

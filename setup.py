"""Builds vqfast._cpu always and vqfast._cuda wherever nvcc is found, with ninja, from C++ that knows no torch header.

Environment:
    VQFAST_CUDA=0        leave the CUDA extension out
    VQFAST_CUDA_ARCHS    targets, default "80;90;100" (PTX of the last is added for newer devices; 90 brings files named
                         *_hopper.cu for sm_90a, whose instructions no other target has)
    CUDA_HOME            where the toolkit is, if not in /usr/local/cuda or on PATH
    MAX_JOBS             how many compilers run at once
    VQFAST_WERROR=1      a warning is an error, as in `make test`; elsewhere not, where compilers may warn of more
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
BUILD = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"

# One file per instruction set, each with flags of its own. They multiply and add in one rounding; the rest may not.
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512 -ffp-contract=fast"
ISA_FLAGS = {
    "isa_generic": "-ffp-contract=fast",
    "isa_avx2": "-mavx2 -mfma -mf16c -ffp-contract=fast",
    "isa_avx512": AVX512,
    "isa_avx512bf16": f"{AVX512} -mavx512bf16",
    "isa_amx": f"{AVX512} -mamx-tile -mamx-bf16",
}
X86 = platform.machine().lower() in ("x86_64", "amd64")


def find_cuda() -> Path | None:
    if os.environ.get("VQFAST_CUDA") == "0":
        return None
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parents[1]]
    return next((Path(h) for h in homes if h and (Path(h) / "bin" / "nvcc").exists()), None)


def cuda_archs() -> list[str]:
    return [a.strip() for a in os.environ.get("VQFAST_CUDA_ARCHS", "80;90;100").split(";") if a.strip()]


def pybind_include() -> Path:
    """pybind11's headers, copied to a stable place: an isolated build's own path changes every time."""
    import pybind11

    target = BUILD / f"pybind11-{pybind11.__version__}"
    if not target.exists():
        shutil.copytree(pybind11.get_include(), target)
    return target


def write_ninja(cuda: Path | None) -> None:
    """build.ninja with absolute paths; a depfile for every object, so a header's change rebuilds what reads it."""
    python = sysconfig.get_paths()["include"]
    cxx = os.environ.get("CXX", "g++")
    strict = os.environ.get("VQFAST_WERROR") == "1"
    flags = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp -Wall -Wextra {'-Werror ' * strict}-I{CSRC}/include"
    bind = f"-isystem {python} -isystem {pybind_include()}"
    lines = [
        "ninja_required_version = 1.5",
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d {flags} $flags -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n  description = C++ $in",
        f"rule link\n  command = {cxx} -shared -fopenmp -Wl,--exclude-libs,ALL $in $libs -o $out\n"
        "  description = link $out",
    ]

    def compile_cxx(source: Path, extra: str) -> str:
        obj = f"{source.stem}.o"
        lines.append(f"build {obj}: cxx {source}\n  flags = {extra}")
        return obj

    objects = []
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if source.stem.startswith("isa_") and not X86 and source.stem != "isa_generic":
            continue
        objects.append(compile_cxx(source, ISA_FLAGS.get(source.stem, "-ffp-contract=off")))
    objects.append(compile_cxx(CSRC / "bind_cpu.cpp", bind))
    lines.append(f"build _cpu{SUFFIX}: link {' '.join(objects)}\ndefault _cpu{SUFFIX}")

    if cuda is not None:
        archs = cuda_archs()
        hopper = "90" in archs
        gencode = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
        gencode += f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"
        define = "-DVQFAST_HOPPER " if hopper else ""
        lines.append(
            f"rule nvcc\n  command = {cuda}/bin/nvcc -MMD -MF $out.d -std=c++17 -O3 "
            f"-Xcompiler -fPIC,-fvisibility=hidden {'-Werror all-warnings ' * strict}{define}-I{CSRC}/include $gencode "
            "-c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = CUDA $in"
        )
        objects = []
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            own = gencode
            if source.stem.endswith("_hopper"):
                if not hopper:
                    continue
                own = "-gencode arch=compute_90a,code=sm_90a"
            objects.append(f"{source.stem}.cu.o")
            lines.append(f"build {objects[-1]}: nvcc {source}\n  gencode = {own}")
        targets = f'-DVQFAST_CUDA_TARGETS=\\"{",".join("sm_" + a for a in archs)}\\"'
        objects.append(compile_cxx(CSRC / "bind_cuda.cpp", f"{bind} -isystem {cuda}/include {targets}"))
        lib = next(p for p in (cuda / "lib64", cuda / "targets/x86_64-linux/lib", cuda / "lib") if p.exists())
        lines.append(
            f"build _cuda{SUFFIX}: link {' '.join(objects)}\n  libs = -L{lib} -lcudart_static -lrt -ldl -lpthread\n"
            f"default _cuda{SUFFIX}"
        )
    BUILD.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    path = BUILD / "build.ninja"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def run_ninja() -> None:
    try:
        import ninja

        program = str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        program = shutil.which("ninja") or sys.exit("vqfast: ninja is needed to build (pip install ninja)")
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    if subprocess.run([program, *jobs], cwd=BUILD).returncode:
        sys.exit("vqfast: the build failed; the compiler said why above")


class NinjaBuild(build_ext):
    def build_extensions(self) -> None:
        write_ninja(CUDA)
        run_ninja()
        super().build_extensions()
        what = f"CUDA extension for {', '.join('sm_' + a for a in cuda_archs())}" if CUDA else "no CUDA extension"
        print(f"vqfast: built the CPU extension and {what}")

    def build_extension(self, ext: Extension) -> None:
        built = BUILD / f"{ext.name.rpartition('.')[2]}{SUFFIX}"
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Removed first: a process that has the old one mapped keeps it.
        target.unlink(missing_ok=True)
        shutil.copy2(built, target)


CUDA = find_cuda()
setup(
    ext_modules=[Extension("vqfast._cpu", [])] + ([Extension("vqfast._cuda", [])] if CUDA else []),
    cmdclass={"build_ext": NinjaBuild},
)

"""Every Triton kernel compiled ahead of time, as its launcher launches it: what it needs, what it is made of.

`budget.json` records, for each version of Triton that it names, the registers a thread uses, the bytes it spills and
the shared memory of a program. `python test_compile.py` writes what the installed version gives now, and
`python test_compile.py OP...` for the cases of these ops only.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from vqfast.kernels.spec import Spec
from vqfast.kernels.specs import SPECS
from vqfast.ops.backends.triton import KERNELS

triton = pytest.importorskip("triton")

BUDGET = Path(__file__).with_name("budget.json")
# Shared memory of one program, in bytes: CUDA C++ Programming Guide, 'Technical Specifications per Compute Capability'.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# float32 everywhere; bfloat16 where it means another instruction mix, on one target.
TARGETS = [(80, torch.float32), (90, torch.float32), (100, torch.float32), (90, torch.bfloat16)]
# Of these, which move elements or are small, one target shows enough.
ONE_TARGET = {"pack", "unpack", "unpack_backward", "position_mask", "grain_entropy"}
# Kernel -> instructions that it must, and must not, be made of. HMMA and the like would be TF32: not the products that
# the bound of the search is about. Float64 where float32 was meant would be slow on most devices.
INSTRUCTIONS = {
    "_search_kernel": ({"FFMA"}, {"HMMA", "HGMMA", "UTCHMMA", "QGMMA", "DFMA", "DADD"}),
    # Without a fused a * b + c but in divisions: it would undo what makes a product exact.
    "_decide_kernel": ({"DMUL", "DADD"}, {"HMMA", "HGMMA", "UTCHMMA", "QGMMA"}),
    "_lookup_kernel": (set(), {"DFMA", "DADD"}),
    "_lookup_backward_kernel": (set(), {"DFMA", "DADD"}),
    "_diffusion_loss_kernel": ({"MUFU"}, set()),
    "_posterior_kernel": ({"MUFU"}, set()),
    "_posterior_backward_kernel": ({"MUFU"}, set()),
    "_p_sample_kernel": ({"MUFU"}, set()),
    # Integer arithmetic but for the comparisons.
    "_q_sample_kernel": ({"IMAD"}, {"DFMA", "HMMA"}),
}
# Spec op -> shapes, each of which launches other kernels, or the same with other constants.
SHAPES = {
    "nearest": [dict(N=128, K=1024, D=64), dict(N=128, K=100, D=65), dict(N=128, K=100, D=64, metric="cosine")],
    "lookup": [dict(N=64, K=32, D=65)],
    "lookup_backward": [dict(N=64, K=32, D=65)],
    "codebook_stats": [dict(N=4000, K=32, D=256, weighted=True)],
    "q_sample": [dict(B=2, L=8, K=32, T=10), dict(B=2, L=8, K=32, T=10, family="marginal")],
    "posterior": [
        dict(B=1, L=2, K=1024, T=10),
        dict(B=1, L=2, K=5000, T=10),
        dict(B=1, L=2, K=1024, T=10, family="mask_and_replace", marginal=True),
        dict(B=1, L=2, K=4096, T=10, family="marginal", marginal=True),
    ],
    "posterior_backward": [
        dict(B=1, L=2, K=1024, T=10),
        dict(B=1, L=2, K=5000, T=10),
        dict(B=1, L=2, K=1024, T=10, family="mask_and_replace", marginal=True),
        dict(B=1, L=2, K=4096, T=10, family="marginal", marginal=True),
    ],
    "diffusion_loss": [
        dict(B=1, L=2, K=1024, T=10),
        dict(B=1, L=2, K=5000, T=10),
        dict(B=1, L=2, K=1024, T=10, family="mask_and_replace", marginal=True),
        dict(B=1, L=2, K=1024, T=10, family="marginal", marginal=True),
    ],
    "p_sample": [
        dict(B=1, L=2, K=1024, T=10, known=True),
        dict(B=1, L=2, K=5000, T=10),
        dict(B=1, L=2, K=1024, T=10, family="mask_and_replace", marginal=True, guidance=2.0, top_k=40, top_p=0.9),
        dict(B=1, L=2, K=5000, T=10, family="marginal", top_k=40),
    ],
    "matrix_loss": [dict(B=1, L=2, K=256, T=2, aux_weight=0.1), dict(B=1, L=2, K=100, T=2, marginal=True)],
    "matrix_sample": [
        dict(B=1, L=2, K=256, T=2, known=True),
        dict(B=1, L=2, K=128, T=2, marginal=True, guidance=2.0, top_k=40, top_p=0.9),
    ],
    "pack": [dict(B=2, H=16, W=16, G=2, D=256), dict(B=2, H=16, W=16, G=3, region=True)],
    "unpack": [dict(B=2, H=16, W=16, G=2, D=256), dict(B=2, H=16, W=16, G=3, corner=True)],
    "unpack_backward": [dict(B=2, H=16, W=16, G=2, D=256), dict(B=2, H=16, W=16, G=3)],
    "position_mask": [dict(B=2, H=4, W=4, G=3)],
    "grain_entropy": [dict(B=1, P=16, rows=2, columns=2)],
}


@dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: tuple
    options: dict


@contextmanager
def recorded_launches():
    """The launches made inside the block, in a list; nothing runs, so that CPU tensors will do."""
    launches: list[Launch] = []

    def record(kernel, *arguments, grid, warmup, **options):
        launches.append(Launch(kernel, arguments, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.jit.JITFunction, "run", record)
        yield launches


def compile_launch(launch: Launch, capability: int) -> Any:
    """The kernel as the launch would have it compiled: same constants, and the same facts about alignment."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    params = launch.kernel.params
    values = dict(zip((p.name for p in params), launch.arguments, strict=False))
    values |= {p.name: launch.options[p.name] for p in params if p.name in launch.options}
    options = {name: value for name, value in launch.options.items() if name not in values}
    signature, constants, attributes = {}, {}, {}
    for i, p in enumerate(params):
        value = values[p.name]
        specialized = isinstance(value, int) and not p.do_not_specialize
        if p.is_constexpr or value is None or (specialized and value == 1):
            signature[p.name], constants[(i,)] = "constexpr", value
            continue
        signature[p.name] = p.annotation_type or triton.runtime.jit.mangle_type(value)
        if isinstance(value, torch.Tensor) or (specialized and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@dataclass(frozen=True)
class Usage:
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: Counter


def usage_of(compiled: Any) -> Usage:
    """Read from the machine code by the disassembler that ships with Triton."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        dump = subprocess.run(
            [cuobjdump, "-res-usage", "-sass", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", dump).groups()
    # Address, an optional predicate, then the instruction up to its first modifier.
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", dump, re.MULTILINE)
    return Usage(int(registers), int(stack), compiled.metadata.shared, Counter(instructions))


def name_of(value: dict) -> str:
    return ",".join(f"{key}={v}" for key, v in value.items())


def scale_rows_launches() -> list[Launch]:
    with recorded_launches() as launches:
        KERNELS["scale_rows_"](torch.empty(2, 8, 1024), torch.empty(2, 8))
    return launches


def launches_of(spec: Spec, shape: dict, dtype: torch.dtype) -> list[Launch]:
    with recorded_launches() as launches:
        KERNELS[spec.op](*spec.inputs(shape, dtype, "cpu", 0))
    return launches


def cases() -> dict[str, tuple[Callable[[], list[Launch]], int]]:
    """Name -> how to get the launches, and the target."""
    found = {}
    for capability, dtype in TARGETS:
        target = f"sm_{capability}-{str(dtype).removeprefix('torch.')}"
        for spec in (spec for spec in SPECS if spec.op in KERNELS):
            # Tokens have one dtype.
            if dtype != torch.float32 and spec.dtypes == (torch.int64,):
                continue
            if spec.op in ONE_TARGET and (capability, dtype) != (90, torch.float32):
                continue
            for shape in SHAPES[spec.op] if capability == 90 and dtype == torch.float32 else SHAPES[spec.op][:1]:

                def launches(spec: Spec = spec, shape: dict = shape, dtype: torch.dtype = dtype) -> list[Launch]:
                    return launches_of(spec, shape, dtype)

                found[f"{spec.op}-{target}-{name_of(shape)}"] = launches, capability
        if dtype == torch.float32:
            found[f"scale_rows_-{target}"] = scale_rows_launches, capability
    return found


CASES = cases()


def usages(case: str) -> dict[str, Usage]:
    """Kernel name -> what it uses, for each launch of a case."""
    launches, capability = CASES[case]
    return {launch.kernel.__name__: usage_of(compile_launch(launch, capability)) for launch in launches()}


def record(case: str) -> dict[str, dict[str, int]]:
    return {
        kernel: dict(registers=u.registers, spilled_bytes=u.spilled_bytes, shared_bytes=u.shared_bytes)
        for kernel, u in usages(case).items()
    }


@pytest.fixture(scope="session")
def budget() -> dict[str, dict[str, dict[str, int]]]:
    recorded = json.loads(BUDGET.read_text())
    if triton.__version__ not in recorded:
        pytest.skip(f"budget.json has no record of triton {triton.__version__}, only of {', '.join(recorded)}")
    return recorded[triton.__version__]


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing compiles")
@pytest.mark.parametrize("case", CASES)
def test_compiles_within_its_budget(case: str, budget: dict) -> None:
    if case not in budget:
        pytest.skip(f"budget.json has no record of {case} for triton {triton.__version__}")
    used = usages(case)
    assert used.keys() == budget[case].keys()
    for kernel, usage in used.items():
        allowed = budget[case][kernel]
        assert usage.registers <= allowed["registers"], kernel
        assert usage.spilled_bytes <= allowed["spilled_bytes"], kernel
        assert usage.shared_bytes <= min(allowed["shared_bytes"], SHARED_LIMIT[CASES[case][1]]), kernel
        required, forbidden = INSTRUCTIONS.get(kernel, (set(), set()))
        present = set(usage.instructions)
        assert required <= present, f"{kernel}: without {required - present}"
        assert not forbidden & present, f"{kernel}: {forbidden & present}"


@pytest.mark.parametrize("case", [case for case in CASES if "sm_90-float32" in case])
def test_every_launch_says_whether_products_and_sums_may_fuse(case: str) -> None:
    """Triton's default changes with its version; only the exact decision needs every product and sum rounded."""
    for launch in CASES[case][0]():
        assert launch.options["enable_fp_fusion"] is (launch.kernel.__name__ != "_decide_kernel")


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing compiles")
@pytest.mark.parametrize("default", ["0", "1"])
@pytest.mark.parametrize("metric", ["l2", "dot", "cosine"])
def test_only_the_scores_of_a_search_have_fused_products(metric: str, default: str, monkeypatch) -> None:
    """In PTX, where neither Triton nor the assembler behind it may fuse any more, whatever the default."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
    spec = next(spec for spec in SPECS if spec.op == "nearest")
    ptx = {
        launch.kernel.__name__: compile_launch(launch, 90).asm["ptx"]
        for launch in launches_of(spec, dict(N=128, K=100, D=64, metric=metric), torch.float32)
    }
    decide, search = ptx["_decide_kernel"], ptx["_search_kernel"]
    assert "fma." not in decide and "mul.rn.f64" in decide and "add.rn.f64" in decide
    assert "fma.rn.f32" in search


def test_the_first_version_in_the_budget_has_every_case() -> None:
    """Others, which few machines have, may lag behind: their missing cases are skipped by name."""
    version, recorded = next(iter(json.loads(BUDGET.read_text()).items()))
    missing = CASES.keys() - recorded.keys()
    assert not missing, f"record them with triton {version}: {sorted(missing)}"


def test_nothing_in_the_budget_spills(budget: dict) -> None:
    spilling = [
        f"{case}: {kernel}"
        for case, kernels in budget.items()
        for kernel, allowed in kernels.items()
        if allowed["spilled_bytes"]
    ]
    assert not spilling


def _search_launch(N: int, K: int) -> Launch:
    x = torch.empty(N, 64)
    with recorded_launches() as launches:
        KERNELS["nearest"](x, torch.empty(K, 64))
    return launches[1]


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing compiles")
def test_another_number_of_rows_or_codes_compiles_nothing_new() -> None:
    """Same signature, constants and alignment: same source, hence the same entry in Triton's cache."""
    first, second = (compile_launch(_search_launch(*size), 90) for size in ((1, 1), (4096, 777)))
    assert first.hash == second.hash


if __name__ == "__main__":
    records = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    written = [case for case in CASES if not sys.argv[1:] or case.split("-")[0] in sys.argv[1:]]
    kept = {case: kernels for case, kernels in records.get(triton.__version__, {}).items() if case in CASES}
    records[triton.__version__] = kept | {case: record(case) for case in written}
    BUDGET.write_text(json.dumps(records, indent=1) + "\n")
    sys.exit(0)

"""What ptxas made of the kernels in the built extension: registers, stack, shared memory, memory instructions."""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

# Threads of a block and blocks that a multiprocessor must hold, from the kernels' launch bounds.
BOUNDS = {
    "nearest_scores": (256, 2),
    "nearest_exact": (256, 1),
    "nearest_tensor_scores": (256, 1),
    "nearest_hopper_scores<2": (384, 1),
    "nearest_hopper_scores<3": (512, 1),
    "lookup": (256, 4),
    "stats_scan_codes": (1024, 1),
    "stats_sum": (256, 4),
    "diffusion_loss_rows": (512, 1),
    "posterior_rows": (512, 1),
    "posterior_backward_rows": (512, 1),
    "p_sample_rows": (512, 1),
    "pack": (256, 2),
    "unpack": (256, 2),
    "position_mask": (256, 2),
    "grain_entropy": (256, 2),
}
REGISTERS = 65536  # of a multiprocessor, from sm_80 to sm_100
STATIC_SHARED = 48 << 10
# Shared memory of a multiprocessor; a block takes one KiB more than it asks for.
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_90a": 228 << 10, "sm_100": 228 << 10}
HOPPER = "nearest_hopper_scores"  # compiled for sm_90a alone


@pytest.fixture(scope="module")
def extension() -> Path:
    try:
        from vqfast import _cuda
    except ImportError:
        pytest.skip("the CUDA extension is not built (nvcc not found, or VQFAST_CUDA=0)")
    return Path(_cuda.__file__)


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    """Of the toolkit, or the one that triton brings."""
    program = shutil.which("cuobjdump", path="/usr/local/cuda/bin") or shutil.which("cuobjdump")
    triton = find_spec("triton")
    if program is None and triton is not None and triton.origin is not None:
        program = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends/nvidia/bin"))
    if program is None:
        pytest.skip("no cuobjdump (the CUDA toolkit or triton has one)")
    return program


def demangled(text: str) -> str:
    program = shutil.which("c++filt")
    if program is None:
        pytest.skip("no c++filt (binutils has it)")
    names = subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout
    return names.replace("(anonymous namespace)::", "")


@pytest.fixture(scope="module")
def usage(extension, cuobjdump) -> dict[tuple[str, str], dict[str, int]]:
    """(target, kernel) -> REG, STACK, SHARED, LOCAL."""
    command = [cuobjdump, "-res-usage", str(extension)]
    text = demangled(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found, target, kernel = {}, "", ""
    for line in text.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            target = match[1]
        elif match := re.match(r" Function (?:void )?(?:vqfast::)?(.+)\(.*:$", line):
            kernel = match[1].replace("vqfast::", "")
        elif "REG:" in line:
            found[target, kernel] = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
    return found


def test_every_target_has_every_kernel(usage, extension):
    from vqfast import _cuda

    targets = set(re.findall(r"sm_\w+", _cuda.targets))
    kernels = {kernel for _, kernel in usage}
    hopper = {kernel for kernel in kernels if kernel.startswith(HOPPER)}
    expected = {(target, kernel) for target in targets for kernel in kernels - hopper}
    assert set(usage) == expected | {("sm_90a", kernel) for kernel in hopper}
    assert len(hopper) == (4 if "sm_90" in targets else 0)
    for name, instances in [
        ("nearest_scores", 8), ("nearest_exact", 4), ("nearest_tensor_scores", 2), ("nearest_choose", 4),
        ("nearest_tensor_rows", 4), ("nearest_tensor_codes", 4), ("lookup_rows", 4), ("lookup_tiles", 4),
        ("lookup_backward_rows", 4), ("lookup_backward_tiles", 4), ("stats_sum", 4), ("diffusion_loss_rows", 8),
        ("posterior_rows", 8), ("posterior_backward_rows", 8),
        ("scale_rows", 8), ("q_sample_tokens", 1), ("p_sample_rows", 8),
        ("pack_rows", 1), ("pack_cells", 4), ("pack_tail", 4), ("unpack_slots", 1), ("unpack_grid", 8),
        ("unpack_sum", 8), ("position_mask", 1), ("grain_entropy", 4),
    ]:  # fmt: skip
        assert sum(kernel.split("<")[0] == name for kernel in kernels) == instances, name


def test_no_kernel_spills_registers_or_keeps_arrays_in_memory(usage):
    assert not {key: use for key, use in usage.items() if use["STACK"] or use["LOCAL"]}


def test_registers_and_shared_memory_leave_room_for_the_blocks_that_launch_bounds_promise(usage):
    for (target, kernel), use in usage.items():
        key = next((key for key in BOUNDS if kernel.startswith(key)), None)
        threads, blocks = BOUNDS[key] if key else (256, 1)
        granted = -(-use["REG"] // 8) * 8
        assert granted * threads * blocks <= REGISTERS, (target, kernel, use)
        assert use["SHARED"] <= STATIC_SHARED, (target, kernel, use)
        assert (use["SHARED"] + 1024) * blocks <= SHARED.get(target, 100 << 10), (target, kernel, use)


def disassembled(extension: Path, cuobjdump: str, target: str) -> dict[str, str]:
    """kernel -> SASS."""
    command = [cuobjdump, "-sass", "-arch", target, str(extension)]
    text = demangled(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    parts = re.split(r"\n\s*Function : (?:void )?(?:vqfast::)?", text)[1:]
    return {part.splitlines()[0].split("(")[0].replace("vqfast::", ""): part for part in parts}


@pytest.fixture(scope="module")
def instructions(extension, cuobjdump) -> dict[str, str]:
    """For sm_90, or for the newest target where that was not built."""
    from vqfast import _cuda

    targets = re.findall(r"sm_\w+", _cuda.targets)
    return disassembled(extension, cuobjdump, "sm_90" if "sm_90" in targets else targets[-1])


def test_memory_is_read_and_written_16_bytes_at_a_time(instructions):
    for kernel in [
        "lookup_rows<float>", "lookup_rows<bf16>", "lookup_backward_rows<f16>", "diffusion_loss_rows<float, 4>",
        "diffusion_loss_rows<bf16, 8>", "diffusion_loss_rows<double, 2>", "scale_rows<bf16, 8>",
        "posterior_rows<float, 4>", "posterior_rows<bf16, 8>", "posterior_backward_rows<float, 4>",
        "posterior_backward_rows<bf16, 8>",
    ]:  # fmt: skip
        assert re.search(r"LDG\.E\.\S*128", instructions[kernel]), kernel
        assert re.search(r"STG\.E\.\S*128", instructions[kernel]), kernel
    assert re.search(r"LDG\.E\.\S*128", instructions["p_sample_rows<float, 4>"])


def test_search_multiplies_and_adds_in_one_instruction_from_16_byte_shared_reads(instructions):
    for kernel in ["nearest_scores<float, false>", "nearest_scores<bf16, true>"]:
        sass = instructions[kernel]
        assert len(re.findall(r"\bFFMA\b", sass)) >= 4 * 64, kernel
        assert len(re.findall(r"\bLDS\.128\b", sass)) >= 4 * 4, kernel
        assert not re.search(r"\b(DFMA|DMUL|DADD)\b", sass), kernel


def test_no_kernel_adds_floats_atomically(instructions):
    """Sums in the order of arrival would change from run to run."""
    for kernel, sass in instructions.items():
        assert not re.search(r"\b(ATOM|ATOMG|ATOMS|RED|REDG)\.\S*(F32|F64|F16|BF16)", sass), kernel


def test_tensor_scores_are_products_of_matrices_fed_in_the_background(instructions):
    for stages in (2, 3):
        kernel = instructions[f"nearest_tensor_scores<{stages}>"]
        for instruction in ("HMMA.16816.F32.BF16", "LDSM.16.M88.4", r"LDGSTS\.E\.BYPASS\.128"):
            assert re.search(instruction, kernel), instruction


def test_warpgroups_multiply_from_shared_memory_that_the_copy_engine_fills(usage, extension, cuobjdump):
    """And wait where the source says so: ptxas adds waits for all products where it cannot follow their sums."""
    if not any(target == "sm_90a" for target, _ in usage):
        pytest.skip("built without sm_90 (VQFAST_CUDA_ARCHS)")
    kernels = disassembled(extension, cuobjdump, "sm_90a")
    for instance, products in {"3, 5": 2, "3, 6": 4, "3, 7": 16, "2, 7": 16}.items():
        kernel, sass = f"{HOPPER}<{instance}>", kernels[f"{HOPPER}<{instance}>"]
        assert len(re.findall(r"HGMMA\.64x128x16\.F32\.BF16", sass)) == products, kernel
        assert len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", sass)) == 1, kernel
        for instruction in ("UBLKCP", r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT", r"SYNCS\.ARRIVE\.TRANS64", "USETMAXREG"):
            assert re.search(instruction, sass), (kernel, instruction)
        assert not re.search(r"\b(LDL|STL)\b", sass), kernel


def test_registers_that_warpgroups_take_are_those_that_one_gives_up(usage, extension, cuobjdump):
    """Who asks for more than the block was launched with waits for ever."""
    if not any(target == "sm_90a" for target, _ in usage):
        pytest.skip("built without sm_90 (VQFAST_CUDA_ARCHS)")
    kernels = disassembled(extension, cuobjdump, "sm_90a")
    for instance, groups in {"3, 5": 3, "3, 6": 3, "3, 7": 3, "2, 7": 2}.items():
        kernel = f"{HOPPER}<{instance}>"
        (given_up,) = re.findall(r"USETMAXREG\.DEALLOC\S* 0x(\w+)", kernels[kernel])
        (taken,) = re.findall(r"USETMAXREG\.TRY_ALLOC\S* \w+, 0x(\w+)", kernels[kernel])
        given_up, taken, launched = int(given_up, 16), int(taken, 16), usage["sm_90a", kernel]["REG"]
        assert given_up <= launched <= taken and given_up % 8 == taken % 8 == 0, (kernel, given_up, taken, launched)
        assert given_up + groups * taken <= (groups + 1) * launched, (kernel, given_up, taken, launched)

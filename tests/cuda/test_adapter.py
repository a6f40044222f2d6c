"""From tensors to launchers, and what is said where there is no device."""

import pytest
import torch

from vqfast.kernels.specs import SPECS as ALL_SPECS
from vqfast.ops import registry
from vqfast.ops.backends import cuda
from vqfast.ops.backends.compiled import CompiledKernels

SPECS = [spec for spec in ALL_SPECS if spec.op in cuda.KERNELS]
NO_DRIVER = "CUDA driver version is insufficient|no CUDA-capable device"


@pytest.fixture(scope="module")
def cpu_kernels() -> dict:
    """The adapter over the CPU launchers, whose arguments are those of the CUDA ones but for the last."""
    _cpu = pytest.importorskip("vqfast._cpu", reason="the CPU extension is not built")
    return CompiledKernels(_cpu).kernels()


@pytest.fixture(scope="module")
def _cuda():
    module = pytest.importorskip("vqfast._cuda", reason="the CUDA extension is not built")
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    return module


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.op)
def test_arguments_arrive_in_their_places(cpu_kernels, spec):
    for shape in spec.test_shapes:
        args = spec.inputs(shape, spec.dtypes[-1], "cpu", seed=5)
        spec.check(cpu_kernels[spec.op](*args), args)


def test_strided_and_transposed_arguments_are_read_right(cpu_kernels):
    for spec in SPECS:
        args = spec.inputs(spec.test_shapes[3], spec.dtypes[0], "cpu", seed=6)
        strided = tuple(a.mT.contiguous().mT if isinstance(a, torch.Tensor) and a.ndim > 1 else a for a in args)
        spec.check(cpu_kernels[spec.op](*strided), args)


def test_the_extension_says_what_the_machine_lacks(_cuda):
    with pytest.raises(RuntimeError, match=NO_DRIVER):
        _cuda.devices()
    assert "no CUDA device" in registry.status("cuda")["cuda"]


def test_an_error_of_the_runtime_is_raised_with_its_own_text(_cuda):
    with pytest.raises(RuntimeError, match=f"CUDA kernel failed: ({NO_DRIVER})"):
        _cuda.nearest_scratch(8, 8, 8, 0)
    with pytest.raises(RuntimeError, match=f"CUDA kernel failed: ({NO_DRIVER})"):
        _cuda.scale_rows(0, 0, 1, 1, 0, 0, 0, 0)
    assert _cuda.error_string(1000 + 2) == "out of memory"


def test_scores_that_do_not_exist_are_named_with_those_that_do(_cuda, monkeypatch):
    monkeypatch.setenv("VQFAST_CUDA_SCORES", "wgmma")
    with pytest.raises(ValueError, match="VQFAST_CUDA_SCORES: expected float32, bfloat16 or hopper, got wgmma"):
        _cuda.nearest_scratch(8, 8, 8, 0)


def test_scratch_memory_of_statistics_grows_with_what_it_holds(_cuda):
    small, large = (_cuda.codebook_stats_scratch(0, N, 64, 1024) for N in (1000, 100_000))
    # Row numbers and, per 64 rows, two partial sums.
    assert 99_000 * (4 + 2 * 65 * 4 / 64) <= large - small <= 99_000 * (4 + 2 * 65 * 4 / 64) + 1024 * 4 * 400


def test_more_rows_than_can_be_numbered_are_left_to_another_backend():
    indices = torch.empty(1, dtype=torch.int64).expand(2**31)
    assert "2147483648 vectors" in cuda.unsupported("codebook_stats", (None, indices, None, 8))
    assert cuda.unsupported("codebook_stats", (None, indices[:100], None, 8)) is None
    assert cuda.unsupported("no_such_op", ()) == "it has no kernel for no_such_op"


def test_a_device_older_than_the_targets_is_refused(monkeypatch):
    class Extension:
        targets = "sm_80,sm_90"

        @staticmethod
        def devices():
            return ["sm_90", "sm_75"]

    monkeypatch.setattr(cuda, "_cuda", Extension)
    assert cuda.unavailable("cuda").startswith("cuda:1 is sm_75, the extension was built for sm_80,sm_90")
    monkeypatch.setattr(Extension, "devices", staticmethod(list))
    assert cuda.unavailable("cuda") == "no CUDA device"

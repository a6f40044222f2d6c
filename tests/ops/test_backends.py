"""Every backend that runs here gives what the float64 reference gives, on every op, dtype and odd shape."""

import os
import subprocess
import sys

import pytest
import torch

import vqfast
from vqfast.kernels.specs import SPECS
from vqfast.ops import registry
from vqfast.ops.checks import checking

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
CASES = [
    pytest.param(spec, name, device, id=f"{spec.op}-{name}-{device}")
    for spec in SPECS
    for device in DEVICES
    for name, reason in registry.status(device).items()
    if reason is None and spec.op in registry.BACKENDS[name].KERNELS
]


def names_of(shape) -> str:
    return ",".join(f"{k}={v}" for k, v in shape.items())


# A dtype a test, for on a device Triton compiles kernels for each.
@pytest.mark.parametrize(
    ("spec", "backend", "device", "dtype"),
    [
        pytest.param(*case.values, dtype, id=f"{case.id}-{str(dtype).removeprefix('torch.')}")
        for case in CASES
        for dtype in case.values[0].dtypes
    ],
)
def test_matches_reference(spec, backend, device, dtype):
    op = getattr(torch.ops.vqfast, spec.op)
    with vqfast.backend(backend):
        for shape in spec.test_shapes:
            args = spec.inputs(shape, dtype, device, seed=1)
            try:
                spec.check(op(*args), args)
            except Exception as error:
                raise AssertionError(f"{names_of(shape)}: {error}") from error


@pytest.mark.parametrize(("spec", "backend", "device"), CASES)
def test_same_bits_every_time_and_with_any_number_of_threads(spec, backend, device):
    op = getattr(torch.ops.vqfast, spec.op)
    args = spec.inputs(spec.test_shapes[4 if len(spec.test_shapes) > 4 else -1], spec.dtypes[0], device, seed=2)
    threads = torch.get_num_threads()
    results = []
    with vqfast.backend(backend):
        try:
            for n in (1, 2, 3, 1):
                torch.set_num_threads(n)
                result = op(*args)
                results.append(result if isinstance(result, tuple) else (result,))
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.op)
def test_opcheck(spec, device):
    args = spec.inputs(spec.test_shapes[0], spec.dtypes[0], device, seed=3)
    torch.library.opcheck(getattr(torch.ops.vqfast, spec.op).default, args)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_scale_rows(device):
    rows, scale = torch.randn(3, 4, 5, device=device), torch.rand(3, 4, device=device)
    torch.library.opcheck(torch.ops.vqfast.scale_rows_.default, (rows, scale))


@pytest.mark.parametrize(
    ("backend", "device"),
    [(b, d) for d in DEVICES for b, reason in registry.status(d).items() if reason is None],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_scale_rows_multiplies_each_row_in_place_and_leaves_rows_of_scale_one(backend, device, dtype):
    rows = torch.randn(3, 5, 131, device=device).to(dtype)
    rows[0, 0, 0] = torch.nan
    scale = torch.rand(3, 5, device=device).to(torch.promote_types(dtype, torch.float32))
    scale[0], scale[1, 1] = 1, 0.5
    want = torch.where(scale[..., None] == 1, rows, (rows.to(scale.dtype) * scale[..., None]).to(dtype))
    with vqfast.backend(backend):
        torch.ops.vqfast.scale_rows_(rows, scale)
        torch.testing.assert_close(rows, want, equal_nan=True)
        torch.ops.vqfast.scale_rows_(rows, torch.tensor(2.0, dtype=scale.dtype, device=device).expand(3, 5))
        torch.testing.assert_close(rows, (want * 2).to(dtype), equal_nan=True)


class TestChoosing:
    def test_unknown_backend_lists_those_available(self):
        with (
            pytest.raises(ValueError, match=r"'cudnn' does not exist; available.*cpu.*reference"),
            vqfast.backend("cudnn"),
        ):
            pass

    def test_missing_backend_says_why(self, monkeypatch):
        monkeypatch.setattr(registry.BACKENDS["triton"], "unavailable", lambda device: "triton is not installed")
        registry.status.cache_clear()
        try:
            with pytest.raises(ValueError, match="triton is not installed"), vqfast.backend("triton"):
                pass
        finally:
            monkeypatch.undo()
            registry.status.cache_clear()

    @pytest.mark.parametrize(
        ("name", "words"), [("reference", "vqfast.ops.backends.reference"), ("magic", "'magic' does not exist")]
    )
    def test_environment_variable(self, name, words):
        code = (
            "import torch, vqfast\nfrom vqfast.ops import registry\n"
            "vqfast.ops.nearest_code(torch.zeros(1, 1), torch.zeros(1, 1))\n"
            "print(registry.select('nearest', 'cpu', ()).__module__)"
        )
        run = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"VQFAST_BACKEND": name}, capture_output=True, text=True
        )
        assert words in run.stdout + run.stderr

    def test_block_ends_with_the_previous_choice(self):
        with vqfast.backend("reference"):
            with vqfast.backend("cpu"):
                assert registry.select("nearest", "cpu", ()) is registry.BACKENDS["cpu"].KERNELS["nearest"]
            assert registry.select("nearest", "cpu", ()) is registry.BACKENDS["reference"].KERNELS["nearest"]


class TestCheckedMode:
    def test_from_the_environment(self):
        code = (
            "import torch, vqfast\n"
            "grains = torch.zeros(1, 2, 2, dtype=torch.int64)\n"
            "codes = torch.zeros(1, 4, 4, dtype=torch.int64)\n"
            "vqfast.ops.pack(codes, grains + 1, capacity=15)"
        )
        for asked, words in (("1", "expected at least 16 tokens, got 15"), ("0", "")):
            run = subprocess.run(
                [sys.executable, "-c", code], env=os.environ | {"VQFAST_CHECK": asked}, capture_output=True, text=True
            )
            assert (run.returncode != 0) == bool(words) and words in run.stderr, run.stderr

    def test_block_ends_with_the_previous_choice(self):
        with vqfast.checked():
            with vqfast.checked(False):
                assert not checking()
            assert checking()
        assert not checking()

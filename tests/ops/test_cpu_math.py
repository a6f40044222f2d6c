"""What the vector code of each instruction set computes: exp, log(1 + r) - r, and the half-precision conversions."""

import ctypes
import os
import runpy
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
LANES = {"generic": 4, "avx2": 8, "avx512": 16}
RUNS_HERE = {"AVX2": ("generic", "avx2"), "AVX512": ("generic", "avx2", "avx512")}
SOURCE = """
#include "cpu/simd_double.h"
#include "cpu/simd_math.h"
using namespace vqfast;
using namespace vqfast::VQFAST_ISA;

template <class In, class Out, class Body>
static void each(const In *in, Out *out, int64_t n, Body body) {
  for (int64_t i = 0; i < n; i += kWidth<In>) store(out + i, body(load(in + i)));
}
extern "C" {
void exp_of(const float *in, float *out, int64_t n) { each(in, out, n, [](vf x) { return exp(x); }); }
void log1p_minus_of(const float *in, float *out, int64_t n) {
  each(in, out, n, [](vf r) { return log1p_minus(r, splat(1.0f) + r); });
}
void exp_of_doubles(const double *in, double *out, int64_t n) { each(in, out, n, [](vd x) { return exp(x); }); }
void log_of_doubles(const double *in, double *out, int64_t n) { each(in, out, n, [](vd x) { return log(x); }); }
void widen_bf16(const bf16 *in, float *out, int64_t n) { each(in, out, n, [](vf x) { return x; }); }
void widen_f16(const f16 *in, float *out, int64_t n) { each(in, out, n, [](vf x) { return x; }); }
void round_bf16(const float *in, bf16 *out, int64_t n) { each(in, out, n, [](vf x) { return x; }); }
void round_f16(const float *in, f16 *out, int64_t n) { each(in, out, n, [](vf x) { return x; }); }
}
"""


def build_flags() -> dict[str, str]:
    """Source file of an instruction set -> compiler flags, as the build has them."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))["ISA_FLAGS"]


class VectorCode:
    """Functions of SOURCE on whole tensors."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))

    def __call__(self, name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        count = values.numel()
        padded = torch.zeros(-(-count // 16) * 16, dtype=values.dtype)
        padded[:count] = values
        out = torch.empty(padded.shape, dtype=dtype)
        address = ctypes.c_void_p
        getattr(self.library, name)(address(padded.data_ptr()), address(out.data_ptr()), ctypes.c_int64(padded.numel()))
        return out[:count]


@pytest.fixture(scope="module", params=list(LANES))
def vector_code(request, tmp_path_factory) -> VectorCode:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler (g++, or CXX)")
    if request.param not in RUNS_HERE.get(torch.backends.cpu.get_cpu_capability(), ("generic",)):
        pytest.skip(f"this processor has no {request.param}")
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "math.cpp").write_text(SOURCE)
    options = f"-std=c++17 -O2 -shared -fPIC -Wall -Wextra -Werror {build_flags()['isa_' + request.param]}".split()
    defines = [f"-DVQFAST_ISA={request.param}", f"-DVQFAST_LANES={LANES[request.param]}"]
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    library = folder / "math.so"
    subprocess.run([compiler, *options, *defines, *include, str(folder / "math.cpp"), "-o", str(library)], check=True)
    return VectorCode(library)


def log_uniform(low: float, high: float, count: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return 10 ** (torch.rand(count, generator=g, dtype=torch.float64) * (high - low) + low)


def test_exp_is_within_one_ulp(vector_code):
    x = -torch.cat([log_uniform(-30, 1.94, 1 << 18), torch.linspace(0, 87.33, 1 << 19, dtype=torch.float64)]).float()
    x = x[x > -87.33]
    want = x.double().exp()
    ulp = torch.from_numpy(np.spacing(want.float().numpy())).double()
    assert ((vector_code("exp_of", x, torch.float32).double() - want).abs() <= ulp).all()


def test_exp_at_the_ends(vector_code):
    x = torch.tensor([0.0, -0.0, -torch.inf, -88.0, -1e30, -1e-40, 88.0, torch.nan, torch.inf])
    got = vector_code("exp_of", x, torch.float32)
    assert got[:6].tolist() == [1, 1, 0, 0, 0, 1]
    torch.testing.assert_close(got[6], x[6].exp(), rtol=2e-7, atol=0)
    assert got[7].isnan()
    assert not got[8].isfinite()


def test_log1p_minus_keeps_its_digits_however_small_r_is(vector_code):
    r = torch.cat([log_uniform(-17, 35, 1 << 19), torch.linspace(0.2, 3, 1 << 18, dtype=torch.float64)]).float()
    wide = r.double()
    series = wide.square() * (-1 / 2 + wide * (1 / 3 + wide * (-1 / 4 + wide / 5)))
    want = torch.where(wide < 1e-3, series, wide.log1p() - wide)
    got = vector_code("log1p_minus_of", r, torch.float32).double()
    assert ((got - want).abs() <= 2e-6 * want.abs()).all()
    ends = vector_code("log1p_minus_of", torch.tensor([0.0, torch.nan]), torch.float32)
    assert ends[0] == 0
    assert ends[1].isnan()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_every_half_precision_number_is_read_and_written_exactly(vector_code, name, dtype):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    got = vector_code(f"widen_{name}", bits.view(dtype), torch.float32)
    torch.testing.assert_close(got, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    back, number = vector_code(f"round_{name}", got, dtype), ~got.isnan()
    assert torch.equal(back.view(torch.int16)[number], bits[number])
    assert back[~number].isnan().all()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_rounding_to_half_precision_is_to_nearest_even(vector_code, name, dtype):
    exact = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    exact = exact[exact.isfinite()].float().sort().values
    middle = ((exact[1:].double() + exact[:-1].double()) / 2).float()
    edges = torch.tensor([65519.0, 65520.0, 65536.0, 3.39e38, 1e-8, 2.0**-25, 2.0**-26, torch.inf, -torch.inf])
    above, below = middle.nextafter(torch.tensor(torch.inf)), middle.nextafter(torch.tensor(-torch.inf))
    values = torch.cat([middle, above, below, edges, -edges])
    got = vector_code(f"round_{name}", values, dtype)
    torch.testing.assert_close(got, values.to(dtype), rtol=0, atol=0)
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert vector_code(f"round_{name}", nan, dtype).isnan().all()


class TestDoubles:
    def test_exp_within_two_ulp_down_to_the_smallest_normal_number(self, vector_code):
        x = torch.cat([-log_uniform(-12, 2.85, 20_000), torch.linspace(-708.38, 0, 20_001, dtype=torch.float64)])
        want = torch.from_numpy(np.exp(x.numpy().astype(np.longdouble)).astype(np.float64))
        got = vector_code("exp_of_doubles", x, torch.float64)
        spacing = torch.from_numpy(np.spacing(want.numpy()))
        assert ((got - want).abs() <= 2 * spacing).all()

    def test_exp_of_zero_infinity_and_nan(self, vector_code):
        x = torch.tensor([0.0, -0.0, -708.4, -1e300, -torch.inf, torch.nan], dtype=torch.float64)
        got = vector_code("exp_of_doubles", x, torch.float64)
        assert got[:5].tolist() == [1, 1, 0, 0, 0] and got[5].isnan()

    def test_log_within_three_ulp_near_one_and_of_the_smallest_numbers(self, vector_code):
        near = 1 + torch.linspace(-0.4, 0.6, 20_001, dtype=torch.float64) ** 3
        small = 10.0 ** torch.linspace(-307, 300, 20_001, dtype=torch.float64)
        x = torch.cat([near, small])
        want = torch.from_numpy(np.log(x.numpy().astype(np.longdouble)).astype(np.float64))
        got = vector_code("log_of_doubles", x, torch.float64)
        spacing = torch.from_numpy(np.spacing(np.abs(want.numpy())))
        assert ((got - want).abs() <= 3 * spacing).all()

    def test_log_of_zero_one_and_nan(self, vector_code):
        x = torch.tensor([0.0, -0.0, 1.0, torch.nan], dtype=torch.float64)
        got = vector_code("log_of_doubles", x, torch.float64)
        assert got[:3].tolist() == [-torch.inf, -torch.inf, 0] and got[3].isnan()

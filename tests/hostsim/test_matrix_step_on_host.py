"""Steps through matrices on the simulated device: tiles of every height, codes and samples that no tile fits evenly."""

import pytest
import simulator
import torch

from vqfast.kernels.matrix_loss.spec import SPEC as LOSS
from vqfast.kernels.matrix_sample.spec import SPEC as SAMPLE

# Of K = 140 codes: tiles of 16, 8 and 4 rows.
SHARED_BYTES = (227 << 10, 30 << 10, 20 << 10)
SHAPES = (
    dict(B=2, L=21, K=140, T=3, step=2, banded=True),
    dict(B=3, L=17, K=140, T=3, marginal=True, aux_weight=0.1, known=True, top_p=0.9),
)


def calls(dtype: torch.dtype) -> list[tuple]:
    made = []
    for spec in (LOSS, SAMPLE):
        for shape in SHAPES:
            args = spec.inputs(shape, dtype, "cpu", 3)
            made.append((spec, args, simulator.CALLS[spec.op](*args)))
    return made


def test_tiles_of_any_height_give_the_same_bits():
    made = calls(torch.float32)
    results = [simulator.run([call for *_, call in made], shared_bytes=size) for size in SHARED_BYTES]
    for (spec, args, _), first, *others in zip(made, *results, strict=True):
        spec.check(simulator.result(spec.op, first), args)
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("spec", [LOSS, SAMPLE], ids=lambda spec: spec.op)
def test_codes_that_take_the_threads_two_turns(spec):
    args = spec.inputs(dict(B=1, L=5, K=300, T=2, shared=True, step=2, known=True), torch.float32, "cpu", 7)
    spec.check(simulator.result(spec.op, simulator.run([simulator.CALLS[spec.op](*args)])[0]), args)


def test_without_a_gradient_no_transpose_is_read():
    *args, with_grad = LOSS.inputs(SHAPES[0], torch.bfloat16, "cpu", 4)
    assert with_grad
    [[loss]] = simulator.run([simulator.matrix_loss(*args, False)])
    LOSS.check((loss, None), (*args, False))


def test_codes_that_no_tile_holds_are_refused():
    args = LOSS.inputs(dict(B=1, L=1, K=1025, T=1), torch.float32, "cpu", 5)
    with pytest.raises(RuntimeError, match="error code 1001"):
        simulator.run([simulator.matrix_loss(*args)])


@pytest.mark.parametrize("spec", [LOSS, SAMPLE], ids=lambda spec: spec.op)
def test_indices_out_of_range_stay_within_memory(spec):
    """A kernel cannot raise: it reads where it may."""
    args = list(spec.inputs(dict(B=2, L=5, K=33, T=3, known=True), torch.float32, "cpu", 6))
    for i, value in enumerate(args):
        if isinstance(value, torch.Tensor) and value.dtype == torch.int64 and value.ndim == 2:
            args[i] = torch.where(value % 2 == 0, value + 1000, value - 1000)
    simulator.run([simulator.CALLS[spec.op](*args)])

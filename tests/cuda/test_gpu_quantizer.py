"""What a quantiser promises on a device: its whole training step, codebook upkeep included, replays in a CUDA graph."""

import pytest
import torch

from vqfast.nn import VectorQuantize
from vqfast.ops import registry

pytestmark = pytest.mark.gpu
HEADS = dict(heads=2, codebook_dim=8, separate_codebook_per_head=True)


@pytest.fixture(autouse=True)
def _device():
    reason = registry.status("cuda")["cuda"]
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)


def step(vq: VectorQuantize, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    quantized, indices, loss = vq(x)
    (grad,) = torch.autograd.grad(quantized.square().sum() + loss, x)
    return quantized, indices, loss, grad


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        HEADS,
        dict(use_cosine_sim=True),
        dict(rotation_trick=True),
        dict(threshold_ema_dead_code=0.5),
        dict(stochastic_sample_codes=True),
        dict(commitment_use_cross_entropy_loss=True),
    ],
)
def test_a_training_step_replays_in_a_cuda_graph(options):
    eager, captured = (VectorQuantize(16, 64, **options).cuda() for _ in range(2))
    codes = torch.randn_like(eager.codebook)
    start = eager.state_dict() | {"codebook": codes, "embed_avg": codes}
    start = {name: value.clone() for name, value in start.items()}
    x = torch.randn(4, 50, 16, device="cuda", requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(captured, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(captured, x)
    for vq in (eager, captured):
        vq.load_state_dict(start)
    for _ in range(4):
        x.data.normal_()
        graph.replay()
        expected = step(eager, x)
        if options.keys() & {"threshold_ema_dead_code", "stochastic_sample_codes"}:
            # Random choices differ from those of an eager step.
            assert all(output.isfinite().all() for output in outputs)
            assert captured.codebook.isfinite().all()
            continue
        torch.testing.assert_close(outputs, expected)
        for name, value in eager.state_dict().items():
            torch.testing.assert_close(captured.state_dict()[name], value)
    assert not torch.equal(captured.codebook, start["codebook"])

"""A reverse step as a CUDA graph: its launches cost one, whatever the denoiser is made of."""

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP = 3  # runs before capture, as torch asks: lazy initialisation and autotuning must not be captured


class GraphedStep:
    """A step (x, t, s) -> x_s that is captured at the first call and replayed at every one.

    Args:
        step: (x (B, L) int64, t (B,) int64, s (B,) int64) -> (B, L) int64, free of host syncs.
        x: a tensor of the shape and device of every call, on CUDA.
        generator: the one that `step` draws from, so that each replay draws anew; None for torch's own.
    """

    def __init__(self, step: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, generator: torch.Generator | None):
        if generator is not None and generator.device.type != "cuda":
            raise ValueError(f"generator: expected one on {x.device} for a CUDA graph, got one on {generator.device}")
        self.step = step
        self.generator = generator
        self.inputs = (x.clone(), x.new_ones(x.shape[0]), x.new_zeros(x.shape[0]))
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Tensor | None = None

    def _capture(self) -> None:
        # The runs before capture draw random numbers; the state is put back so that a seed gives the same sample.
        source = self.generator or torch.cuda.default_generators[torch.cuda.current_device()]
        state = source.get_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self.step(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        source.set_state(state)
        self.graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            self.graph.register_generator_state(self.generator)
        with torch.cuda.graph(self.graph):
            self.output = self.step(*self.inputs)

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        with torch.cuda.device(x.device):
            for held, given in zip(self.inputs, (x, t, s), strict=True):
                held.copy_(given)
            if self.graph is None:
                self._capture()
            self.graph.replay()
            return self.output.clone()

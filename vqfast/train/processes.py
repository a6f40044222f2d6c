"""One model in several processes: replicated (DDP) or sharded (FSDP2), and what each process holds of a tensor."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vqfast.train.blocks import blocks

# The older name warns where the newer one exists.
_KNOWN = signature(DistributedDataParallel).parameters
_BUFFERS_STAY = {"forward_sync_buffers" if "forward_sync_buffers" in _KNOWN else "broadcast_buffers": False}


def replicate(step: nn.Module, parameters: list[nn.Parameter], device: torch.device) -> DistributedDataParallel:
    """A step whose backward pass leaves the mean of the processes' gradients in `parameters`, and in no others.

    Buffers are not sent around: modules that change them see to it that every process makes the same change.
    """
    trained = {id(p) for p in parameters}
    others = [name for name, p in step.named_parameters() if id(p) not in trained]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, others)
    return DistributedDataParallel(
        step, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True, **_BUFFERS_STAY
    )


def shard(step: nn.Module, others: list[nn.Parameter], device: torch.device) -> None:
    """Spread the step's parameters but for `others` over the processes: block by block, then what is left."""
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks(step):
        fully_shard(block, mesh=mesh, ignored_params=set(others))
    fully_shard(step, mesh=mesh, ignored_params=set(others))


@contextmanager
def gathered(step: nn.Module) -> Iterator[None]:
    """Inside, the modules of a sharded step can be called by themselves, without gradients, on the present weights.

    Left to itself, FSDP2 holds on to what it last gathered for a forward pass that no backward pass follows, and would
    begin the next step of the training with that.
    """
    sharded = [module for module in step.modules() if isinstance(module, FSDPModule)]
    if isinstance(step, FSDPModule):
        step.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def unsynced(step: nn.Module, last: bool) -> AbstractContextManager:
    """Inside, the backward pass leaves gradients in each process, unless this is the last batch of a step."""
    if isinstance(step, FSDPModule):
        step.set_requires_gradient_sync(last)
    elif isinstance(step, DistributedDataParallel) and not last:
        return step.no_sync()
    return nullcontext()


def ended_elsewhere(error: RuntimeError) -> bool:
    """Whether an error came of the end of another process."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor in full; every process must ask at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A full tensor on the device of the reference, and sharded as that is."""
    tensor = tensor.to(reference.device)
    if isinstance(reference, DTensor) and tensor.shape == reference.shape:
        return distribute_tensor(tensor, reference.device_mesh, reference.placements)
    return tensor

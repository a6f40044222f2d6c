"""Fixtures of the quantisers' tests."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS_THE_DEVICE = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal", "bincount"}
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}


class NothingReadBack(TorchDispatchMode):
    """Raises where an operation's result or its shape would wait for values on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS_THE_DEVICE:
            raise AssertionError(f"{name} reads a value back to the host")
        # A mask as an index is a nonzero in disguise.
        if name in INDEXES and any(index is not None and index.dtype == torch.bool for index in args[1]):
            raise AssertionError(f"{name} with a mask reads its size back to the host")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def nothing_read_back():
    return NothingReadBack

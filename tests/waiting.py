"""Operations that wait for the device: found by dispatch, and by name where a CPU tensor needs none."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_unique2")
METHODS = ("tolist", "numpy", "cpu", "item", "__array__", "__bool__", "__float__", "__int__", "__index__")


class Recorder(TorchDispatchMode):
    """Lists the operations that wait for their result."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or by_mask:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def waits():
    """The operations that wait, of dispatch and of methods."""
    patch = pytest.MonkeyPatch()
    with patch.context() as replaced, Recorder() as recorder:
        for name in METHODS:
            original = getattr(torch.Tensor, name)

            def method(self, *args, original=original, name=name, **kwargs):
                recorder.found.append(name)
                return original(self, *args, **kwargs)

            replaced.setattr(torch.Tensor, name, method)
        yield recorder.found

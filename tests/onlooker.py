"""A device that is none, with data: what waits for a GPU is seen where there is no GPU.

Its tensors call themselves "meta", so that the library takes the path of every device other than the CPU,
but hold their values in CPU tensors. Whatever would make the host wait for a GPU is written down.
"""

import contextlib
import traceback
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

import ncfast

HOME = Path(ncfast.__file__).parent
DEVICE = torch.device("meta")
aten = torch.ops.aten
WAITING = {  # what needs a value on the host
    aten._local_scalar_dense,  # item(), bool(), int()
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten._unique2,
    aten.unique_consecutive,
    aten.bincount,
    aten.repeat_interleave,
    aten._linalg_check_errors,
}


class Onlooked(torch.Tensor):
    """A tensor of the device; `held` has its values."""

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, **layout, device=DEVICE)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of `onlooking`")

    # These two reach no dispatcher.
    def tolist(self):
        _write_down("tolist")
        return self.held.tolist()

    def new_tensor(self, data, dtype=None):
        _write_down("new_tensor")
        return Onlooked(self.held.new_tensor(data, dtype=dtype))


class _Onlooking(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        here = any(isinstance(value, Onlooked) for value in given) or kwargs.get("device") == DEVICE
        if here and (func.overloadpacket in WAITING or self._crosses(func, args, kwargs, given)):
            _write_down(func.overloadpacket.__name__)
        args, kwargs = tree_map_only(Onlooked, lambda tensor: tensor.held, (args, kwargs))
        to = kwargs.get("device")
        if to == DEVICE:
            kwargs["device"] = torch.device("cpu")
        result = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, Onlooked, result) if here and to != torch.device("cpu") else result

    @staticmethod
    def _crosses(func, args, kwargs, given):
        """Whether it copies between host and device, or indexes with a mask."""
        if func.overloadpacket in (aten._to_copy, aten.copy_):
            sides = {isinstance(value, Onlooked) for value in given}
            return len(sides) > 1 or ("device" in kwargs and (kwargs["device"] == DEVICE) not in sides)
        if func.overloadpacket in (aten.index, aten.index_put_, aten.index_put):
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return False


_open: list[list[str]] = []


def _write_down(what):
    ours = [frame for frame in traceback.extract_stack() if HOME in Path(frame.filename).parents]
    _open[-1].append(f"{ours[-1].name}: {what}" if ours else what)


@contextlib.contextmanager
def onlooking():
    """Collect "function of ncfast: operation" for everything that would wait inside the `with` block."""
    waits: list[str] = []
    _open.append(waits)
    try:
        with _Onlooking():
            yield waits
    finally:
        _open.pop()


def on_device(tensors):
    """The same values on the device."""
    return tree_map_only(torch.Tensor, Onlooked, tensors)


def held(tensors):
    """The CPU tensors behind those on the device; what is not on it as it is."""
    return tree_map_only(Onlooked, lambda tensor: tensor.held, tensors)

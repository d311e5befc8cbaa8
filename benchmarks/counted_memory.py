"""Memory without the memory: tensors that have sizes and no content (PyTorch's fake tensors), storage by storage."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30


@contextmanager
def norms_in_float32() -> Iterator[None]:
    """Under autocast normalisations run in float32, as on a GPU: the CPU's autocast leaves them as they are."""

    def exact(norm: Callable) -> Callable:
        def call(*args, **kwargs):
            if torch.is_autocast_enabled("cpu"):
                args = [one.float() if isinstance(one, torch.Tensor) else one for one in args]
                kwargs = {name: one.float() if isinstance(one, torch.Tensor) else one for name, one in kwargs.items()}
            return norm(*args, **kwargs)

        return call

    with ExitStack() as patched:
        for name in ("group_norm", "layer_norm"):
            patched.enter_context(patch.object(nn.functional, name, exact(getattr(nn.functional, name))))
        yield


class Counted(TorchDispatchMode):
    """Counts the bytes of the storages that live.

    Attributes:
        now, peak: bytes of those made since the beginning; `peak` is the most there was since the last `of` began.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return result

    def ignore(self, module: nn.Module) -> None:
        """Do not count its weights: they are there before."""
        self._sizes |= {tensor.untyped_storage()._cdata: 0 for tensor in (*module.parameters(), *module.buffers())}

    @contextmanager
    def of(self, phases: dict[str, float], name: str) -> Iterator[None]:
        """Note the GiB that come on top within it, as `name`."""
        start = self.peak = self.now
        yield
        phases[name] = (self.peak - start) / GIB

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def fill(module: nn.Module, dtype: torch.dtype) -> float:
    """Give a module without weights fake ones, frozen ones in `dtype`, trained ones in float32; returns their GiB."""
    size = 0
    for part in module.modules():
        for kind in (part._parameters, part._buffers):
            for name, tensor in kind.items():
                if tensor is None:
                    continue
                exact = torch.float32 if tensor.requires_grad else dtype
                empty = torch.empty(tensor.shape, dtype=exact if tensor.is_floating_point() else tensor.dtype)
                kind[name] = nn.Parameter(empty, tensor.requires_grad) if kind is part._parameters else empty
                size += empty.numel() * empty.element_size()
    return size / GIB

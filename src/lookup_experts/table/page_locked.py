"""Memory of this machine that a CUDA device reads by itself.

Memory that is registered with CUDA is locked in RAM and has the same address on the device: a
kernel reads a record over the bus as it reads its own memory, and no host takes part. Registering
pins page after page, so a large table is registered in chunks, with progress.
"""

import threading
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary, finalize

import numpy as np
import torch
from torch import Tensor

from lookup_experts.errors import UserError
from lookup_experts.table.progress import late_progress
from lookup_experts.units import format_bytes

CHUNK_BYTES = 2**30
"""Of one registration; the driver holds its lock for as long as one takes."""


class PageLocked:
    """Registered memory, for as long as somebody holds this.

    Args:
        array: uint8, contiguous, writable; begins and ends with its pages.
    """

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self._registered: list[int] = []
        finalize(self, _unregister, array, self._registered).atexit = False
        address, num_bytes = array.ctypes.data, array.nbytes
        runtime: Any = torch.cuda.cudart()
        with late_progress("Locking the table in memory", num_bytes) as advance:
            for first in range(0, num_bytes, CHUNK_BYTES):
                size = min(CHUNK_BYTES, num_bytes - first)
                code = runtime.cudaHostRegister(address + first, size, 0)
                if int(code) != 0:
                    reason = runtime.cudaGetErrorString(code)
                    _forget_error()
                    raise UserError(
                        f"CUDA refuses to lock {format_bytes(num_bytes)} in memory after "
                        f"{format_bytes(first)}: {reason}. Use the store 'direct' or a smaller "
                        "cache, or give the machine (its control group, its limit of locked "
                        "memory) more."
                    )
                self._registered.append(address + first)
                advance(size)

    def on(self, device: torch.device) -> Tensor:
        """The same bytes as a tensor of a device, uint8, in the array's shape. Whoever uses it
        holds this object as well."""
        with torch.inference_mode(False):
            return torch.as_tensor(_Described(self._array), device=device)


def _forget_error() -> None:
    """Or the next launch of a kernel would report what was refused here."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)


class _Described:
    """An array as the protocol of CUDA arrays describes it."""

    def __init__(self, array: np.ndarray) -> None:
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": "|u1",
            "data": (array.ctypes.data, False),
            "version": 3,
        }


def _unregister(array: np.ndarray, registered: list[int]) -> None:
    """`array` is only there so that the memory outlives its registration."""
    runtime: Any = torch.cuda.cudart()
    for address in registered:
        runtime.cudaHostUnregister(address)


_held: "WeakValueDictionary[int, PageLocked]" = WeakValueDictionary()
_lock = threading.Lock()


def lock_pages(array: np.ndarray) -> PageLocked:
    """Register memory, or share the registration that it has: several readers of a table in RAM
    read the same memory, which CUDA registers once.

    Raises:
        UserError: CUDA refuses.
    """
    with _lock:
        held = _held.get(array.ctypes.data)
        if held is None:
            held = _held[array.ctypes.data] = PageLocked(array)
        return held

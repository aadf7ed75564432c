"""The way of bytes from the host to where the model runs, beside the model's own work.

A `Lane` is a queue of copies: a CUDA stream of its own, whose copies run while the model's stream
computes. What the device brings by itself (`device_rows.py`) runs beside as well, on another
stream (`Lane.beside`). Both queues are asked for work by the host and do it later, so they are
ordered by marks: a mark is reached when everything that was queued before it is done. The model's
queue waits for a mark of the lane before it reads what was copied, the lane waits for the model's
queue before it overwrites what was read. The host waits in one place only, for the token ids of
prompts that are on disk (`Lane.to_host`).

`HostLane` is the reference: the same in order, without a device and at once.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lookup_experts.errors import UserError
from lookup_experts.table.host_memory import aligned_buffer


class Mark(Protocol):
    """A place in a queue."""

    def wait(self) -> None:
        """Let the host wait until everything before it is done."""
        ...


class Lane(Protocol):
    """What brings bytes to a device; safe to use from several threads.

    "The model's queue" is the calling thread's current stream.
    """

    device: torch.device

    def host_memory(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] on the host that copies can be made from without waiting."""
        ...

    def device_memory(self, num_rows: int, row_bytes: int) -> Tensor:
        """uint8 [num_rows, row_bytes] on the device, with whatever is in it."""
        ...

    def model_queue(self) -> Any:
        """The model's queue, to hand to `mark_of`, later or by another thread."""
        ...

    def mark_of(self, queue: Any) -> Mark:
        """Reached when everything that is in this queue now is done."""
        ...

    def follow(self, mark: Mark) -> None:
        """Start no further copy before this mark is reached."""
        ...

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Mark:
        """Queue copies of contiguous bytes; `sources` are parts of `host_memory`."""
        ...

    def beside(self, work: Callable[[], None], tensors: Sequence[Tensor]) -> Mark:
        """Call `work`, which queues something, to be done after all that the model's queue was
        told so far, and beside what it is told from now on.

        Captured in a CUDA graph with the model's queue if that is, so each mark must be waited
        for.

        Args:
            tensors: of the model's queue, that `work` reads and writes.
        """
        ...

    def lead(self, mark: Mark) -> None:
        """Let the model's queue wait for a mark of this lane; the host doesn't."""
        ...

    def to_device(self, numbers: np.ndarray) -> Tensor:
        """int64 numbers on the device, by the model's queue; the host doesn't wait."""
        ...

    def to_host(self, token_ids: Tensor) -> np.ndarray:
        """Token ids as int64 on the host. This is the one place where the host waits for the
        device: ids that a GPU chose must be known before their records can be asked for."""
        ...


class HostLane:
    """Copies at once, from memory to memory."""

    device = torch.device("cpu")

    def host_memory(self, num_bytes: int) -> Tensor:
        return torch.from_numpy(aligned_buffer(num_bytes))

    def device_memory(self, num_rows: int, row_bytes: int) -> Tensor:
        with torch.inference_mode(False):  # copies are made outside of it as well
            return torch.from_numpy(aligned_buffer(num_rows * row_bytes)).view(num_rows, row_bytes)

    def model_queue(self) -> Any:
        return None

    def mark_of(self, queue: Any) -> Mark:
        return _Reached()

    def follow(self, mark: Mark) -> None:
        pass

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Mark:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        return _Reached()

    def beside(self, work: Callable[[], None], tensors: Sequence[Tensor]) -> Mark:
        work()
        return _Reached()

    def lead(self, mark: Mark) -> None:
        pass

    def to_device(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers)

    def to_host(self, token_ids: Tensor) -> np.ndarray:
        return token_ids.to(torch.int64).numpy()


class _Reached:
    def wait(self) -> None:
        pass


class CudaLane:
    """Copies on a CUDA stream of its own, out of page-locked memory.

    Index numbers and token ids are few and go through torch's own cache of page-locked memory,
    which gives a block away again only when the copies out of it are over.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self.device)
        self._beside: dict[int, torch.cuda.Stream] = {}
        """By the model's queue, so that no thread's work is captured in another's graph."""

    def host_memory(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def device_memory(self, num_rows: int, row_bytes: int) -> Tensor:
        shape = (num_rows, row_bytes)
        with torch.inference_mode(False):  # copies are made outside of it as well
            memory = torch.empty(shape, dtype=torch.uint8, device=self.device)
        # It may have been somebody's whose work is still queued; and when it is let go, nobody
        # is to have it before the lane's copies are over.
        self.follow(self.mark_of(self.model_queue()))
        memory.record_stream(self._stream)
        return memory

    def model_queue(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def mark_of(self, queue: Any) -> Mark:
        return _CudaMark(queue)

    def follow(self, mark: Mark) -> None:
        assert isinstance(mark, _CudaMark)
        self._stream.wait_event(mark.event)

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Mark:
        with torch.cuda.stream(self._stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            return _CudaMark(self._stream)

    def beside(self, work: Callable[[], None], tensors: Sequence[Tensor]) -> Mark:
        model_queue = self.model_queue()
        stream = self._beside.get(model_queue.cuda_stream)
        if stream is None:
            stream = self._beside[model_queue.cuda_stream] = torch.cuda.Stream(self.device)
        stream.wait_stream(model_queue)
        with torch.cuda.stream(stream):
            work()
            mark = _CudaMark(stream)
        if not torch.cuda.is_current_stream_capturing():  # a graph's memory is its own
            for tensor in tensors:
                tensor.record_stream(stream)
        return mark

    def lead(self, mark: Mark) -> None:
        assert isinstance(mark, _CudaMark)
        self.model_queue().wait_event(mark.event)

    def to_device(self, numbers: np.ndarray) -> Tensor:
        pinned = torch.from_numpy(numbers).pin_memory()
        return pinned.to(self.device, non_blocking=True)

    def to_host(self, token_ids: Tensor) -> np.ndarray:
        if token_ids.device.type == "cpu":
            return token_ids.to(torch.int64).numpy()
        pinned = torch.empty(token_ids.shape, dtype=torch.int64, pin_memory=True)
        pinned.copy_(token_ids, non_blocking=True)
        # An event of its own: what else is queued, on other streams, is not waited for.
        self.mark_of(self.model_queue()).wait()
        return pinned.numpy()


class _CudaMark:
    """An event recorded on a stream."""

    def __init__(self, stream: "torch.cuda.Stream") -> None:
        self.event = torch.cuda.Event()
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()


def open_lane(device: torch.device) -> Lane | None:
    """The lane to a CUDA device; None for others, which take records from RAM."""
    return CudaLane(device) if device.type == "cuda" else None


def check_device(device: str | torch.device) -> None:
    """Raise a `UserError` if there is no such device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown, or not built into this torch
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"No device {str(device)!r} here: {reason}. Use cpu, or cuda where there is a GPU."
        ) from error

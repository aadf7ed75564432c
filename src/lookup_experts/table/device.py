"""Table form where the model runs on a GPU.

The device finds the records of a step's ids itself (`device_rows.py`): out of the table in
page-locked RAM (`device_records.py`), or out of caches that a process beside this one fills from
the disk (`device_cache.py`). The host queues kernels and waits for nothing, so a whole step of the
model can be a CUDA graph. A prompt's records, where the table is on disk, are read by the host
(`device_prompt.py`): their ids come to it once, and nothing else lets it wait for the device.
"""

from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np
import torch
from torch import Tensor

from lookup_experts.model.rows import TokenRows, check_bounds
from lookup_experts.table.device_prompt import PromptRows
from lookup_experts.table.device_records import CacheCounts, DeviceMemoryRecords, DeviceRecords
from lookup_experts.table.device_rows import STEP_POSITIONS, StagedRows, staged_rows
from lookup_experts.table.lanes import Lane
from lookup_experts.table.mixing import prepare
from lookup_experts.table.reading_thread import ThreadedRead, submit_read
from lookup_experts.table.rows import Decoding, LayerGroup, WaitClock
from lookup_experts.table.store import Store

Count = Callable[[int, int, bool], None]
"""Told (ids asked, unique ids, whether the device found them) of every batch; a step that is
replayed from a CUDA graph isn't seen by the host."""


class DeviceReader:
    """Gives the rows of batches on a device.

    Args:
        decoding: how records become rows; its device is the lane's.
        store: where prompts are read from.
        records: within reach of the device.
        thread: reads prompts.
        clock: counts the waiting for records.
        lane: to the device.
        count: told of every batch.
        group_bytes: about what each of a prompt's buffers may take.
    """

    def __init__(
        self,
        decoding: Decoding,
        store: Store,
        records: DeviceRecords,
        thread: Executor,
        clock: WaitClock,
        lane: Lane,
        count: Count,
        group_bytes: int,
    ) -> None:
        self._decoding, self._store, self._records = decoding, store, records
        self._thread, self._clock, self._lane, self._count = thread, clock, lane, count
        self._group_bytes = group_bytes
        shape = decoding.layout.shape
        prepare(decoding.layout.encoding, shape.num_experts, shape.row_size, lane.device)
        with torch.inference_mode(False):
            self._positions = torch.arange(STEP_POSITIONS, device=lane.device)

    def counts(self) -> CacheCounts | None:
        """What steps met, where the device counts it."""
        return self._records.counts()

    def fill_cache(self) -> int:
        """See `TableReader.fill_cache`."""
        return self._records.fill()

    def check(self) -> None:
        """See `TableReader.check`."""
        self._records.check()

    def rows(self, token_ids: Tensor, ready: bool) -> TokenRows:
        """See `TableReader.rows`; errors on the device are told by the next call."""
        self.check()
        most = self._records.most_positions
        num_positions = token_ids.numel()
        if num_positions and (most is None or num_positions <= most):
            self._count(num_positions, num_positions, True)
            return staged_rows(
                self._decoding,
                self._records,
                token_ids.to(self._lane.device),
                ready,
                self._group_bytes,
                self._lane,
                self._positions,
            )
        return self._rows_read_by_the_host(token_ids, ready)

    def _rows_read_by_the_host(self, token_ids: Tensor, ready: bool) -> TokenRows:
        ids = self._lane.to_host(token_ids.reshape(-1))
        unique_ids, index = np.unique(ids, return_inverse=True)
        if len(ids):
            vocab_size = self._decoding.layout.shape.vocab_size
            check_bounds(int(unique_ids[0]), int(unique_ids[-1]), vocab_size)
        self._count(len(ids), len(unique_ids), False)
        index_on_device = self._lane.to_device(index).view(token_ids.shape)
        if ready or not len(ids):
            return self._rows_at_once(unique_ids, index_on_device)
        return PromptRows(
            self._decoding,
            self._store,
            self._thread,
            unique_ids,
            index_on_device,
            self._clock,
            self._group_bytes,
            self._lane,
        )

    def _rows_at_once(self, unique_ids: np.ndarray, index: Tensor) -> StagedRows:
        """All of a prompt's records, before a graph that can't wait for them."""
        layout = self._decoding.layout
        host = self._lane.host_memory(len(unique_ids) * layout.stride)
        memory = self._lane.device_memory(len(unique_ids), layout.stride)
        records = host.numpy().reshape(-1, layout.stride)
        self._clock.wait(
            ThreadedRead(submit_read(self._thread, self._store.read, unique_ids, records))
        )
        mark = self._lane.copy([memory.view(-1)], [host])
        self._lane.lead(mark)
        mark.wait()  # then nothing reads `host` any more
        whole = LayerGroup(range(layout.shape.num_layers), 0, layout.stride)
        places = torch.arange(len(unique_ids), device=self._lane.device)
        rows = StagedRows(
            self._decoding,
            DeviceMemoryRecords(memory),
            places,
            index.view(-1),
            index.shape,
            [whole],
            self._lane,
        )
        rows.wait()
        return rows

    def close(self) -> None:
        """Give back what is held; queued work must have come to its end, which is waited for."""
        self._records.close()

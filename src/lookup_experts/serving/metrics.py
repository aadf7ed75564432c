"""What the server counts: Prometheus metrics, and the speed of the last seconds."""

import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from lookup_experts.folders.readers import TableReaders

RECENT_SECONDS = 5.0
_LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SHORT = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class ServingMetrics:
    """Counters of one server.

    Args:
        table: what reads the model's tables, or None.
    """

    def __init__(self, table: TableReaders | None) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "mole_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self.sequences = Counter(
            "mole_sequences", "Sequences that ended, by how.", ["end"], registry=registry
        )
        self.prompt_tokens = Counter("mole_prompt_tokens", "Prompt tokens.", registry=registry)
        self.tokens = Counter("mole_generated_tokens", "Generated tokens.", registry=registry)
        self.steps = Counter("mole_decoding_steps", "Steps of the batch.", registry=registry)
        self.rejected = Counter(
            "mole_rejected_requests", "Requests refused for a full queue.", registry=registry
        )
        self.table_errors = Counter(
            "mole_table_errors",
            "Sequences failed by records that can't be read.",
            registry=registry,
        )
        self.waiting = Gauge("mole_waiting_sequences", "Sequences queued.", registry=registry)
        self.running = Gauge("mole_running_sequences", "Sequences in the batch.", registry=registry)
        self.first_token = Histogram(
            "mole_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_LONG,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "mole_inter_token_seconds",
            "Between two tokens of a sequence.",
            buckets=_SHORT,
            registry=registry,
        )
        self.total = Histogram(
            "mole_sequence_seconds",
            "From a request's arrival to its end.",
            buckets=_LONG,
            registry=registry,
        )
        if table is not None:
            registry.register(_TableCollector(table))
        self._recent: deque[tuple[float, int]] = deque()

    def count_tokens(self, number: int, now: float) -> None:
        """So many tokens were generated at a `time.monotonic()`; from the engine's thread."""
        self.tokens.inc(number)
        if self._recent and self._recent[-1][0] == now:
            number += self._recent.pop()[1]
        self._recent.append((now, number))
        while self._recent[0][0] < now - RECENT_SECONDS:
            self._recent.popleft()

    @property
    def tokens_per_second(self) -> float:
        """Over the last seconds; from any thread."""
        since = time.monotonic() - RECENT_SECONDS
        return sum(number for at, number in list(self._recent) if at >= since) / RECENT_SECONDS

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


class _TableCollector(Collector):
    """The reader's own counts, read when they are asked for."""

    def __init__(self, table: TableReaders) -> None:
        self._table = table

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        stats = self._table.stats()
        for name, text, value in (
            ("batches", "Batches of token ids.", stats.batches),
            ("ids_asked", "Token ids looked up.", stats.ids_asked),
            ("ids_unique", "Distinct ids per batch, summed.", stats.ids_unique),
            ("cache_hits", "Of the distinct ids, found in the row cache.", stats.cache_hits),
            ("read_bytes", "Bytes brought from the store.", stats.bytes_read),
            ("read_seconds", "From asking the store to having records.", stats.read_seconds),
            ("wait_seconds", "Spent by the model, waiting for records.", stats.wait_seconds),
        ):
            yield CounterMetricFamily(f"mole_table_{name}", text, value=value)
        yield GaugeMetricFamily(
            "mole_table_cache_budget_bytes", "Budget of the row cache.", value=stats.cache_bytes
        )


def resident_bytes() -> int:
    """Memory of this process that is in RAM, shared pages included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096

"""Dense and MoLE from disk, served in turn on the same machine under the same load."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from lookup_experts.benchmarks.serving.load import Client, Load, Stream
from lookup_experts.benchmarks.timing import median, pair_ratios, percentile

Result = dict[str, Any]
Progress = Callable[[int, int], None]
WARM_UP_SHARE = 0.2
"""Of a soak; the memory after it is compared with that to its end."""


async def measure_streams(
    clients: Mapping[str, Client], counts: Sequence[int], rounds: int, progress: Progress
) -> list[Result]:
    """For each number of streams: rounds in which each system is loaded once, the other idle.

    Args:
        clients: by system; `dense` is what the others are compared with.
        counts: numbers of concurrent streams.
        rounds: measured for each number, after one that isn't.
        progress: told how many loads are done.
    """
    results: list[Result] = []
    done, total = 0, len(counts) * (rounds + 1) * len(clients)
    names = list(clients)
    for streams in counts:
        loads: dict[str, list[Load]] = {name: [] for name in names}
        for number in range(rounds + 1):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                loads[name].append(await clients[name].load_once(streams))
                done += 1
                progress(done, total)
        measured = {name: found[1:] for name, found in loads.items()}
        dense = [load.tokens_per_second for load in measured["dense"]]
        for name, found in measured.items():
            speeds = [load.tokens_per_second for load in found]
            requests = [stream for load in found for stream in load.streams]
            results.append(
                {
                    "system": name,
                    "streams": streams,
                    "tokens_per_second": median(speeds),
                    "ratio_to_dense": median(pair_ratios(speeds, dense)),
                    **_latencies(requests),
                    **_losses(requests),
                }
            )
    return results


async def measure_soak(
    name: str, client: Client, streams: int, minutes: float, progress: Progress
) -> Result:
    """One system under steady load: requests lost, growth of memory, drift of latency.

    It has seen every prompt before, so what the first requests of each kind take is there.
    """
    await client.send_all_prompts(streams, progress)
    load = await client.soak(streams, minutes * 60, progress)
    steady = [used for at, used in load.memory if at >= WARM_UP_SHARE * load.seconds]
    middle = len(load.streams) // 2
    return {
        "system": name,
        "streams": streams,
        "soak_minutes": load.seconds / 60,
        "tokens_per_second": load.tokens_per_second,
        **_latencies(load.streams),
        "inter_token_ms_p95_halves": [
            _latencies(half)["inter_token_ms"]["p95"]
            for half in (load.streams[:middle], load.streams[middle:])
        ],
        **_losses(load.streams),
        "resident_bytes_after_warm_up": steady[0],
        "resident_bytes_at_end": steady[-1],
        "resident_bytes_change": max(abs(used / steady[0] - 1) for used in steady),
        "resident_bytes_over_time": [[round(at, 1), used] for at, used in load.memory],
    }


def _losses(streams: Sequence[Stream]) -> Result:
    """How many requests there were, how many did not give all their tokens, and why."""
    return {
        "requests": len(streams),
        "lost": sum(not stream.complete for stream in streams),
        "errors": sorted({stream.error for stream in streams if stream.error}),
    }


def _latencies(streams: Sequence[Stream]) -> Result:
    """Milliseconds to the first token, and between tokens; None where no token came."""
    first = [stream.token_times[0] - stream.sent_at for stream in streams if stream.token_times]
    between = [
        later - earlier for stream in streams for earlier, later in pairwise(stream.token_times)
    ]
    return {"ttft_ms": _p50_p95(first), "inter_token_ms": _p50_p95(between)}


def _p50_p95(seconds: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(seconds)
    return {
        name: percentile(ordered, share) * 1e3 if ordered else None
        for name, share in (("p50", 0.5), ("p95", 0.95))
    }

"""`mole bench read`."""

from pathlib import Path

from lookup_experts import console
from lookup_experts.commands import options
from lookup_experts.commands.bench import options as bench_options
from lookup_experts.commands.bench.report import counts, line, report


def read(
    shape: bench_options.Shape = "160m",
    experts: bench_options.Experts = 4,
    encoding: bench_options.Encoding = "bfloat16",
    store: options.Store = "direct",
    batch: bench_options.Counts = "1,8,32,256",
    work: bench_options.Work = Path("runs/bench"),
    json: bench_options.JsonFile = None,
    plot: bench_options.Plot = None,
) -> None:
    """Random records, beside large sequential reads of the same disk.

    Example: `mole bench read --batch 32,256`
    """
    from lookup_experts.benchmarks.models import Case, random_table
    from lookup_experts.benchmarks.reading import WAYS, measure_read
    from lookup_experts.table.reader import SLOT_BATCH
    from lookup_experts.table.store_choice import open_store

    with console.progress_bar("Writing a table") as progress:
        table = random_table(Case(shape, experts, encoding), work, progress)
    results = []
    with open_store(table, store, notify=console.say) as opened:
        for size in counts(batch):
            for way in WAYS if size <= SLOT_BATCH else (w for w in WAYS if w.under_way == 1):
                results.append(measure_read(table, opened, size, way).to_dict())
                console.say(line(results[-1]))
    report("read", results, json, plot)

"""`mole bench build`."""

from pathlib import Path

from lookup_experts import console
from lookup_experts.commands.bench import options as bench_options
from lookup_experts.commands.bench.report import line, report


def build(
    shape: bench_options.Shape = "160m",
    experts: bench_options.Experts = 4,
    encoding: bench_options.Encoding = "bfloat16",
    work: bench_options.Work = Path("runs/bench"),
    json: bench_options.JsonFile = None,
    plot: bench_options.Plot = None,
) -> None:
    """A table from experts with random weights, against the bare matrix products.

    The table stays in `--work` for the other benchmarks' taking.

    Example: `mole bench build --encoding nf4`
    """
    from lookup_experts.allocation import keep_freed_memory
    from lookup_experts.benchmarks.building import measure_build
    from lookup_experts.benchmarks.models import Case
    from lookup_experts.errors import UserError

    keep_freed_memory()  # as `mole reparameterize` does
    case = Case(shape, experts, encoding)
    folder = work / case.built_name
    if folder.exists():
        raise UserError(f"{folder} exists already; delete it, or give another --work.")
    with console.progress_bar("Building") as progress:
        results = [measure_build(case, folder, progress).to_dict()]
    console.say(line(results[0]))
    report("build", results, json, plot)

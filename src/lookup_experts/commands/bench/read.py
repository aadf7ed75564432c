"""`mole bench read`."""

from lookup_experts.commands import options
from lookup_experts.commands.bench import options as bench_options


def read(
    shape: bench_options.Shape = "160m",
    experts: bench_options.Experts = 4,
    encoding: bench_options.Encoding = "bfloat16",
    store: options.Store = "direct",
    batch: bench_options.Counts = "1,8,32,256",
    work: bench_options.Work = bench_options.WORK,
    json: bench_options.JsonFile = None,
    plot: bench_options.Plot = None,
) -> None:
    """Random records, beside large sequential reads of the same disk.

    Example: `mole bench read --batch 32,256`
    """
    from lookup_experts.benchmarks.read import bench_read
    from lookup_experts.benchmarks.results import Results

    case = bench_options.case_of(shape, experts, encoding)
    bench_read(case, store, bench_options.counts(batch), work, Results("read", json, plot))

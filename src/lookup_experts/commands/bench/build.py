"""`mole bench build`."""

from lookup_experts.commands.bench import options as bench_options


def build(
    shape: bench_options.Shape = "160m",
    experts: bench_options.Experts = 4,
    encoding: bench_options.Encoding = "bfloat16",
    work: bench_options.Work = bench_options.WORK,
    json: bench_options.JsonFile = None,
    plot: bench_options.Plot = None,
) -> None:
    """A table from experts with random weights, against the bare matrix products.

    The table stays in `--work` for the other benchmarks' taking.

    Example: `mole bench build --encoding nf4`
    """
    from lookup_experts.benchmarks.build import bench_build
    from lookup_experts.benchmarks.results import Results

    case = bench_options.case_of(shape, experts, encoding)
    bench_build(case, work, Results("build", json, plot))

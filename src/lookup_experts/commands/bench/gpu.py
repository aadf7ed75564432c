"""`mole bench gpu`."""

from typing import Annotated

import typer

from lookup_experts.commands.bench import options as bench_options


def gpu(
    sections: Annotated[
        list[str] | None,
        typer.Argument(help="Which to run, as they are named while they run. Default: all."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="After so many, no further section is begun.")
    ] = 240.0,
    pairs: Annotated[int, typer.Option(min=1, help="Steps of each system.")] = 200,
    device: Annotated[
        str, typer.Option(help="cuda; or cpu, to see whether everything runs.")
    ] = "cuda",
    ids: bench_options.Ids = None,
    work: bench_options.Work = bench_options.WORK,
    json: bench_options.JsonFile = None,
) -> None:
    """All that is to be shown on a GPU, the most important first: steps by CUDA graphs with the
    table in RAM and on disk, prompts, serving, and the tests that need a GPU.

    Example: `mole bench gpu --seconds 240 --json gpu.json`
    """
    from lookup_experts.benchmarks.gpu import Setting, bench_gpu
    from lookup_experts.benchmarks.results import Results
    from lookup_experts.table.lanes import check_device

    check_device(device)
    setting = Setting(ids, work, pairs, device)
    bench_gpu(setting, sections or [], seconds, Results("gpu", json, work=work))

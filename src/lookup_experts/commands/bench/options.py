"""Options that the measurements share, and how they are read."""

from pathlib import Path
from typing import Annotated, Any

import typer

Shape = Annotated[
    str, typer.Option(help="The paper's 160m, 410m or 1b; in some places smollm2-135m too.")
]
Experts = Annotated[
    int | None, typer.Option("--experts", help="Routed experts per layer. Default: 4 of mole.")
]
Form = Annotated[str, typer.Option("--form", help="Of the rows: mole or meki.")]
RowSize = Annotated[
    int | None,
    typer.Option("--row-size", min=1, help="Numbers of a row. Default: the shape's width."),
]
Encoding = Annotated[str, typer.Option(help="Of the table.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: float32 or bfloat16.")]
Weights = Annotated[
    str,
    typer.Option(
        help="Of the linear layers: auto, plain or int8; with commas, each is measured, in turn."
    ),
]
Peers = Annotated[
    bool,
    typer.Option(
        "--peers",
        help="Also llama.cpp (llama-bench) and vLLM, those that are on the path, on the same dense "
        "shape.",
    ),
]
Work = Annotated[
    Path, typer.Option(help="Where tables with random numbers are kept; make room for them.")
]
Ids = Annotated[
    Path | None,
    typer.Option(
        help="A stream of token ids: a .npy file or a folder of `mole prepare`. "
        "Default: the text of the Python standard library, tokenised."
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the results to this file, as JSON.")
]
Plot = Annotated[Path | None, typer.Option(help="Also draw the results into this PNG.")]
Counts = Annotated[str, typer.Option(help="Which sizes to measure, e.g. 1,8,32.")]

OffloadedModel = Annotated[
    Path | None,
    typer.Option(
        "--model",
        help="Instead of a shape: a folder of `mole offload`, measured beside --resident. The "
        "shapes gemma-3n-e2b, gemma-3n-e2b-cut and qwen4-exp-cut are such models with random "
        "numbers.",
    ),
]
ResidentModel = Annotated[
    Path | None,
    typer.Option("--resident", help="Of --model: the folder that it was made from."),
]
Limit = Annotated[
    str | None,
    typer.Option(
        help="Of a model with embeddings in tables: run each system in a control group that "
        "leaves so much memory beside the other weights, e.g. 300MB; for superusers."
    ),
]

WORK = Path("runs/bench")
"""The default of `Work`."""
DTYPES = ("float32", "bfloat16")


def counts(text: str) -> list[int]:
    """The sizes of `Counts`."""
    from lookup_experts.errors import UserError

    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"Expected numbers like 1,8,32; got {text!r}.") from error
    if not numbers or min(numbers) < 1:
        raise UserError(f"Sizes must be at least 1; got {text!r}.")
    return numbers


def dtype_of(name: str) -> Any:
    """The torch dtype of `Dtype`."""
    import torch

    from lookup_experts.errors import unknown_name

    if name not in DTYPES:
        raise unknown_name("dtype", name, DTYPES)
    return getattr(torch, name)


def case_of(
    shape: str,
    experts: int | None,
    encoding: str,
    dtype: str = "bfloat16",
    form: str = "mole",
    row_size: int | None = None,
) -> Any:
    """The `Case` of the options of these names."""
    from lookup_experts.benchmarks.models import Case
    from lookup_experts.errors import UserError, unknown_name
    from lookup_experts.model.forms import get_form
    from lookup_experts.model.settings import ROW_FORMS

    if form not in ROW_FORMS:
        raise unknown_name("form", form, ROW_FORMS)
    chosen = get_form(form)
    if experts is None:
        experts = chosen.defaults(1, 1).num_experts
    elif not chosen.HAS_ROUTER:
        raise UserError(
            f"--experts {experts}: the form {form!r} has one row per layer and no experts to "
            "count; leave it out."
        )
    return Case(shape, experts, encoding, dtype_of(dtype), form, row_size)


def subjects_of(
    shape: str,
    model: Path | None,
    resident: Path | None,
    encoding: str,
    store: str,
    cache: str,
    ids: Path | None,
    work: Path,
    device: str = "cpu",
) -> Any:
    """The `Subjects` of the options of these names; None where lookup experts are measured."""
    from lookup_experts.benchmarks.offloaded import Subjects
    from lookup_experts.benchmarks.released import SHAPES, released_folders
    from lookup_experts.errors import UserError

    if (model is None) != (resident is None):
        raise UserError("--model and --resident belong together; give both or none.")
    if model is None and shape in SHAPES:
        resident, model = released_folders(shape, encoding, work)
    if model is None or resident is None:
        return None
    return Subjects(model, resident, store, cache, ids, work, device)

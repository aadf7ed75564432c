"""`mole serve`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lookup_experts import console
from lookup_experts.commands import options
from lookup_experts.errors import UserError


def serve(
    folder: options.ModelFolder,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes any that is free.")] = 8000,
    table: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="FOLDER is a backbone, DIR a table made with it frozen: clients ask for the model "
            "FOLDER:NAME. May be given several times.",
        ),
    ] = None,
    store: options.Store = "auto",
    cache: options.Cache = "0",
    checksums: options.Checksums = False,
    tokenizer: options.Tokenizer = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    weights: options.Weights = "auto",
    threads: Annotated[
        int | None,
        typer.Option(help="Of the CPU, for the model.", show_default="the cores it may use"),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(
            help="By which clients ask for the model.", show_default="the folder's last part"
        ),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    max_batch: Annotated[int, typer.Option(help="Texts that are generated at once.")] = 32,
    max_queue: Annotated[
        int, typer.Option(help="Texts that may wait; beyond, clients get status 429.")
    ] = 128,
    graphs: Annotated[
        bool,
        typer.Option(help="On a GPU: capture each size of batch once as a CUDA graph."),
    ] = True,
    timeout: Annotated[
        float, typer.Option(help="Seconds that a request may take, waiting included.")
    ] = 300.0,
    keep_alive: Annotated[
        int, typer.Option(help="Seconds after which an idle connection is closed.")
    ] = 120,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="A site whose pages may use the API, such as https://example.org, or '*' for all; "
            "may be given several times.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys, one a line; clients must send one of them.")
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="A file with a chat template, or 'plain', for a model without one."),
    ] = None,
) -> None:
    """Serve a model by OpenAI's API, with a page at `/` that shows what its experts do.

    Requests join and leave the running batch at every step. Ctrl-C or SIGTERM finishes what runs.

    Example: `mole serve out/ --store direct --cache 256MB`, then
    `curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once"}'`

    Several tables: `mole serve smollm2/ --table novels=out/ --table code=out2/`, and the model is
    `smollm2:novels`, `smollm2:code`, or `smollm2` without either.
    """
    for name, value, least in (
        ("--max-batch", max_batch, 1),
        ("--max-queue", max_queue, 0),
        ("--port", port, 0),
        ("--threads", 1 if threads is None else threads, 1),
        ("--keep-alive", keep_alive, 1),
    ):
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}.")
    if timeout <= 0:
        raise UserError(f"--timeout is {timeout}; it must be above 0 seconds.")
    if model_name is not None and not model_name.strip():
        raise UserError("--model-name is empty; give the name by which clients ask for the model.")
    for origin in cors_origin or ():
        check_origin(origin)
    tables = parse_tables(table or ())

    # Before torch is imported: its threads then take what is set here.
    from lookup_experts.serving.threads import in_passing_thread, sleep_soon, use_threads

    sleep_soon()

    from lookup_experts.allocation import keep_freed_memory
    from lookup_experts.folders.load import load
    from lookup_experts.folders.tokenizer import load_tokenizer
    from lookup_experts.model.fast_linears import describe_linears

    try:
        from lookup_experts.serving.run import open_socket, read_keys
        from lookup_experts.serving.run import serve as run_server
        from lookup_experts.serving.service import Service, ServiceOptions
        from lookup_experts.serving.templates import check_chat_template, read_chat_template
        from lookup_experts.serving.waiting import Limits
    except ModuleNotFoundError as error:
        raise UserError(
            f"mole serve needs {error.name}, which is not installed: "
            "pip install 'lookup-experts[serve]'."
        ) from error

    console.quiet_transformers()
    keys = read_keys(api_key_file)
    template = read_chat_template(chat_template)
    loaded_tokenizer = load_tokenizer(tokenizer or folder, trust_remote_code)
    check_chat_template(loaded_tokenizer, template)
    listening = open_socket(host, port)  # before the model is loaded, which may take long
    keep_freed_memory()  # prompts of all lengths come: their tensors' pages are not taken anew
    use_threads(threads)

    def loaded_service() -> Service:
        model = load(
            folder,
            store=store,
            cache=cache,
            device=device,
            dtype=dtype,
            weights=weights,
            verify_checksums=checksums,
            trust_remote_code=trust_remote_code,
            tables=tables,
            notify=console.say,
        )
        console.say(f"Linear layers: {describe_linears(model)}")
        served = ServiceOptions(
            name=model_name or served_name(folder),
            limits=Limits(max_batch, max_queue),
            seconds=timeout,
            chat_template=template,
            graphs=graphs,
        )
        service = Service(model, loaded_tokenizer, served)
        service.prepare()
        return service

    run_server(
        in_passing_thread(loaded_service),
        listening,
        keys,
        console.say,
        keep_alive_seconds=keep_alive,
        origins=cors_origin or (),
    )


def served_name(folder: str) -> str:
    """A folder's last part; a name on the hub as it is."""
    path = Path(folder)
    return path.resolve().name if path.exists() else folder


def parse_tables(given: Sequence[str]) -> dict[str, str]:
    """`["novels=out/"]` -> {"novels": "out/"}.

    Raises:
        UserError: one has no name or no folder, or two have one name.
    """
    tables: dict[str, str] = {}
    for words in given:
        name, equals, folder = words.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--table {words} should be like novels=out/: a name, =, and a folder.")
        if name in tables:
            raise UserError(f"--table {words}: {name} is {tables[name]} already; choose another.")
        tables[name] = folder
    return tables


def check_origin(origin: str) -> None:
    """Raise a `UserError` for what no browser sends as an origin."""
    from urllib.parse import urlsplit

    parts = urlsplit(origin)
    is_origin = parts.scheme in ("http", "https") and origin == f"{parts.scheme}://{parts.netloc}"
    if origin != "*" and not (is_origin and parts.netloc):
        raise UserError(
            f"--cors-origin {origin} is no origin; give scheme and host, such as "
            "https://example.org, or '*'."
        )

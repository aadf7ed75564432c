"""`mole generate`."""

from typing import Annotated

import typer

from lookup_experts import console
from lookup_experts.commands import options
from lookup_experts.errors import UserError


def generate(
    folder: options.ModelFolder,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text to continue.")
    ] = None,
    prompt_ids: Annotated[
        str | None,
        typer.Option(help="The prompt as token ids, e.g. '17 4 201'; needs no tokenizer."),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 100,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: options.Seed = None,
    store: options.Store = "auto",
    cache: options.Cache = "0",
    checksums: options.Checksums = False,
    tokenizer: options.Tokenizer = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    stats: options.Stats = False,
    json: options.Json = False,
) -> None:
    """Continue a prompt, token by token.

    Example: `mole generate out/ --prompt "Once upon a time" --store direct --stats`
    """
    if (prompt is None) == (prompt_ids is None):
        raise UserError("Give either --prompt TEXT or --prompt-ids 'ID ID ...'.")

    from lookup_experts.folders.load import load
    from lookup_experts.folders.tokenizer import load_tokenizer
    from lookup_experts.generation.text import (
        Sampling,
        format_statistics,
        generate_ids,
        generate_text,
    )

    console.quiet_transformers()
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    loaded_tokenizer = (
        load_tokenizer(tokenizer or folder, trust_remote_code) if prompt is not None else None
    )
    model = load(
        folder,
        store=store,
        cache=cache,
        device=device,
        dtype=dtype,
        verify_checksums=checksums,
        trust_remote_code=trust_remote_code,
        notify=console.say,
    )
    stream = None if json else _write_now
    if prompt is not None:
        generation = generate_text(model, loaded_tokenizer, prompt, sampling, stream)
    else:
        generation = generate_ids(model, _parse_ids(prompt_ids or ""), sampling)
    if json:
        console.json_result(generation.to_dict())
    elif prompt is None:
        console.result(" ".join(map(str, generation.token_ids)))
    else:
        console.result("")
    if stats:
        console.say(format_statistics(generation))


def _write_now(text: str) -> None:
    typer.echo(text, nl=False)


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise UserError(f"--prompt-ids takes whole numbers; got {text!r}.") from error

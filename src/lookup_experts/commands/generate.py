"""`mole generate`."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lookup_experts import console
from lookup_experts.commands import options
from lookup_experts.errors import UserError

if TYPE_CHECKING:
    from lookup_experts.generation.text import Generation


def generate(
    folder: options.ModelFolder,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", help="The text to continue; - reads it from standard input."
        ),
    ] = None,
    prompt_ids: Annotated[
        str | None,
        typer.Option(help="The prompt as token ids, e.g. '17 4 201'; needs no tokenizer."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="The prompt is a message: ask it through the chat template."),
    ] = False,
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
    weights: options.Weights = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    stats: options.Stats = False,
    json: options.Json = False,
) -> None:
    """Continue a prompt, token by token, or answer it (--chat).

    Example: `mole generate out/ --prompt "Once upon a time" --store direct --stats`
    """
    if (prompt is None) == (prompt_ids is None):
        raise UserError("Give either --prompt TEXT or --prompt-ids 'ID ID ...'.")
    if chat and prompt is None:
        raise UserError("--chat asks a message; give it as text with --prompt.")
    if prompt == "-":
        prompt = _read_prompt()

    from lookup_experts.folders.load import load
    from lookup_experts.folders.tokenizer import load_tokenizer
    from lookup_experts.generation.conversation import Conversation
    from lookup_experts.generation.sampling import Sampling
    from lookup_experts.generation.text import (
        format_end,
        format_statistics,
        generate_ids,
        generate_text,
    )

    console.quiet_transformers()
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    loaded_tokenizer: Any = (
        load_tokenizer(tokenizer or folder, trust_remote_code) if prompt is not None else None
    )
    if chat and loaded_tokenizer.chat_template is None:
        raise UserError(
            f"The tokenizer of {folder} has no chat template, so nothing says how a message is "
            "asked. Leave --chat out to continue the prompt as text."
        )
    model = load(
        folder,
        store=store,
        cache=cache,
        device=device,
        dtype=dtype,
        weights=weights,
        verify_checksums=checksums,
        trust_remote_code=trust_remote_code,
        notify=console.say,
    )
    stream = None if json else _write_now
    if prompt is not None and chat:
        generation = Conversation(model, loaded_tokenizer, sampling).answer(prompt, stream)
    elif prompt is not None:
        generation = generate_text(model, loaded_tokenizer, prompt, sampling, stream)
    else:
        generation = generate_ids(model, _parse_ids(prompt_ids or ""), sampling)
    if json:
        console.json_result(generation.to_dict())
    elif prompt is None:
        console.result(" ".join(map(str, generation.token_ids)))
    else:
        console.result("")
    if end := format_end(generation):
        console.say(end)
    if prompt is not None and not chat and not (generation.text or "").strip():
        console.say(_why_nothing(generation, loaded_tokenizer))
    if stats:
        console.say(format_statistics(generation))


def _why_nothing(generation: "Generation", tokenizer: Any) -> str:
    """Of a continuation without text, what it was and what may help."""
    ended = " and ended the text" if generation.finish_reason == "stop" else ""
    hint = (
        " Its tokenizer has a chat template: ask the prompt as a message, with --chat."
        if tokenizer.chat_template is not None
        else ""
    )
    return f"The model wrote no text{ended} (tokens: {len(generation.token_ids)}).{hint}"


def _read_prompt() -> str:
    """All of standard input, without the line end that closes it."""
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"Standard input is not UTF-8 text ({error.reason}).") from None
    return text.removesuffix("\n").removesuffix("\r")


def _write_now(text: str) -> None:
    typer.echo(text, nl=False)


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise UserError(f"--prompt-ids takes whole numbers; got {text!r}.") from error

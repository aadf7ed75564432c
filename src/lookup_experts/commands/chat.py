"""`mole chat`."""

import sys
from typing import Any

from lookup_experts import console
from lookup_experts.commands import options
from lookup_experts.errors import UserError


def chat(
    folder: options.ModelFolder,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.7,
    top_p: options.TopP = 0.95,
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
) -> None:
    """Talk to a model, turn by turn; an empty line or Ctrl-D ends.

    A model whose tokenizer has no chat template just continues the text.

    Example: `mole chat out/ --store direct`
    """
    from lookup_experts.folders.load import load
    from lookup_experts.folders.tokenizer import load_tokenizer
    from lookup_experts.generation.sampling import Sampling

    console.quiet_transformers()
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    loaded_tokenizer = load_tokenizer(tokenizer or folder, trust_remote_code)
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
    if loaded_tokenizer.chat_template is None:
        console.say("The tokenizer has no chat template: the model continues the text as it is.")
    converse(model, loaded_tokenizer, sampling, stats)


def converse(model: Any, tokenizer: Any, sampling: Any, stats: bool = False) -> None:
    """Read turns from stdin until an empty one, and answer each; `stats`: tell what it took.

    Raises:
        UserError: a turn that was piped in can't be answered; on a terminal it is said.
    """
    from lookup_experts.generation.conversation import Conversation
    from lookup_experts.generation.text import format_end, format_statistics

    is_person = sys.stdin.isatty()
    conversation = Conversation(model, tokenizer, sampling, console.say)
    while turn := _read_turn(is_person):
        try:
            generation = conversation.answer(turn, on_text=_write_now)
        except UserError as error:
            if not is_person:
                raise
            console.say(str(error))
            continue
        console.result("")
        if end := format_end(generation):
            console.say(end)
        if stats:
            console.say(format_statistics(generation))


def _read_turn(is_person: bool) -> str:
    """The next turn; the sign that asks for it is for a terminal, and no part of an output."""
    try:
        return input("> " if is_person and sys.stdout.isatty() else "").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise UserError(f"What was given is not UTF-8 text ({error.reason}).") from None


def _write_now(text: str) -> None:
    import typer

    typer.echo(text, nl=False)

"""Text from a model, timed and streamed: transformers' `generate`, or captured steps on a GPU.

What is added is what `--stats` tells: where the time went, and what the table was asked for.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from lookup_experts.errors import UserError
from lookup_experts.folders.readers import TableReaders, table_readers
from lookup_experts.generation.captured import Decoding, why_not_fixed
from lookup_experts.generation.sampling import Sampling
from lookup_experts.model.fast_linears import describe_linears
from lookup_experts.model.placement import execution_device
from lookup_experts.table.reader import ReaderStatistics


@dataclass(frozen=True)
class Generation:
    """What was generated and what it took."""

    token_ids: list[int]
    """The new tokens."""
    text: str | None
    """The new tokens as text; None without a tokenizer."""
    finish_reason: Literal["stop", "length", "context"]
    """What ended it: the model's end-of-text token, as many tokens as were asked for, or the end of
    the model's context."""
    prompt_tokens: int
    seconds_to_first_token: float
    seconds: float
    """All in all."""
    reader: ReaderStatistics | None
    """What the table was asked for; None for a model without one."""
    linear_layers: str
    """Of which kinds they are; see `describe_linears`."""

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, the prompt's own pass left out; 0 for a single token."""
        decoding = self.seconds - self.seconds_to_first_token
        return (len(self.token_ids) - 1) / decoding if len(self.token_ids) > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


_WITHOUT_EFFECT = {
    "_from_model_config",
    "bos_token_id",
    "cache_implementation",
    "decoder_start_token_id",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "pad_token_id",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "use_cache",
}
"""Settings of a generation configuration that change no choice, or that `Sampling` replaces."""


class _Clock(BaseStreamer):
    """Notes when tokens arrive, and hands them on.

    A table's error on a GPU is known with the token that came of it, which is no token then.
    """

    def __init__(self, streamer: BaseStreamer | None, table: TableReaders | None) -> None:
        self._streamer = streamer
        self._table = table
        self._calls = 0
        self.first_token_at = 0.0

    def put(self, value: Tensor) -> None:
        if self._table is not None:
            self._table.check()
        self._calls += 1
        if self._calls == 2:  # the first call brings the prompt
            self.first_token_at = time.perf_counter()
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()


class _CallbackStreamer(TextStreamer):
    """Gives text to a function as soon as it can't change any more."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


def generate_ids(
    model: Any,
    prompt_ids: Iterable[int],
    sampling: Sampling,
    *,
    tokenizer: Any = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt given as token ids, up to the end of the model's context at most.

    Args:
        model: any causal LM of transformers.
        prompt_ids: at least one token id.
        sampling: how tokens are chosen.
        tokenizer: to give text back; None for ids alone.
        on_text: called with pieces of text as they come; needs a tokenizer.

    Raises:
        UserError: the prompt is empty, has an id outside of the vocabulary, or leaves no room.
    """
    ids = _checked(model, list(prompt_ids))
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    streamer = _CallbackStreamer(tokenizer, on_text) if tokenizer and on_text else None
    table = table_readers(model)
    if table is not None:
        table.reset_stats()
    clock = _Clock(streamer, table)
    inputs = torch.tensor([ids], device=execution_device(model))
    context = context_of(model)
    room = sampling.max_new_tokens if context is None else context - len(ids)
    within = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
    continue_ids = _by_captured_steps if _can_capture(model, inputs.device) else _by_transformers
    started_at = time.perf_counter()
    new_ids = continue_ids(model, inputs, within, clock)
    seconds = time.perf_counter() - started_at
    return Generation(
        token_ids=new_ids,
        text=tokenizer.decode(new_ids, skip_special_tokens=True) if tokenizer else None,
        finish_reason=_finish_reason(model, new_ids, sampling.max_new_tokens),
        prompt_tokens=len(ids),
        seconds_to_first_token=clock.first_token_at - started_at,
        seconds=seconds,
        reader=table.stats() if table is not None else None,
        linear_layers=describe_linears(model),
    )


@torch.inference_mode()
def _by_transformers(
    model: Any, prompt: Tensor, sampling: Sampling, streamer: BaseStreamer
) -> list[int]:
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        streamer=streamer,
        pad_token_id=_pad_token_id(model),
        **sampling.generate_arguments(),
    )
    new_ids: list[int] = output[0, prompt.shape[1] :].tolist()
    return new_ids


def _by_captured_steps(
    model: Any, prompt: Tensor, sampling: Sampling, streamer: BaseStreamer
) -> list[int]:
    """As `_by_transformers`, on a GPU without waiting for the host between steps."""
    ends = _end_ids(model)
    decoding = Decoding(model, prompt.shape[1] + sampling.max_new_tokens, sampling.choose)
    decoding.begin(prompt)
    streamer.put(prompt.cpu())
    new_ids: list[int] = []
    for token in decoding.tokens(sampling.max_new_tokens):
        streamer.put(token)
        new_ids.append(int(token))
        if new_ids[-1] in ends:
            break
    streamer.end()
    return new_ids


def _can_capture(model: Any, device: torch.device) -> bool:
    """Whether captured steps do what transformers' `generate` does with a model, and faster."""
    if device.type != "cuda" or why_not_fixed(model) is not None:
        return False
    if getattr(model, "hf_device_map", None):  # spread over devices
        return False
    asked = {name for name, value in model.generation_config.to_diff_dict().items() if value}
    return not asked - _WITHOUT_EFFECT


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    sampling: Sampling,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt given as text; see `generate_ids`."""
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise UserError("The prompt is empty; give at least one word.")
    return generate_ids(model, ids, sampling, tokenizer=tokenizer, on_text=on_text)


def context_of(model: Any) -> int | None:
    """Tokens that a prompt and its continuation may have together; None where nothing says."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)


def _finish_reason(
    model: Any, new_ids: list[int], max_new_tokens: int
) -> Literal["stop", "length", "context"]:
    if new_ids[-1] in _end_ids(model):
        return "stop"
    return "length" if len(new_ids) == max_new_tokens else "context"


def _end_ids(model: Any) -> list[int | None]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def _checked(model: Any, ids: list[int]) -> list[int]:
    if not ids:
        raise UserError("The prompt is empty; give at least one token.")
    vocab_size = model.get_input_embeddings().weight.shape[0]
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise UserError(
                f"Token id {token_id} is outside the vocabulary (0 to {vocab_size - 1}). Is this "
                "the tokenizer that belongs to the model?"
            )
    context = context_of(model)
    if context is not None and len(ids) >= context:
        raise UserError(
            f"The prompt has {len(ids)} tokens and the model's context is {context}; shorten it."
        )
    return ids


def _pad_token_id(model: Any) -> int:
    """Only one sequence is generated, so nothing is padded; transformers wants an id all the
    same, or it prints a warning."""
    config = model.generation_config
    for token_id in (config.pad_token_id, config.eos_token_id):
        if isinstance(token_id, list):
            token_id = token_id[0]
        if token_id is not None:
            return token_id
    return 0


def format_end(generation: Generation) -> str | None:
    """What must be said of how it ended; None for the usual ends."""
    if generation.finish_reason != "context":
        return None
    context = generation.prompt_tokens + len(generation.token_ids)
    return (
        f"Stopped after {len(generation.token_ids):,} tokens: the context of {context:,} is full."
    )


def format_statistics(generation: Generation) -> str:
    """The lines of `--stats`."""
    lines = [
        f"{generation.prompt_tokens} prompt tokens, {len(generation.token_ids)} new tokens",
        f"first token after {generation.seconds_to_first_token * 1000:.0f} ms, "
        f"then {generation.tokens_per_second:.1f} tokens/s",
        f"linear layers: {generation.linear_layers}",
    ]
    if generation.reader is not None:
        lines.append(format_reader(generation.reader))
    return "\n".join(lines)


def format_reader(reader: ReaderStatistics) -> str:
    """What a table was asked for, in one line."""
    from lookup_experts.units import format_bytes

    return (
        f"table: {reader.store} ({reader.backend}), {reader.ids_asked} ids asked, "
        f"{reader.ids_unique} unique, {reader.cache_hits} from the cache, "
        f"{format_bytes(reader.bytes_read)} read in {reader.read_seconds * 1000:.0f} ms, "
        f"waited {reader.wait_seconds * 1000:.0f} ms"
    )

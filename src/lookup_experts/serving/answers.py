"""What the routes answer, as the OpenAPI document describes it."""

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class ErrorDetail(BaseModel):
    """What went wrong, in one sentence."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error has this shape."""

    error: ErrorDetail


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """`GET /health`."""

    status: Literal["ok"]


class RowStats(BaseModel):
    """What a token id has in each layer."""

    experts: int
    """Of a layer: rows of a token id, or experts of a mixture."""
    row_size: int | None
    """Numbers of a row; none without lookup experts."""
    record_bytes: int | None
    """Of a token id in the table; none without one."""
    router: bool
    """Whether rows are weighed by a router, of which `lookup_details` tells."""


class Stats(RowStats):
    """`GET /v1/stats`: what the server does now; counts are since its start."""

    model: str
    kind: str
    """`dense`, `moe`, or the forms of rows and model: `mole-table`, `mole-experts`, `meki-table`,
    `meki-experts`."""
    tables: dict[str, RowStats]
    """Of a model with several tables, by their names: what a text has with each."""
    layers: int
    context: int
    """Tokens that a prompt and its continuation may have together."""
    chat: bool
    """Whether there is a chat template."""
    tokens_per_second: float
    """Over the last 5 seconds."""
    ids_asked: int
    ids_unique: int
    """Summed over batches."""
    cache_hits: int
    """Of the unique ids."""
    hit_rate: float
    """Of the distinct ids that were looked up, those found in the row cache."""
    bytes_read: int
    read_seconds: float
    """From asking the store to having the records, beside the model's work."""
    wait_seconds: float
    """Spent by the model, waiting for records."""
    resident_bytes: int
    running: int
    waiting: int
    store: str | None
    backend: str | None
    uptime_seconds: float


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogProbabilities(BaseModel):
    """Of the tokens of a completion; the first token of an echoed prompt has none. A part of a
    character is called `bytes:\\xf0\\x9f`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogProbabilities | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """`POST /v1/completions`, not streamed."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogProbability(BaseModel):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int]
    """Its own, which may be a part of a character; none of a special token."""


class ChatLogProbability(TopLogProbability):
    """A token of an answer, and what was likely in its place."""

    top_logprobs: list[TopLogProbability]


class ChatLogProbabilities(BaseModel):
    """Of the tokens of an answer."""

    content: list[ChatLogProbability]


class CalledFunction(BaseModel):
    """Which tool is called, and with what."""

    name: str
    arguments: str
    """JSON."""


class ToolCall(BaseModel):
    """A call that the client is to make."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatAnswer(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogProbabilities | None
    finish_reason: FinishReason | None


class ChatCompletion(BaseModel):
    """`POST /v1/chat/completions`, not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage

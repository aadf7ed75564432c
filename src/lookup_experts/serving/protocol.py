"""What a client may send: the parts of OpenAI's API that this server does, checked strictly.

A field that exists in that API but does nothing here is accepted only with the value that asks for
nothing; an unknown one is refused. So no request is answered as if something had been heeded that
was not.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_STOPS = 16
MOST_CHOICES = 64
MOST_LOG_PROBABILITIES = 20
MOST_FIELDS = 64
"""Of one object; more than any has."""

# Lists are given up at their first wrong entry: an error for each of a million takes gigabytes.
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Stop = StopString | Annotated[list[StopString], Field(max_length=MOST_STOPS, fail_fast=True)]
Prompt = (
    str
    | Annotated[list[str], Field(min_length=1, fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_crowds(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MOST_FIELDS:
            raise ValueError(f"An object of {len(data)} fields is none that this server knows")
        return data


class StreamOptions(_Body):
    """What a stream tells besides its tokens."""

    include_usage: bool = False
    """Send the token counts as a last chunk."""


class GenerationBody(_Body):
    """What completions and chat have in common."""

    model: str | None = Field(None, description="The served model; see /v1/models.")
    n: int | None = Field(1, ge=1, le=MOST_CHOICES, description="Choices per prompt.")
    temperature: float | None = Field(1.0, ge=0, le=100, description="0 is greedy.")
    top_p: float | None = Field(1.0, ge=0, le=1)
    top_k: int | None = Field(0, ge=0, lt=2**31, description="0 considers all tokens.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Makes it repeatable.")
    stop: Stop | None = Field(None, description="Ends the text before these strings.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Taken, and not used.")
    presence_penalty: float | None = Field(None, description="Only 0 is supported.")
    frequency_penalty: float | None = Field(None, description="Only 0 is supported.")
    logit_bias: dict[str, Any] | None = Field(None, description="Only {} is supported.")
    lookup_details: bool = Field(
        False, description="Each streamed token tells what the experts did (an extension)."
    )

    @model_validator(mode="after")
    def _refuse_what_is_not_done(self) -> Self:
        for name, neutral in self.unsupported().items():
            if getattr(self, name) not in neutral:
                raise ValueError(f"{name} is not supported by this server; leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.lookup_details and not self.stream:
            raise ValueError("lookup_details needs stream: true")
        return self

    def unsupported(self) -> dict[str, tuple[Any, ...]]:
        """Fields that do nothing here, and the values with which they ask for nothing."""
        return {
            "presence_penalty": (None, 0),
            "frequency_penalty": (None, 0),
            "logit_bias": (None, {}),
        }

    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Prompt = Field(description="Text or token ids, one prompt or several.")
    max_tokens: int | None = Field(16, ge=0, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOG_PROBABILITIES)
    echo: bool | None = Field(False, description="Give the prompt back before the completion.")
    best_of: int | None = Field(None, description="Only the value of n is supported.")
    suffix: str | None = Field(None, description="Not supported.")

    def unsupported(self) -> dict[str, tuple[Any, ...]]:
        """See `GenerationBody.unsupported`."""
        return {**super().unsupported(), "best_of": (None, self.n), "suffix": (None, "")}

    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return prompt


class ContentPart(_Body):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation; what answers carry besides (refusal ...) may stay in."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)]

    def to_template(self) -> dict[str, str]:
        """As chat templates take it."""
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        return {"role": self.role, "content": "".join(part.text for part in self.content)}


class ResponseFormat(_Body):
    """The form of the answer; only free text is supported."""

    type: Literal["text"]


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOG_PROBABILITIES)
    response_format: ResponseFormat | None = None
    continue_final_message: bool = Field(
        False, description="Go on with the last message, an assistant's (an extension)."
    )

    @model_validator(mode="after")
    def _check_what_goes_on(self) -> Self:
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message needs a last message of the assistant")
        return self

    @model_validator(mode="after")
    def _check_log_probabilities(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def most_tokens(self) -> int | None:
        """The newer name counts, if both are given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


# ------------------------------------------------------------------------------ what is answered


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


class Stats(BaseModel):
    """`GET /v1/stats`: what the server does now; counts are since its start."""

    model: str
    kind: Literal["dense", "mole-table", "mole-experts", "moe"]
    layers: int
    experts: int
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
    """Of the tokens of a completion; the first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogProbabilities | None
    finish_reason: Literal["stop", "length"] | None


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


class ChatLogProbability(TopLogProbability):
    """A token of an answer, and what was likely in its place."""

    top_logprobs: list[TopLogProbability]


class ChatLogProbabilities(BaseModel):
    """Of the tokens of an answer."""

    content: list[ChatLogProbability]


class ChatAnswer(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogProbabilities | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletion(BaseModel):
    """`POST /v1/chat/completions`, not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage

"""What a client may send: the parts of OpenAI's API that this server does, checked strictly.

A field that others have and that does nothing here (`neutral`) is accepted only with a value that
asks for nothing; an unknown one is refused. So no request is answered as if something had been
heeded that was not.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lookup_experts.serving import neutral
from lookup_experts.serving.messages import ChosenTool, Message, ResponseFormat, Tool
from lookup_experts.serving.neutral import MOST_FIELDS, asks_for_nothing

MOST_STOPS = 16
MOST_STOP_IDS = 256
MOST_CHOICES = 64
MOST_LOG_PROBABILITIES = 20
MOST_BIASES = 1024
MOST_TOOLS = 128

# Lists are given up at their first wrong entry: an error for each of a million takes gigabytes.
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Stop = StopString | Annotated[list[StopString], Field(max_length=MOST_STOPS, fail_fast=True)]
StopIds = Annotated[list[TokenId], Field(max_length=MOST_STOP_IDS, fail_fast=True)]
Tools = Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)]
Prompt = (
    str
    | Annotated[list[str], Field(min_length=1, fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
)


def _drop_neutral(data: Any, fields: dict[str, tuple[Any, ...]], known: Any) -> Any:
    """A body without the fields that ask for nothing; raises ValueError for those that do."""
    if not isinstance(data, dict):
        return data
    if len(data) > MOST_FIELDS:
        raise ValueError(f"An object of {len(data)} fields is none that this server knows")
    kept = {}
    for name, value in data.items():
        if name in known or name not in fields:
            kept[name] = value
        elif not asks_for_nothing(value, fields[name]):
            raise ValueError(f"{name} is not supported by this server; leave it out")
    return kept


def _describe_neutral(schema: dict[str, Any], fields: dict[str, tuple[Any, ...]]) -> None:
    """Write the fields that may ask for nothing into a body's JSON schema."""
    for name, values in fields.items():
        if name not in schema["properties"]:
            schema["properties"][name] = {
                "enum": [None, False, *values],
                "description": "Not supported; taken where it asks for nothing.",
            }


class StreamOptions(BaseModel):
    """What a stream tells besides its tokens."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = False
    """Send the token counts as a last chunk."""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        others = {"include_obfuscation": (), "continuous_usage_stats": ()}
        return _drop_neutral(data, others, cls.model_fields)


class GenerationBody(BaseModel):
    """What completions and chat have in common. What is null is as if it were left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[Any, ...]]]

    model: str | None = Field(None, description="The served model; see /v1/models.")
    n: int | None = Field(1, ge=1, le=MOST_CHOICES, description="Choices per prompt.")
    temperature: float | None = Field(
        None, ge=0, le=100, description="0 is greedy. Left out: the model's own setting, or 1."
    )
    top_p: float | None = Field(None, ge=0, le=1, description="Likewise.")
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 and -1 consider all tokens.")
    min_p: float | None = Field(
        None, ge=0, le=1, description="Times the likeliest token's probability: the least."
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(
        None, gt=0, le=10, description="Of tokens in the prompt or the answer; 1 is none."
    )
    logit_bias: dict[str, Any] | None = Field(
        None,
        description="Token id -> what is added to its logit, from -100 to 100.",
        json_schema_extra={"additionalProperties": {"type": "number"}},
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Makes it repeatable.")
    stop: Stop | None = Field(None, description="Ends the text before these strings.")
    stop_token_ids: StopIds | None = Field(None, description="Tokens that end the text.")
    ignore_eos: bool | None = Field(False, description="Go on after the model's end token.")
    min_tokens: int | None = Field(0, ge=0, lt=2**31, description="Before which nothing ends.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Taken, and not used.")
    metadata: dict[str, Any] | None = Field(None, description="Taken, and not used.")
    safety_identifier: str | None = Field(None, description="Taken, and not used.")
    prompt_cache_key: str | None = Field(None, description="Taken, and not used.")
    request_id: str | None = Field(None, description="Taken, and not used.")
    lookup_details: bool | None = Field(
        False, description="Each streamed token tells what the experts did (an extension)."
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        return _drop_neutral(data, cls.neutral, cls.model_fields)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        """With the fields that may ask for nothing."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        _describe_neutral(schema, cls.neutral)
        return schema

    @model_validator(mode="after")
    def _check_streaming(self) -> Self:
        if self.with_usage and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.lookup_details and not self.stream:
            raise ValueError("lookup_details needs stream: true")
        for name, value in (self.logit_bias or {}).items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not name.isascii() or not name.isdigit() or len(name) > 10:
                raise ValueError(f"logit_bias has {name[:40]!r} where a token id must be")
            if not is_number or not -100 <= value <= 100:
                raise ValueError("logit_bias must give each token id a number from -100 to 100")
        if len(self.logit_bias or {}) > MOST_BIASES:
            raise ValueError(f"logit_bias can have at most {MOST_BIASES} entries")
        return self

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def biases(self) -> dict[int, float]:
        """Token id -> what is added to its logit."""
        return {int(name): float(value) for name, value in (self.logit_bias or {}).items()}

    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    neutral: ClassVar = neutral.COMPLETION

    prompt: Prompt = Field(description="Text or token ids, one prompt or several.")
    max_tokens: int | None = Field(16, ge=0, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOG_PROBABILITIES)
    echo: bool | None = Field(False, description="Give the prompt back before the completion.")
    best_of: int | None = Field(None, ge=1, description="Only the value of n is supported.")

    @model_validator(mode="before")
    @classmethod
    def _read_false(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("logprobs") is False:
            return {**data, "logprobs": None}
        return data

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is not supported by this server; leave it out")
        return self

    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return prompt


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    neutral: ClassVar = neutral.CHAT

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOG_PROBABILITIES)
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call.")
    continue_final_message: bool | None = Field(
        False, description="Go on with the last message, an assistant's (an extension)."
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_what_goes_with_going_on(cls, data: Any) -> Any:
        goes_on = isinstance(data, dict) and data.get("continue_final_message") is True
        if goes_on and data.get("add_generation_prompt") is False:
            return {**data, "add_generation_prompt": None}
        return data

    @model_validator(mode="after")
    def _check_what_goes_on(self) -> Self:
        if self.continue_final_message:
            last = self.messages[-1]
            if last.role != "assistant" or last.tool_calls:
                raise ValueError(
                    "continue_final_message needs a last message of the assistant, without calls"
                )
            if self.may_call or self.schema_of_answer is not None:
                raise ValueError(
                    "continue_final_message can't be had with tools or a response_format"
                )
        return self

    @model_validator(mode="after")
    def _check_log_probabilities(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("Two tools have the same name")
        if isinstance(self.tool_choice, ChosenTool):
            if self.tool_choice.function.name not in names:
                raise ValueError("tool_choice names a tool that is not in tools")
        elif self.tool_choice == "required" and not names:
            raise ValueError("tool_choice needs tools")
        return self

    @property
    def may_call(self) -> bool:
        """Whether the answer can call tools."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must keep to, or None."""
        return None if self.response_format is None else self.response_format.schema_of_answer

    def most_tokens(self) -> int | None:
        """The newer name counts, if both are given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

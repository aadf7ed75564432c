"""Conversations, as clients send them."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lookup_experts.serving.neutral import MOST_FIELDS, asks_for_nothing

Role = Literal["system", "developer", "user", "assistant", "tool"]
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Kinds of parts that are text, and under which name they carry it."""


class CalledTool(BaseModel):
    """A function that was called."""

    model_config = ConfigDict(extra="ignore", strict=True)

    name: str = Field(min_length=1)
    arguments: str = Field(description="JSON.")


class MadeCall(BaseModel):
    """A call that the model made before."""

    model_config = ConfigDict(extra="ignore", strict=True)

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledTool


class ContentPart(BaseModel):
    """A part of a message's text. What else it carries (`cache_control` ...) are marks for
    others."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_kinds(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(kind := data.get("type"), str):
            if kind not in TEXT_PARTS:
                raise ValueError(f"A part of the type {kind[:40]!r} is not understood; send text")
            if not isinstance(data.get(TEXT_PARTS[kind]), str):
                raise ValueError(f"A part of the type {kind!r} needs {TEXT_PARTS[kind]!r}, a text")
        return data

    @property
    def content(self) -> str:
        """What it says."""
        return getattr(self, TEXT_PARTS[self.type])


class Message(BaseModel):
    """A turn of a conversation. Fields that are not named here go to the chat template too."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Role
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[MadeCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_crowds(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MOST_FIELDS:
            raise ValueError(f"A message of {len(data)} fields is none that this server knows")
        return data

    @model_validator(mode="after")
    def _check_what_it_says(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"Only the assistant calls tools; this is a message of {self.role!r}")
        given = self.model_extra or {}
        for name in ("function_call", "audio"):
            if not asks_for_nothing(given.get(name)):
                raise ValueError(f"{name} in a message is not supported by this server")
        if self.content is None and self.role != "assistant":
            raise ValueError(f"A message of the role {self.role!r} needs a content")
        return self

    @property
    def text(self) -> str:
        """What is said; "" where only tools are called."""
        if self.content is None:
            return self.refusal or ""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.content for part in self.content)

    @property
    def others(self) -> dict[str, Any]:
        """What else it carries, for the template."""
        given = {**(self.model_extra or {}), "tool_call_id": self.tool_call_id}
        return {name: value for name, value in given.items() if value is not None}


class FunctionTool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="ignore", strict=True)

    name: str = Field(pattern=r"^[a-zA-Z0-9_.\-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema.")
    strict: bool | None = None


class Tool(BaseModel):
    """A tool; only functions are known."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["function"]
    function: FunctionTool


class ChosenFunction(BaseModel):
    """The name of a tool."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str


class ChosenTool(BaseModel):
    """The one tool that the model must call."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(BaseModel):
    """What the answer must be."""

    model_config = ConfigDict(extra="ignore", strict=True, populate_by_name=True)

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of the answer: free text, any JSON object, or JSON as a schema describes it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("response_format needs json_schema with the type 'json_schema' only")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema to keep to; None for free text."""
        if self.type == "text":
            return None
        given = self.json_schema.schema_ if self.json_schema is not None else None
        return {"type": "object"} if given is None else given

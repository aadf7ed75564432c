"""Errors as OpenAI's API gives them: `{"error": {"message", "type", "param", "code"}}`."""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from fastapi.responses import JSONResponse
from starlette.responses import Response

from lookup_experts.serving.protocol import ChatBody, CompletionBody, GenerationBody
from lookup_experts.serving.sequence import Failed

STATUS_OF_FAILURE = {
    "table_error": 503,
    "shutting_down": 503,
    "timeout": 504,
    "grammar_error": 400,
}
"""Of a sequence that failed, by its code; any other is a defect: 500."""
_PROMPT = "must be a string, a list of strings, a list of token ids, or a list of such lists"
_SENTENCES = {
    "prompt": f"{_PROMPT}, none of them empty",
    "stop": "must be a string, or a list of up to 16 strings, of 1 to 256 characters each",
    "messages": "must be a list of messages, each with a role (system, developer, user, assistant "
    "or tool) and a content of text",
    "response_format": "must be an object with the type text, json_object or json_schema",
    "tools": 'must be a list of functions: {"type": "function", "function": {"name", '
    '"description", "parameters"}}, with names of up to 64 letters, figures, _, . and -',
    "tool_choice": 'must be none, auto, required, or {"type": "function", "function": {"name"}}',
    "stop_token_ids": "must be a list of up to 256 token ids",
}
BODIES: dict[str, type[GenerationBody]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
}


class ApiError(Exception):
    """An error that the client is told.

    Args:
        status: of HTTP.
        message: what was given, what was expected, what to do.
        param: the field at fault, if it is one.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, failure: Failed) -> "ApiError":
        """What a client is told of a sequence that failed."""
        status = STATUS_OF_FAILURE.get(failure.code, 500)
        return cls(status, failure.message, code=failure.code)

    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 401:
            kind = "authentication_error"
        elif self.status == 429:
            kind = "rate_limit_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """As an HTTP response."""
        return AsciiResponse(self.body(), self.status, self.headers)


class AsciiResponse(JSONResponse):
    """JSON with everything beyond ASCII escaped, so that any string can be sent."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def sentence_of(errors: Sequence[Mapping[str, Any]], path: str) -> ApiError:
    """The first of pydantic's errors about a request to a route, as one sentence."""
    # Where a field can be of several types, the sentence of one of them says more than the rest.
    error = next((one for one in errors if one["type"] == "value_error"), errors[0])
    place = [part for part in error["loc"] if isinstance(part, int) or part.isidentifier()]
    place = place[1:] if place[:1] == ["body"] else place
    field = place[0] if place and isinstance(place[0], str) else None
    if error["type"] == "json_invalid":
        reason = error.get("ctx", {}).get("error", "")
        return ApiError(400, f"The body is not valid JSON: {reason}.".replace("..", "."))
    if error["type"] == "missing" and len(place) == 1:
        return ApiError(400, f"The field {field!r} is missing.", field)
    if error["type"] == "extra_forbidden" and len(place) == 1:
        return ApiError(400, f"Unknown field {str(field)[:80]!r}.{_hint(str(field), path)}", field)
    if error["type"] == "value_error":
        where = f"{'.'.join(map(str, place))[:80]}: " if len(place) > 1 else ""
        return ApiError(400, f"{where}{error['ctx']['error']}.", field)
    if field is None:
        return ApiError(400, "The body must be a JSON object, sent as application/json.")
    if field in _SENTENCES:
        return ApiError(400, f"{field} {_SENTENCES[field]}.", field)
    where = ".".join(map(str, place))[:80]
    return ApiError(400, f"{where}: {error['msg']}.", field)


def _hint(field: str, path: str) -> str:
    """What else may have been meant: another field of this route, or this one of another."""
    for other, body in BODIES.items():
        if other != path and field in body.model_fields:
            return f" It is a field of {other}."
    fields = BODIES[path].model_fields if path in BODIES else {}
    close = get_close_matches(field, fields, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""

"""The routes. FastAPI checks bodies and writes the OpenAPI document; errors have OpenAI's shape."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, PlainTextResponse, Response

from lookup_experts import __version__
from lookup_experts.serving.answers import (
    ChatCompletion,
    Completion,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    Stats,
)
from lookup_experts.serving.calls import (
    Call,
    ClientGoneError,
    EventStream,
    answer_stream,
    answer_whole,
)
from lookup_experts.serving.errors import ApiError, AsciiResponse, sentence_of
from lookup_experts.serving.protocol import ChatBody, CompletionBody, GenerationBody
from lookup_experts.serving.replies import ChatReplies, CompletionReplies, Replies
from lookup_experts.serving.service import Service

STATIC = Path(__file__).with_name("static")
CLIENT_GONE = 499
"""nginx's word for it; nobody reads it."""

_REASONS = {
    400: "What was asked for can't be done; the message says why.",
    401: "No valid key.",
    404: "No such model, or no such page.",
    405: "The route has no such method.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "The queue is full; see Retry-After.",
    500: "A defect of the server.",
    503: "Records of the table can't be read, or the server is shutting down.",
    504: "It took longer than this server allows.",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": _REASONS[status]} for status in statuses}


_GENERATION_ERRORS = _errors(400, 401, 404, 408, 413, 429, 500, 503, 504)


def create_app(service: Service) -> FastAPI:
    """The application over a service; starts its engine, and stops it at the end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await run_in_threadpool(service.engine.close)

    app = FastAPI(
        title="lookup-experts",
        version=__version__,
        description="An OpenAI-compatible server for models with lookup experts.",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        default_response_class=AsciiResponse,
    )
    _add_error_handlers(app)
    _add_generation(app, service)
    _add_information(app, service)
    _add_page(app)
    _drop_unused_validation_errors(app)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/completions",
        response_model=None,
        responses={200: _either(Completion), **_GENERATION_ERRORS},
    )
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue one or several prompts."""
        call = await run_in_threadpool(service.completion, body)
        name = body.model or service.options.name
        replies = CompletionReplies(name, service.vocabulary, body.logprobs)
        return await _answer(call, replies, body, request)

    @app.post(
        "/v1/chat/completions",
        response_model=None,
        responses={200: _either(ChatCompletion), **_GENERATION_ERRORS},
    )
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        call = await run_in_threadpool(service.chat, body)
        top = (body.top_logprobs or 0) if body.logprobs else None
        name = body.model or service.options.name
        replies = ChatReplies(name, service.vocabulary, top)
        return await _answer(call, replies, body, request)


async def _answer(call: Call, replies: Replies, body: GenerationBody, request: Request) -> Response:
    call.submit()
    if not body.stream:
        return AsciiResponse(await answer_whole(call, replies, request))
    return EventStream(call, await answer_stream(call, replies, request, body.with_usage))


def _either(model: type) -> dict[str, Any]:
    """A whole answer, or a stream of chunks, in the OpenAPI document."""
    return {
        "model": model,
        "description": "The answer; with stream: true, server-sent events up to [DONE].",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }


def _add_information(app: FastAPI, service: Service) -> None:
    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": int(service.started_at),
            "owned_by": "lookup-experts",
        }

    @app.get("/v1/models", response_model=ModelList, responses=_errors(401))
    async def models() -> dict[str, Any]:
        """What is served here: one model, and it with each of its tables if it has several."""
        return {"object": "list", "data": [card(name) for name in service.models]}

    @app.get("/v1/models/{name:path}", response_model=ModelCard, responses=_errors(401, 404))
    async def model(name: str) -> dict[str, Any]:
        """A served model."""
        service.table_of(name)
        return card(name)

    @app.get("/v1/stats", response_model=Stats, responses=_errors(401))
    async def stats() -> dict[str, Any]:
        """What the server does now, for its page."""
        return service.stats()

    @app.get("/health", response_model=Health, responses=_errors(503))
    async def health() -> dict[str, str]:
        """Whether requests are taken."""
        if not service.engine.is_alive:
            raise ApiError(503, "The server is shutting down.", code="shutting_down")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse, responses=_errors(401))
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI) -> None:
    """A route for each file of the page; `/` is its index."""
    for path in sorted(STATIC.rglob("*")):
        if path.is_file():
            name = path.relative_to(STATIC).as_posix()
            _add_file(app, "/" if name == "index.html" else f"/{name}", path)


def _add_file(app: FastAPI, route: str, path: Path) -> None:
    @app.get(route, include_in_schema=False)
    async def file() -> Response:
        return FileResponse(path)


def _no_such_page(path: str) -> str:
    for name in ("responses", "chat/completions", "completions", "models"):
        if path.rstrip("/").endswith(f"/{name}") or path.startswith(f"/v1/{name}/"):
            if name != "responses":
                return f"There is no such page. Did you mean /v1/{name}?"
            return "The Responses API is not served here; use /v1/chat/completions."
    return "There is no such page. The API has /v1/chat/completions, /v1/completions, /v1/models."


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return sentence_of(error.errors(), request.url.path).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = {
            404: _no_such_page(request.url.path),
            405: "This route does not have that method.",
        }.get(error.status_code, f"{error.detail}.".replace("..", "."))
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return ApiError(500, f"Internal error: {type(error).__name__}.").response()


def _drop_unused_validation_errors(app: FastAPI) -> None:
    """FastAPI documents 422 for every route with parameters; here they are 400 or 404."""
    document = app.openapi()  # kept by the application, and served as it is now
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)

"""What stands before the routes: keys, the size and slowness of bodies, headers of responses."""

import asyncio
import hashlib
import hmac
from pathlib import Path

from prometheus_client import Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lookup_experts.errors import UserError
from lookup_experts.serving.errors import ApiError

MOST_BODY_BYTES = 4 * 2**20
BODY_SECONDS = 30.0
"""In which a body must arrive."""
OPEN_PATHS = ("/health", "/openapi.json")
COUNTED_ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/stats")
"""Each has its own count; a client can't make up labels."""
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class ApiKeys:
    """The keys of a file, one a line; compared in constant time.

    Raises:
        UserError: the file can't be read, or has no key.
    """

    def __init__(self, path: Path) -> None:
        try:
            lines = path.read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {path} can't be read: {error}.") from error
        if not lines:
            raise UserError(f"--api-key-file {path} is empty; write one key per line.")
        self._digests = [hashlib.sha256(line.encode()).digest() for line in lines]

    def accept(self, authorization: str | None) -> bool:
        """Whether a request's `Authorization` header has one of the keys."""
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches) and scheme.lower() == "bearer"


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: what is guarded.
        keys: who may use `/v1` and `/metrics`; None: everybody.
        requests: counts responses by route and status.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys | None, requests: Counter) -> None:
        self._app = app
        self._keys = keys
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # as GET; the server leaves the body out
            scope = {**scope, "method": "GET"}
        path = scope["path"]
        is_api = path.startswith("/v1/") or path == "/v1" or path == "/metrics"
        policy = None if is_api or path in OPEN_PATHS else PAGE_POLICY
        send = _with_headers(self._counted(path, send), policy)
        headers = Headers(scope=scope)
        keys = self._keys if is_api else None
        if keys is not None and not keys.accept(headers.get("authorization")):
            error = ApiError(
                401,
                "A valid key is needed: send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
            return
        try:
            body = await _read_body(headers, receive) if scope["method"] == "POST" else b""
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:
            return  # the client went away before it had sent everything
        await self._app(scope, _replay(body, receive), send)

    def _counted(self, path: str, send: Send) -> Send:
        route = path if path in COUNTED_ROUTES else "other"

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._requests.labels(route, message["status"]).inc()
            await send(message)

        return sending


async def _read_body(headers: Headers, receive: Receive) -> bytes | None:
    """The whole body, of a bounded size, in bounded time; None if the client went away."""
    too_large = ApiError(
        413,
        f"The body is larger than the {MOST_BODY_BYTES >> 20} MiB that this server takes.",
        code="body_too_large",
        headers={"Connection": "close"},
    )
    stated = headers.get("content-length", "0")
    if stated.isdigit() and int(stated) > MOST_BODY_BYTES:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > MOST_BODY_BYTES:
                    raise too_large
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError as error:
        raise ApiError(
            408,
            f"The body did not arrive within {BODY_SECONDS:.0f} seconds.",
            headers={"Connection": "close"},
        ) from error


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read, then what else comes."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _with_headers(send: Send, policy: str | None) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["X-Content-Type-Options"] = "nosniff"
            if policy is not None:
                headers["Content-Security-Policy"] = policy
                headers["Referrer-Policy"] = "no-referrer"
        await send(message)

    return sending

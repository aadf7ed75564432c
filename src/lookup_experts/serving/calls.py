"""One HTTP request's sequences: handing them to the engine, and hearing what becomes of them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lookup_experts.serving.engine import Engine
from lookup_experts.serving.errors import ApiError
from lookup_experts.serving.replies import Choice, Json, Replies
from lookup_experts.serving.reports import Outbox
from lookup_experts.serving.requests import Asked
from lookup_experts.serving.sequence import (
    Event,
    Failed,
    Finished,
    GenerationSequence,
    Token,
)
from lookup_experts.serving.waiting import QueueFullError, ShuttingDownError

RETRY_SECONDS = 1
EARLY_SECONDS = 0.5
"""For which a stream waits with its headers, so that an early failure has its status."""
SILENT_SECONDS = 10.0
"""After which a stream that has nothing to tell sends a comment, so that nobody between server and
client takes it for dead."""
COMMENT = b": waiting\n\n"


class Silence:
    """Nothing happened for a while."""


Heard = tuple[Choice, Event] | None
"""What happened to a choice; None when all are complete."""


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Call:
    """The sequences of one request, from submission to their ends.

    Args:
        engine: that runs them.
        asked: a request for each choice.
    """

    def __init__(self, engine: Engine, asked: Asked) -> None:
        self.choices = asked.choices
        self._engine = engine
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._open = len(asked.requests)
        self._sequences = [
            GenerationSequence(request, asked.bytes_of, partial(self._hear, place))
            for place, request in enumerate(asked.requests)
        ]

    def submit(self) -> None:
        """Hand everything to the engine.

        Raises:
            ApiError: there is no place to wait now.
        """
        try:
            self._engine.submit(self._sequences)
        except QueueFullError as error:
            raise ApiError(
                429,
                f"The server is busy: {self._engine.num_waiting} sequences are waiting. Try again "
                "in a moment.",
                code="queue_full",
                headers={"Retry-After": str(RETRY_SECONDS)},
            ) from error
        except ShuttingDownError as error:
            raise ApiError(503, "The server is shutting down.", code="shutting_down") from error

    def cancel(self) -> None:
        """Give up what has not ended."""
        for sequence in self._sequences:
            self._engine.cancel(sequence)

    def _hear(self, place: int, event: Event) -> None:
        self._events.put_nowait((place, event))

    async def next_event(self) -> Heard:
        """The next event, taken into its choice; None when all choices are complete.

        Raises:
            ApiError: a sequence failed, and with it the request.
        """
        if not self._open:
            return None
        place, event = await self._events.get()
        if isinstance(event, Failed):
            raise ApiError.of(event)
        if isinstance(event, Finished):
            self._open -= 1
        choice = self.choices[place]
        choice.add(event)
        return choice, event

    async def next_event_within(self, seconds: float) -> Heard | Silence:
        """`next_event`, or `Silence` if there is none in this time."""
        try:
            async with asyncio.timeout(seconds):
                return await self.next_event()
        except TimeoutError:
            return Silence()


async def answer_whole(call: Call, replies: Replies, request: Request) -> Json:
    """Wait for everything; cancels the sequences if the client goes away.

    Raises:
        ApiError: the request failed.
        ClientGoneError: nobody is there to be answered.
    """

    async def gather() -> None:
        while await call.next_event() is not None:
            pass

    await _unless_gone(gather(), call, request)
    return replies.whole(call.choices)


async def answer_stream(
    call: Call, replies: Replies, request: Request, with_usage: bool
) -> AsyncIterator[bytes]:
    """Wait a moment for the first event, so that an early failure has its status; then a stream.

    Raises:
        ApiError, ClientGoneError: as `answer_whole`.
    """
    first = await _unless_gone(call.next_event_within(EARLY_SECONDS), call, request)
    return _stream(call, replies, first, with_usage)


async def _stream(
    call: Call, replies: Replies, first: Heard | Silence, with_usage: bool
) -> AsyncIterator[bytes]:
    opened: set[int] = set()
    heard = first
    try:
        while heard is not None:
            if isinstance(heard, Silence):
                yield COMMENT
            else:
                choice, event = heard
                # An echoed prompt comes with its scores, perhaps in parts, before the tokens.
                if isinstance(event, Token | Finished):
                    if choice.index not in opened:
                        opened.add(choice.index)
                        for chunk in replies.opening(choice):
                            yield _sse(chunk)
                    yield _sse(replies.chunk(choice, event))
            heard = await call.next_event_within(SILENT_SECONDS)
        if with_usage:
            yield _sse(replies.usage_chunk(call.choices))
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _sse(error.body())


def _sse(value: Any) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


async def _unless_gone(work: Any, call: Call, request: Request) -> Any:
    """Await the work, but stop and cancel everything when the client disconnects."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    with ExitStack() as ending, ExitStack() as failing:
        ending.callback(working.cancel)
        ending.callback(gone.cancel)
        failing.callback(call.cancel)
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        result = working.result()
        failing.pop_all()
        return result


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def deliver_on(loop: asyncio.AbstractEventLoop, outbox: Outbox) -> None:
    """Hand events from the engine's thread to the sequences' listeners, on this loop."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(_hand_out, outbox)


def _hand_out(outbox: Outbox) -> None:
    for sequence, event in outbox:
        sequence.listen(event)


class EventStream(StreamingResponse):
    """A stream whose sequences end with it, even if it never began."""

    def __init__(self, call: Call, content: AsyncIterator[bytes]) -> None:
        super().__init__(content, media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.cancel()

"""Clients: concurrent streams through OpenAI's own client, and when each of their tokens came."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lookup_experts.benchmarks.serving.process import ServerProcess
from lookup_experts.errors import UserError

REQUEST_SECONDS = 300.0
SAMPLE_SECONDS = 5.0


@dataclass
class Stream:
    """One request: when it was sent and when its tokens came, in `time.perf_counter()`."""

    sent_at: float
    token_times: list[float] = field(default_factory=list)
    complete: bool = False
    error: str | None = None


@dataclass
class Load:
    """What a server gave."""

    streams: list[Stream]
    seconds: float
    memory: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the start, resident bytes of the server."""

    @property
    def tokens_per_second(self) -> float:
        """Of all streams together."""
        return sum(len(stream.token_times) for stream in self.streams) / self.seconds


class Client:
    """Sends requests of a fixed size to one server.

    Args:
        server: the server.
        prompts: token ids of prompts, taken in turn.
        tokens: to generate for each.

    Raises:
        UserError: openai is not installed.
    """

    def __init__(self, server: ServerProcess, prompts: Sequence[list[int]], tokens: int) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError(
                "mole bench serve loads the server with OpenAI's client: pip install openai."
            ) from error
        self._client = openai.AsyncOpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=REQUEST_SECONDS,
        )
        self._model, self._prompts, self._tokens = server.model, prompts, tokens
        self._next = 0

    async def load_once(self, streams: int) -> Load:
        """So many requests at once, until all have ended."""
        started_at = time.perf_counter()
        done = await asyncio.gather(*(self._next_request() for _ in range(streams)))
        return Load(list(done), time.perf_counter() - started_at)

    async def send_all_prompts(self, streams: int, progress: Callable[[int, int], None]) -> None:
        """Each prompt once, so many at a time, for a single token.

        Raises:
            UserError: one of them failed.
        """
        prompts = iter(enumerate(self._prompts))

        async def work() -> None:
            for number, prompt in prompts:
                progress(number, len(self._prompts))
                stream = await self._request(prompt, 1)
                if stream.error:
                    raise UserError(f"A request before the soak failed: {stream.error}")

        await asyncio.gather(*(work() for _ in range(streams)))

    async def soak(
        self, streams: int, seconds: float, progress: Callable[[int, int], None]
    ) -> Load:
        """So many requests at all times for so long; the server's memory is sampled meanwhile."""
        started_at = time.perf_counter()
        load = Load([], 0.0)

        def elapsed() -> float:
            return time.perf_counter() - started_at

        async def work() -> None:
            while elapsed() < seconds:
                load.streams.append(await self._next_request())

        async def watch() -> None:
            while elapsed() < seconds:
                load.memory.append((elapsed(), await self._resident_bytes()))
                progress(int(elapsed()), int(seconds))
                await asyncio.sleep(min(SAMPLE_SECONDS, seconds / 10))

        await asyncio.gather(watch(), *(work() for _ in range(streams)))
        load.seconds = elapsed()
        load.memory.append((load.seconds, await self._resident_bytes()))
        return load

    async def _resident_bytes(self) -> int:
        told: Any = await self._client.get("/stats", cast_to=object)
        return int(told["resident_bytes"])

    async def _next_request(self) -> Stream:
        prompt = self._prompts[self._next % len(self._prompts)]
        self._next += 1
        return await self._request(prompt, self._tokens)

    async def _request(self, prompt: list[int], tokens: int) -> Stream:
        stream = Stream(time.perf_counter())
        ended = False
        try:
            chunks = await self._client.completions.create(
                model=self._model,
                prompt=prompt,
                max_tokens=tokens,
                temperature=0,
                stream=True,
            )
            async for chunk in chunks:
                if chunk.choices[0].finish_reason is None:
                    stream.token_times.append(time.perf_counter())
                else:
                    ended = True
        except Exception as error:  # of the client, or of what it is built on: the request is lost
            stream.error = f"{type(error).__name__}: {error}"
            return stream
        stream.complete = ended and len(stream.token_times) == tokens
        return stream

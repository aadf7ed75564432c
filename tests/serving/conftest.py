"""A served model in this process, and the real server in its own."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from server_process import Server

pytest.importorskip("fastapi", reason="the serving tests need fastapi, uvicorn, prometheus-client")


@pytest.fixture(scope="module")
def server(table_folder) -> Iterator[Server]:
    """A small server that many tests use."""
    with Server(
        table_folder,
        *("--store", "direct", "--cache", "20kB", "--max-batch", 8, "--max-queue", 64),
        *("--chat-template", "plain"),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def make_client(table_folder, tokenizer) -> Iterator[Any]:
    """The application in this process: options -> a client with its service."""
    from contextlib import ExitStack

    from fastapi.testclient import TestClient

    import lookup_experts as le
    from lookup_experts.serving.run import guarded
    from lookup_experts.serving.service import Service, ServiceOptions
    from lookup_experts.serving.waiting import Limits

    stack = ExitStack()

    own = tokenizer

    def make(
        keys: Any = None,
        limits: Any = None,
        model: Any = None,
        tokenizer: Any = None,
        origins: Sequence[str] = (),
        **options: Any,
    ) -> Any:
        loaded = model or le.load(table_folder, store="direct", cache="20kB")
        chosen = ServiceOptions("tiny", limits or Limits(4, 8), **options)
        service = Service(loaded, tokenizer or own, chosen)
        app = guarded(service, keys, origins)
        client = stack.enter_context(TestClient(app, raise_server_exceptions=False))
        client.service = service  # type: ignore[attr-defined]
        client.tokenizer = tokenizer or own  # type: ignore[attr-defined]
        return client

    with stack:
        yield make

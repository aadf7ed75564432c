"""A server in a thread of this process: no second process to wait for, and its parts in reach."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def served_here(
    model: Any, tokenizer: Any, keys: Any = None, **options: Any
) -> Iterator[tuple[str, Any]]:
    """A model at a real port: (its URL, the service).

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        keys: an `ApiKeys`, or None.
        options: of `ServiceOptions`.
    """
    import uvicorn

    from lookup_experts.serving.app import create_app
    from lookup_experts.serving.guard import Guard
    from lookup_experts.serving.run import open_socket, url_of
    from lookup_experts.serving.service import Service, ServiceOptions
    from lookup_experts.serving.waiting import Limits

    service = Service(model, tokenizer, ServiceOptions("tiny", Limits(4, 8), **options))
    service.prepare()
    guarded = Guard(create_app(service), keys, service.metrics.requests)
    config = uvicorn.Config(guarded, log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    with open_socket("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield url_of(*listening.getsockname()[:2]), service
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()

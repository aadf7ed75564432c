"""The server's process: a socket, uvicorn, signals, an end in good order."""

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from lookup_experts.errors import UserError
from lookup_experts.serving.app import create_app
from lookup_experts.serving.guard import ApiKeys, Guard
from lookup_experts.serving.service import Service

GRACE_SECONDS = 30.0
"""For what runs, after SIGTERM or Ctrl-C."""
KEEP_ALIVE_SECONDS = 120.0
"""Longer than clients keep connections for later use (Go 90, load balancers 60): who closes first
must be the client, or its next request meets a closed connection."""

Say = Callable[[str], None]


class GracefulServer(uvicorn.Server):
    """On the first signal the engine takes nothing new and finishes what runs."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        self._service.engine.drain()
        super().handle_exit(sig, frame)


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free.

    Raises:
        UserError: the address can't be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((str(address[0]), int(address[1])), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"Can't listen on {host}:{port}: {error}. Give another --host or --port."
        ) from error


def serve(
    service: Service,
    listening: socket.socket,
    keys: ApiKeys | None,
    say: Say,
    *,
    keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
    origins: Sequence[str] = (),
    grace_seconds: float = GRACE_SECONDS,
) -> None:
    """Serve until a signal ends it; returns once everything has ended in good order.

    Args:
        service: what is served, prepared.
        listening: an open socket.
        keys: who may use it; None: everybody.
        say: told where it listens.
        keep_alive_seconds: after which an idle connection is closed.
        origins: of other sites whose pages may use the API; `*` for all.
        grace_seconds: for what runs when the end is asked for.

    """
    host, port = listening.getsockname()[:2]
    warning = warning_for(host, keys)
    if warning is not None:
        say(warning)
    defaults = str(service.defaults)
    if defaults:
        say(f"The model's own sampling, where requests don't say: {defaults}")
    reason = service.engine.why_not_captured
    if reason is not None:
        say(f"Steps run without CUDA graphs, which takes longer. {reason}")
    config = uvicorn.Config(
        guarded(service, keys, origins),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(keep_alive_seconds),
        timeout_graceful_shutdown=int(grace_seconds),
    )
    say(f"Serving {service.options.name} at {url_of(host, port)}")
    # uvicorn hands the signal on when it is done; then there is nothing left to do.
    before = {name: signal.signal(name, _ignore) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        asyncio.run(GracefulServer(config, service).serve([listening]))
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    say("Stopped.")


def guarded(service: Service, keys: ApiKeys | None, origins: Sequence[str] = ()) -> ASGIApp:
    """The whole application. Preflights are answered before keys are asked for."""
    app: ASGIApp = Guard(create_app(service), keys, service.metrics.requests)
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("Retry-After",),
        max_age=3600,
    )


def warning_for(host: str, keys: ApiKeys | None) -> str | None:
    """What to say of an address that other machines can reach, when there is no key."""
    if keys is not None or ipaddress.ip_address(host).is_loopback:
        return None
    return (
        f"Warning: {host} can be reached from other machines, and everybody there may use the "
        "model; give --api-key-file."
    )


def url_of(host: str, port: int) -> str:
    """`http://127.0.0.1:8000`, or `http://[::1]:8000`."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _ignore(sig: int, frame: FrameType | None) -> None:
    pass


def read_keys(path: Path | None) -> ApiKeys | None:
    """The keys of `--api-key-file`, or None."""
    return None if path is None else ApiKeys(path)

"""Reads that a thread of ours carries out."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from lookup_experts.errors import TableError

_Result = TypeVar("_Result")


def submit_read(
    thread: Executor, read: Callable[..., _Result], *arguments: Any
) -> "Future[_Result]":
    """What a thread of ours reads; a `TableError` in it where that thread has ended.

    It is in the future in any case, so a read that can't begin fails like one that breaks off:
    when its records are needed, and the same each time.
    """
    try:
        return thread.submit(_read_in_thread, read, arguments)
    except RuntimeError as error:
        failed: Future[_Result] = Future()
        failed.set_exception(_ended(error))
        return failed


def _read_in_thread(read: Callable[..., _Result], arguments: tuple[Any, ...]) -> _Result:
    try:
        return read(*arguments)
    except Exception:
        raise
    except BaseException as error:  # it is for the thread that it reached, not for the model's
        raise _ended(error) from error


def _ended(error: BaseException) -> TableError:
    why = f"{type(error).__name__}: {error}".removesuffix(": ")
    return TableError(
        f"The thread that reads the table has ended ({why}). Try again; if it stays so, load the "
        "model again."
    )


class ThreadedRead:
    """A `PendingRead` that a thread of ours carries out."""

    def __init__(self, future: "Future[None]") -> None:
        self._future = future

    def wait(self) -> None:
        """See `PendingRead.wait`."""
        self._future.result()

"""A loaded model as a service: its engine, its prompts, its counts. What routes call."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lookup_experts.folders.by_table import TableFacts
from lookup_experts.folders.readers import table_readers
from lookup_experts.model.forms import get_form
from lookup_experts.model.settings import LookupSettings
from lookup_experts.serving.calls import Call, deliver_on
from lookup_experts.serving.constraints import Constraints
from lookup_experts.serving.defaults import SamplingDefaults
from lookup_experts.serving.engine import Engine, end_ids_of
from lookup_experts.serving.errors import ApiError
from lookup_experts.serving.metrics import ServingMetrics, resident_bytes
from lookup_experts.serving.prompts import Prompter
from lookup_experts.serving.protocol import ChatBody, CompletionBody
from lookup_experts.serving.reports import Outbox
from lookup_experts.serving.requests import RequestMaker
from lookup_experts.serving.vocabulary import Vocabulary
from lookup_experts.serving.waiting import Limits


@dataclass(frozen=True)
class ServiceOptions:
    """How a model is served."""

    name: str
    """By which clients ask for it."""
    limits: Limits
    seconds: float = 300.0
    """A request may take, waiting included."""
    chat_template: str | None = None
    """To use instead of the tokenizer's own."""
    graphs: bool = True
    """Whether a GPU captures the steps of decoding as CUDA graphs."""


class Service:
    """One model, ready for requests once `start` was called on an event loop.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        tokenizer: its tokenizer.
        options: how it is served.

    Raises:
        UserError: the model can't be batched.
    """

    def __init__(self, model: Any, tokenizer: Any, options: ServiceOptions) -> None:
        self.options = options
        self.started_at = time.time()
        self._model = model
        self._tables = table_readers(model)
        self.metrics = ServingMetrics(self._tables)
        end_ids = end_ids_of(model, tokenizer)
        self.prompter = Prompter(model, tokenizer, options.chat_template, end_ids)
        self.vocabulary = Vocabulary(tokenizer)
        self.defaults = SamplingDefaults.of(model)
        self._maker = RequestMaker(
            self.prompter,
            self.vocabulary,
            Constraints(tokenizer, model.get_input_embeddings().weight.shape[0], end_ids),
            self.defaults,
            frozenset(end_ids),
            options.seconds,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self.engine = Engine(
            model, end_ids, options.limits, self.metrics, self._deliver, options.graphs
        )

    def _deliver(self, outbox: Outbox) -> None:
        assert self._loop is not None
        deliver_on(self._loop, outbox)

    def prepare(self) -> None:
        """Take the row cache's memory and fill it, before anything is served.

        Raises:
            TableError: see `TableReader.fill_cache`.
        """
        if self._tables is not None:
            self._tables.take_cache_memory()
            self._tables.fill_cache()

    def start(self) -> None:
        """Begin to work; events are heard on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    # ------------------------------------------------------------------ requests

    @property
    def models(self) -> dict[str, str | None]:
        """By which names clients ask for a model -> the table that it means; None: no table of
        several. The first is the one without a name of its own."""
        name = self.options.name
        tables = getattr(self._model, "tables", {})
        return {name: None, **{f"{name}:{table}": table for table in tables}}

    def table_of(self, name: str | None) -> str | None:
        """The table that a model's name means; no name is the first of `models`.

        Raises:
            ApiError: no such model is served.
        """
        known = self.models
        if name is not None and name not in known:
            raise ApiError(
                404,
                f"The model {name[:200]!r} is not served here; this server has "
                f"{', '.join(map(repr, known))}.",
                "model",
                "model_not_found",
            )
        return None if name is None else known[name]

    def _check_number(self, sequences: int) -> None:
        """Raise an `ApiError` for more than can ever wait, before any work is done for them."""
        most = self.options.limits.max_batch + self.options.limits.max_queue
        if sequences > most:
            raise ApiError(
                400,
                f"The request asks for {sequences} sequences (prompts x n); this server takes at "
                f"most {most} at once. Send several requests.",
            )

    def completion(self, body: CompletionBody) -> Call:
        """The sequences that a completion asks for, not yet submitted."""
        table = self.table_of(body.model)
        self._check_number(len(body.prompts()) * (body.n or 1))
        return Call(self.engine, self._maker.completion(body, table))

    def chat(self, body: ChatBody) -> Call:
        """The sequences that a chat completion asks for, not yet submitted."""
        table = self.table_of(body.model)
        self._check_number(body.n or 1)
        return Call(self.engine, self._maker.chat(body, table))

    # ------------------------------------------------------------------ what it tells of itself

    def stats(self) -> dict[str, Any]:
        """As `protocol.Stats`."""
        reader = self._tables.stats() if self._tables is not None else None
        config = self._model.config.get_text_config(decoder=True)
        by_table: dict[str, TableFacts] = getattr(self._model, "tables", {})
        record_bytes = self._tables.bytes_per_token if self._tables and not by_table else None
        own = getattr(self._model, "lookup_settings", None)
        return {
            "model": self.options.name,
            "kind": kind_of(self._model),
            "tables": {
                name: _rows(one.settings, config, one.layout.record_bytes)
                for name, one in by_table.items()
            },
            "layers": config.num_hidden_layers,
            **_rows(own, config, record_bytes),
            "context": self.prompter.context,
            "chat": self.prompter.has_chat_template,
            "tokens_per_second": round(self.metrics.tokens_per_second, 2),
            "ids_asked": reader.ids_asked if reader else 0,
            "ids_unique": reader.ids_unique if reader else 0,
            "cache_hits": reader.cache_hits if reader else 0,
            "hit_rate": reader.cache_hits / max(1, reader.ids_unique) if reader else 0.0,
            "bytes_read": reader.bytes_read if reader else 0,
            "read_seconds": reader.read_seconds if reader else 0.0,
            "wait_seconds": reader.wait_seconds if reader else 0.0,
            "resident_bytes": resident_bytes(),
            "running": self.engine.num_running,
            "waiting": self.engine.num_waiting,
            "store": reader.store if reader else None,
            "backend": reader.backend if reader else None,
            "uptime_seconds": round(time.time() - self.started_at, 3),
        }


def _rows(settings: LookupSettings | None, config: Any, record_bytes: int | None) -> dict[str, Any]:
    """As `answers.RowStats`."""
    if settings is None:
        routed = num_routed(config)
        return {
            "experts": routed,
            "row_size": None,
            "record_bytes": record_bytes,
            "router": False,
        }
    return {
        "experts": settings.num_experts,
        "row_size": settings.row_size or config.hidden_size,
        "record_bytes": record_bytes,
        "router": get_form(settings.row_form).HAS_ROUTER,
    }


def kind_of(model: Any) -> str:
    """The form of lookup experts' rows and of the model (`mole-table`, `meki-experts` ...), `moe`
    or `dense`."""
    settings = getattr(model, "lookup_settings", None)
    if settings is not None:
        return f"{settings.row_form}-{settings.form}"
    return "moe" if num_routed(model.config.get_text_config(decoder=True)) > 1 else "dense"


def num_routed(config: Any) -> int:
    """Experts per layer of a mixture-of-experts backbone; 0 for any other."""
    names: Sequence[str] = ("num_local_experts", "num_experts", "n_routed_experts")
    return max((getattr(config, name, None) or 0 for name in names), default=0)

"""CUDA graphs without CUDA: what a graph does to tensors, on a CPU.

While something is captured its operations are noted, and what they write is undone at the end, as a
GPU does nothing during a capture. A replay runs the same operations on the same tensors and writes
the results into the tensors that came of the capture: numbers of Python's, and tensors that have
gone somewhere else, are what they were then.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lookup_experts.generation.captured import DecodingSteps


class SimulatedGraph:
    """See `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.operations = []
        self.replays = 0

    def pool(self) -> "SimulatedGraph":
        return self

    def replay(self) -> None:
        self.replays += 1
        for operation, arguments, options, results in self.operations:
            for result, now in zip(
                results, tree_flatten(operation(*arguments, **options))[0], strict=True
            ):
                if isinstance(result, torch.Tensor) and result.data_ptr() != now.data_ptr():
                    result.copy_(now)


class _Noting(TorchDispatchMode):
    def __init__(self, graph: SimulatedGraph) -> None:
        super().__init__()
        self._graph = graph
        self._before = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation is torch.ops.aten.nonzero.default:  # its size has to be looked at
            raise RuntimeError("operation not permitted when stream is capturing")
        schema = operation._schema.arguments
        for argument, value in zip(schema, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._before.append((value, value.clone()))
        found = operation(*args, **kwargs)
        self._graph.operations.append((operation, args, kwargs, tree_flatten(found)[0]))
        return found

    def undo(self) -> None:
        for tensor, value in reversed(self._before):
            tensor.copy_(value)


def simulate(monkeypatch) -> None:
    """Put simulated graphs into `torch.cuda`, and streams that are nothing; decoding steps are then
    captured on a CPU too."""
    plain = DecodingSteps.__init__

    def captures(self, *arguments):
        plain(self, *arguments)
        self._captures = True

    monkeypatch.setattr(DecodingSteps, "__init__", captures)
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextmanager
    def graph(of, pool=None, capture_error_mode="global"):
        assert capture_error_mode == "thread_local"
        assert pool is None or isinstance(pool, SimulatedGraph)
        noting = _Noting(of)
        try:
            with noting:
                yield
        finally:
            noting.undo()

    for name, value in {
        "CUDAGraph": SimulatedGraph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "device": lambda device: nullcontext(),
        "graph": graph,
        "set_stream": lambda given: None,
        "stream": lambda given: nullcontext(),
        "synchronize": lambda device=None: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: None)

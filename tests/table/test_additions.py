"""A block's part in a step: begun before the FFN, added after it, in every way the same."""

import threading
from contextlib import nullcontext

import pytest
import torch
from staged_rows import FORMS, OPERATION_OF, StageRows, by_the_book, stage_model
from tiny_models import token_ids
from torch import Tensor, nn

from lookup_experts.model.forms.mole import LookupExperts
from lookup_experts.model.wiring import (
    Entrance,
    ForwardPass,
    add_lookup_output,
    begin_lookup_output,
    resumed,
)
from lookup_experts.table import additions
from lookup_experts.table.additions import Way, as_captured
from lookup_experts.table.encoding import ENCODINGS, get_encoding
from lookup_experts.table.layout import RecordLayout, TableShape

pytestmark = pytest.mark.timeout(60)

IDS = token_ids(3, 2)


@pytest.fixture
def called(monkeypatch):
    """Which of the operations were called, in turn."""
    names: list[str] = []

    def noting(name):
        function = getattr(additions, name)

        def noted(*arguments):
            names.append(name)
            return function(*arguments)

        return noted

    for name in (*OPERATION_OF.values(), "add_three"):
        monkeypatch.setattr(additions, name, noting(name))
    return names


class Streams:
    """In the place of CUDA's: notes what is queued where."""

    def __init__(self, monkeypatch) -> None:
        self.notes: list[str] = []
        streams = self

        class Stream:
            def __init__(self, device=None, name="side"):
                self.device, self.name = device, name

            def wait_stream(self, other):
                streams.notes.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event):
                streams.notes.append(f"{self.name} waits for {event.name}")

        class Event:
            def record(self, stream):
                self.name = "event"
                streams.notes.append(f"event on {stream.name}")

        model = Stream(name="model")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: model)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        additions._side_of.cache_clear()


@pytest.fixture
def streams(monkeypatch):
    yield Streams(monkeypatch)
    additions._side_of.cache_clear()


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_way_gives_the_same(form, beside, deferred, called, streams, monkeypatch):
    model = stage_model(form)
    expected = by_the_book(model, IDS)
    for name in ("WIDE", "NARROW"):
        monkeypatch.setattr(additions, name, Way(beside, deferred))
    with torch.inference_mode():
        del called[:]
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert called == [OPERATION_OF[form]] * 3 and streams.notes == []
        del called[:]
        with as_captured():
            found = model(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    in_one = form == "wide" and not beside
    one_layer = [OPERATION_OF[form]] + (["add_three"] if deferred and not in_one else [])
    assert called == one_layer * 3
    order = ["side waits for model", "event on side", "model waits for event"]
    assert streams.notes == (order * 3 if beside else [])


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
@pytest.mark.parametrize("form", FORMS)
def test_every_encoding(form, encoding, called):
    model = stage_model(form, encoding)
    expected = by_the_book(model, IDS)
    with torch.no_grad():
        del called[:]
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-3)
    assert called == [OPERATION_OF[form]] * 3


def test_rows_are_summed_in_the_order_of_others(monkeypatch):
    """Records anywhere, by their places."""
    model = stage_model("wide")
    expected = by_the_book(model, IDS)
    source = model.expert_source
    order = torch.tensor([3, 0, 5, 1, 4, 2])

    class Scattered:
        def rows(self, *arguments):
            rows = source.rows(*arguments)
            rows.memory = rows.memory[order].contiguous()
            rows._places = order.argsort()
            return rows

    model.set_expert_source(Scattered())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_who_looks_or_changes_something_is_heeded(form, called):
    model = stage_model(form)
    expected = by_the_book(model, IDS)
    block = model.lookup_blocks[1]
    asked, ffn = [], model.model.layers[1].mlp
    part = {"wide": "router", "narrow": "out_proj", "gated": "out_proj"}[form]
    with torch.no_grad():
        del called[:]
        handle = getattr(block, part).register_forward_hook(lambda *call: asked.append(1))
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert asked == [1] and called == [OPERATION_OF[form]] * 2
        handle.remove()
        handle = ffn.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        doubled = model(input_ids=IDS).logits
        # By its state as the FFN sees it: in one operation too where rows are as wide.
        in_all = 5 if form == "wide" else 4
        assert called == [OPERATION_OF[form]] * in_all
        handle.remove()
        assert not torch.allclose(doubled, expected, atol=1e-3)
        if form != "gated":
            weights = []
            model.lookup_entrance.observe = lambda layer, given: weights.append(given)
            model(input_ids=IDS)
            assert len(weights) == 3 and called == [OPERATION_OF[form]] * in_all
            model.lookup_entrance.observe = None
    logits = model(input_ids=IDS).logits  # with gradients
    assert called == [OPERATION_OF[form]] * in_all
    logits.sum().backward()
    assert getattr(block, part).weight.grad.abs().sum() > 0


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_ffn_that_gives_a_tuple_or_another_dtype(deferred, dtype, monkeypatch):
    monkeypatch.setattr(additions, "WIDE", Way(beside=False, deferred=deferred))

    class FFN(nn.Module):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, str]:
            return (2 * hidden_states).to(dtype).view(-1, 8), "scores"

    ffn, encoding = FFN(), get_encoding("float32")
    ffn.add_module("lookup_experts", LookupExperts(0, 8, 2))
    ffn.register_forward_pre_hook(begin_lookup_output, with_kwargs=True)
    ffn.register_forward_hook(add_lookup_output, with_kwargs=True)
    layout = RecordLayout(TableShape(9, 1, 2, 8), encoding)
    rows, states = torch.randn(3, 2, 8), torch.randn(3, 1, 8)
    memory = torch.zeros(3, layout.stride, dtype=torch.uint8)
    memory[:, : layout.layer_bytes] = encoding.encode(rows)
    with torch.no_grad(), as_captured():
        stage = StageRows(layout, torch.float32, memory, torch.arange(3).view(3, 1))
        with resumed(ForwardPass(stage, None, Entrance(None), None)):
            output, scores = ffn(hidden_states=states)
        weights = ffn.lookup_experts.router(states).softmax(dim=-1)
        mixed = torch.einsum("pnd,pn->pd", rows, weights.view(3, 2))
    assert scores == "scores" and output.dtype == dtype and output.shape == (3, 8)
    torch.testing.assert_close(output + 0, (2 * states.view(3, 8) + mixed).to(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_what_does_not_fit_takes_the_ways_that_say_so(form):
    model = stage_model(form)
    block = model.lookup_blocks[0]
    with torch.no_grad():
        rows = model.expert_source.rows(IDS, False, model.model)
        states = torch.randn(3, 2, block.out_proj.out_features if block.out_proj else 32)
        weights = [block.gate_proj.weight] if form == "gated" else [block.router.weight]
        weights.append(None if form == "wide" else block.out_proj.weight)
        begin = rows.begin_routed
        if form == "gated":
            weights += [block.post_norm.weight, 1e-6]
            begin = rows.begin_gated
        assert begin(0, states, *weights) is not None
        assert begin(0, states[:, :1], *weights) is None
        assert begin(0, states.double(), *weights) is None
        assert begin(0, states.to("meta"), *weights) is None
        for place, weight in enumerate(weights):
            if isinstance(weight, Tensor):
                for wrong in (weight.double(), weight[:1], weight.repeat_interleave(2, dim=0)):
                    changed = [*weights[:place], wrong, *weights[place + 1 :]]
                    assert begin(0, states, *changed) is None
        if form == "narrow":
            assert begin(0, states, weights[0], None) is None


def test_limits(monkeypatch):
    model = stage_model("narrow")
    expected = by_the_book(model, IDS)
    for limit in ("MOST_POSITIONS", "MOST_EXPERTS", "MOST_ROUTER_WEIGHTS", "MOST_HIDDEN"):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(additions, limit, 3)
            block = model.lookup_blocks[0]
            rows = model.expert_source.rows(IDS, False, model.model)
            states = torch.randn(3, 2, 32)
            weights = block.router.weight, block.out_proj.weight
            assert rows.begin_routed(0, states, *weights) is None
            found = model(input_ids=IDS).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_capturing_is_of_a_thread():
    layout = RecordLayout(TableShape(9, 1, 2, 8), get_encoding("float32"))
    memory, seen = torch.zeros(1, layout.stride, dtype=torch.uint8), {}

    def look(name: str) -> None:
        rows = StageRows(layout, torch.float32, memory, torch.zeros(1, 1))
        seen[name] = rows._is_captured

    look("before")
    with as_captured():
        look("within")
        with as_captured():
            look("twice")
        look("still")
        other = threading.Thread(target=look, args=("other",))
        other.start()
        other.join()
        with pytest.raises(KeyError), as_captured():
            raise KeyError
        look("after an error")
    look("after")
    within = {"within", "twice", "still", "after an error"}
    assert {name for name, is_captured in seen.items() if is_captured} == within

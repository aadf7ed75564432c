"""torch.compile: the logits of eager, one break in the graph, and no new graph for every length."""

import pytest
import torch
from tiny_models import enable_checkpointing, logits_of, randomize_experts, tiny_model, token_ids

import lookup_experts as le
from lookup_experts.folders.load import load


def shallow_model():
    """A model of one block: compiling takes seconds for each."""
    model = tiny_model("llama", num_hidden_layers=1)
    le.attach(model, 3, expert_size=8)
    randomize_experts(model)
    return model.eval()


@pytest.fixture(scope="module")
def shallow():
    return shallow_model()


@pytest.fixture(scope="module")
def folder(shallow, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compile") / "float32"
    le.reparameterize(shallow, folder, encoding="float32")
    return folder


@pytest.fixture
def open_model(shallow, folder):
    """The training form, or the table form by the name of a store."""
    torch._dynamo.reset()
    yield lambda form: shallow if form == "experts" else load(folder, store=form)
    torch._dynamo.reset()


class CountedGraphs:
    """A back end that runs graphs as they are and notes how many there were."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


def graphs_of_lengths(model, lengths) -> list[int]:
    """How many graphs there are after each length; asserts the logits of eager."""
    counted = CountedGraphs()
    compiled = torch.compile(model, backend=counted)
    graphs = []
    for length in lengths:
        ids = token_ids(2, length, seed=length)
        torch.testing.assert_close(
            logits_of(compiled, ids), logits_of(model, ids), rtol=1e-5, atol=1e-5
        )
        graphs.append(counted.graphs)
    return graphs


@pytest.mark.parametrize("form", ["memory", "mmap"])
def test_the_only_break_is_the_way_of_the_token_ids_out_of_the_graph(open_model, form):
    assert graphs_of_lengths(open_model(form), [9]) == [2]


@pytest.mark.parametrize("form", ["experts", "direct"])
def test_lengths_after_the_second_make_no_new_graph(open_model, form):
    static, dynamic, last = graphs_of_lengths(open_model(form), [9, 4, 17])
    assert static == 2  # one break, as above
    assert last == dynamic <= 4


@pytest.mark.parametrize("encoding", ["int8", "nf3"])
def test_encodings_decode_inside_the_graph(shallow, tmp_path, encoding):
    le.reparameterize(shallow, tmp_path / "out", encoding=encoding)
    torch._dynamo.reset()
    assert graphs_of_lengths(load(tmp_path / "out", store="mmap"), [9]) == [2]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_number_of_unique_ids_makes_no_new_graph(checkpointing):
    """Training steps on batches of one shape, each with another number of unique ids; forward and
    backward graphs as `torch.compile` makes them, run as they are."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    eager = shallow_model()
    if checkpointing:
        enable_checkpointing(eager.train(), {"use_reentrant": False})
    compiled = torch.compile(eager, backend=aot_autograd(fw_compiler=count))
    after_each = []
    for vocab_size in (40, 3, 90):
        ids = token_ids(2, 24, vocab_size=vocab_size)
        gradients = []
        for model in (compiled, eager):
            eager.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            gradients.append([weight.grad.clone() for weight in eager.parameters()])
        for fast, slow in zip(*gradients, strict=True):
            torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
        after_each.append(len(graphs))
    torch._dynamo.reset()
    assert after_each[0] == after_each[-1], after_each

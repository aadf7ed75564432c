"""Decoding with a static cache and a compiled step gives what the model gives."""

import torch
from tiny_models import gateless_model, token_ids

from lookup_experts.benchmarks.graphs import DecodingByGraphs
from lookup_experts.model.cache_names import cache_argument, cache_of


def test_sequences_one_after_the_other_by_one_graph():
    model, graphs = gateless_model(num_hidden_layers=1), []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    by_graphs = DecodingByGraphs(model, 20, {"backend": count})
    assert by_graphs.config is model.config
    with torch.inference_mode():
        for seed in range(3):
            ids = token_ids(2, 20, seed=seed)
            prompt = by_graphs(ids[:, :10], use_cache=True, logits_to_keep=1)
            cache = {cache_argument(model): cache_of(prompt)}
            for step in range(10, 20):
                column = ids[:, step, None]
                found = by_graphs(column, use_cache=True, **cache).logits[:, -1]
            expected = model(ids, use_cache=False).logits[:, -1]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
    torch._dynamo.reset()

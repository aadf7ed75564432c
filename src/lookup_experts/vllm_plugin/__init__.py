"""Lookup experts in vLLM: `vllm serve FOLDER` takes the folders that this package writes.

vLLM finds the package by its entry point `vllm.general_plugins` and calls `register` in each of its
processes. A model is then vLLM's own class of the backbone with experts attached, as `attach` does
it to one of transformers (`attached_model.py`, `blocks.py`); what its blocks need of a step is
asked for ahead of the first one (`step.py`). What can't be served is refused before a worker starts
(`checks.py`).

Without vLLM only this file, `sources.py` and `step.py` can be imported.
"""


def register() -> None:
    """Make vLLM know the models of this package; vLLM may call it more than once."""
    from lookup_experts.vllm_plugin.registration import register_models

    register_models()

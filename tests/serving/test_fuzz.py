"""Whatever is sent to the routes of the OpenAPI document, no answer is a 5xx.

`FUZZ_MINUTES=60 pytest tests/serving/test_fuzz.py` goes on for so long.
"""

import os
import time
from collections.abc import Iterator

import chat_templates
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from server_process import Server
from tiny_tokenizers import writing_model, writing_tokenizer

schemathesis = pytest.importorskip("schemathesis", reason="fuzzing needs schemathesis")

MINUTES = float(os.environ.get("FUZZ_MINUTES", "0"))
EXAMPLES = 15
"""Of each route, in each round, well-formed and ill-formed."""
REQUEST_SECONDS = 60


@pytest.fixture(scope="module", params=["a table", "a model that writes and calls tools"])
def fuzzed(request, tmp_path_factory) -> Iterator[Server]:
    if request.param == "a table":
        yield request.getfixturevalue("server")
        return
    folder = tmp_path_factory.mktemp("writing") / "model"
    writing_model().save_pretrained(folder)
    writing_tokenizer(chat_templates.HERMES).save_pretrained(folder)
    with Server(folder, "--max-batch", 8, "--max-queue", 64, "--timeout", 20) as running:
        yield running


def fuzz(operation, mode) -> int:
    """Send examples to one route; gives how many were answered."""
    answered = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=MINUTES == 0,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        nonlocal answered
        response = case.call(timeout=REQUEST_SECONDS)
        # A model of 2,048 tokens may take longer than this server allows.
        assert response.status_code < 500 or response.status_code == 504, response.text
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error["message"] and error["type"]
        answered += 1

    check()
    return answered


@pytest.mark.timeout(120 + 120 * MINUTES)
def test_no_answer_is_a_5xx(fuzzed):
    until = time.monotonic() + 60 * MINUTES
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    modes = schemathesis.GenerationMode
    assert len(operations) >= 6
    answered = 0
    while not answered or time.monotonic() < until:
        for operation in operations:
            # Without a body nothing is ill-formed: any text is a model's name.
            for mode in (modes.POSITIVE, modes.NEGATIVE) if operation.body else (modes.POSITIVE,):
                answered += fuzz(operation, mode)
    assert answered > 50
    assert fuzzed.process.poll() is None

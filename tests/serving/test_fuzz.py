"""Whatever is sent to the routes of the OpenAPI document, no answer is a 5xx.

`FUZZ_MINUTES=60 pytest tests/serving/test_fuzz.py` goes on for so long.
"""

import os
import time

import pytest
from hypothesis import HealthCheck, Phase, given, settings

schemathesis = pytest.importorskip("schemathesis", reason="fuzzing needs schemathesis")

MINUTES = float(os.environ.get("FUZZ_MINUTES", "0"))
EXAMPLES = 15
"""Of each route, in each round, well-formed and ill-formed."""
REQUEST_SECONDS = 60


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
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error["message"] and error["type"]
        answered += 1

    check()
    return answered


@pytest.mark.timeout(120 + 120 * MINUTES)
def test_no_answer_is_a_5xx(server):
    until = time.monotonic() + 60 * MINUTES
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
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
    assert server.process.poll() is None

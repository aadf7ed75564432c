"""What tests of evaluation share."""

import pytest


@pytest.fixture(scope="session")
def brief_harness():
    """The harness without its account of the machine: pip is asked for it, at a second a time."""
    import lm_eval.evaluator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        yield

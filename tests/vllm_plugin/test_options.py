"""The options of the table's reader, as vLLM hands them on. Needs no vLLM."""

import pytest

from lookup_experts.errors import UserError
from lookup_experts.vllm_plugin.sources import reader_options


@pytest.mark.parametrize("given", [{}, {"other plugin": 1}, None, {"lookup_experts": {}}])
def test_none_are_given(given):
    assert reader_options(given) == {}


def test_all_are_given():
    options = {"store": "auto:8GB", "cache": "256MB:64MB", "verify_checksums": True}
    assert reader_options({"lookup_experts": options, "other plugin": 1}) == options


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stores": "direct"}, "Unknown option .* 'stores'. Did you mean 'store'"),
        ({"notify": None}, "Unknown option .* 'notify'"),
        ({"store": "disk"}, "Unknown store 'disk'"),
        ({"cache": "much"}, "'much' is no size in bytes"),
        ("direct", "should hold the options of the table's reader"),
    ],
)
def test_what_cannot_be_read_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        reader_options({"lookup_experts": given})

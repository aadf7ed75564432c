"""vLLM says what `mole generate` says: the same tokens, and as likely."""

import dataclasses
import functools

import pytest

import lookup_experts as le

pytest.importorskip("vllm", reason="`make test-vllm` runs these with vLLM")
from vllm_here import (
    engine,
    mixed_prompts,
    model_with_experts,
    our_greedy,
    plain_model,
    vllm_greedy,
)

pytestmark = pytest.mark.timeout(300)

FROM_DISK = {"store": "direct", "cache": "20KB"}
"""With a row cache of some records, so that most are read, and some are found."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A folder and the way that vLLM runs it."""

    family: str
    form: str = "mole"
    encoding: str | None = "float32"
    """None: in training form."""
    reader: dict = dataclasses.field(default_factory=lambda: {"store": "memory"})
    compiled: bool = False

    @property
    def name(self) -> str:
        way = "compiled" if self.compiled else "eager"
        return "-".join([self.family, self.form, str(self.encoding), *self.reader.values(), way])


CASES = [
    Case("llama"),
    Case("llama", reader=FROM_DISK, compiled=True),
    Case("llama", encoding="nf4", reader=FROM_DISK),
    Case("llama", encoding=None),
    Case("llama", form="meki", reader=FROM_DISK),
    Case("qwen3", reader=FROM_DISK),
    Case("qwen3", compiled=True),
    Case("gemma3_text", reader=FROM_DISK),
    Case("gateless_llama", reader=FROM_DISK),
    Case("gateless_llama", encoding="nf4", reader=FROM_DISK, compiled=True),
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Makes the folder of a case, and again gives the same for the same."""
    root = tmp_path_factory.mktemp("folders")

    def make(case):
        training = root / f"{case.family}-{case.form}"
        if not training.exists():
            model_with_experts(case.family, case.form).save_pretrained(training)
        if case.encoding is None:
            return training
        folded = root / f"{training.name}-{case.encoding}"
        if not folded.exists():
            le.reparameterize(training, folded, encoding=case.encoding)
        return folded

    return make


@pytest.fixture(scope="module")
def expected_of():
    """What our own `generate` says, once for each folder."""
    return functools.cache(lambda folder: our_greedy(folder, mixed_prompts()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_tokens(case, folder_of, expected_of):
    folder = folder_of(case)
    with engine(
        folder,
        enforce_eager=not case.compiled,
        additional_config={"lookup_experts": case.reader} if case.encoding else {},
    ) as llm:
        found = vllm_greedy(llm, mixed_prompts())
    expected = expected_of(folder)
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    for (_, theirs), (_, ours) in zip(found, expected, strict=True):
        assert theirs == pytest.approx(ours, abs=1e-3)


def test_without_experts_it_would_say_something_else(folder_of, tmp_path):
    """So what is compared above tells whether they were there."""
    plain_model("llama").save_pretrained(tmp_path)
    prompts = mixed_prompts(8)
    with_experts, without = (
        our_greedy(folder, prompts) for folder in (folder_of(CASES[0]), tmp_path)
    )
    assert all(one[0] != other[0] for one, other in zip(with_experts, without, strict=True))

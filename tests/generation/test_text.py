"""Text from a model: what it is given, what it gives back, and what it counts."""

import json

import pytest
import torch
from simulated_graphs import simulate
from tiny_models import VOCAB, gateless_model, greedy, greedy_reference, tiny_model, token_ids

import lookup_experts as le
from lookup_experts.errors import TableError, UserError
from lookup_experts.folders.tokenizer import load_tokenizer
from lookup_experts.generation import text
from lookup_experts.generation.conversation import Conversation
from lookup_experts.generation.sampling import Sampling
from lookup_experts.generation.text import (
    Generation,
    format_end,
    format_statistics,
    generate_ids,
    generate_text,
)

PROMPT = token_ids(1, 9)[0].tolist()


@pytest.fixture(scope="module")
def model(table_folder):
    return le.load(table_folder, store="direct")


def test_ids_are_continued_greedily(model):
    generation = generate_ids(model, PROMPT, Sampling(max_new_tokens=12))
    expected = greedy_reference(model, torch.tensor([PROMPT]), 12)
    assert generation.token_ids == expected[0].tolist()
    assert generation.prompt_tokens == 9
    assert generation.text is None
    assert 0 < generation.seconds_to_first_token < generation.seconds
    decoding = generation.seconds - generation.seconds_to_first_token
    assert generation.tokens_per_second == pytest.approx(11 / decoding)
    assert json.loads(json.dumps(generation.to_dict()))["token_ids"] == generation.token_ids


def test_text_is_streamed_as_it_comes(model, tokenizer):
    pieces = []
    generation = generate_text(
        model, tokenizer, "the quick brown fox", Sampling(max_new_tokens=20), pieces.append
    )
    assert (
        "".join(pieces)
        == generation.text
        == tokenizer.decode(generation.token_ids, skip_special_tokens=True)
    )
    assert len(pieces) > 1


def test_sampling_is_repeatable_with_a_seed(model):
    def sampled(seed):
        sampling = Sampling(16, temperature=1.5, top_p=0.95, top_k=50, seed=seed)
        return generate_ids(model, PROMPT, sampling).token_ids

    assert sampled(1) == sampled(1)
    assert len({tuple(sampled(seed)) for seed in range(4)}) > 1


def test_a_temperature_may_be_a_whole_number(model):
    assert len(generate_ids(model, PROMPT, Sampling(4, temperature=2)).token_ids) == 4


def test_one_token_is_one_token(model):
    generation = generate_ids(model, PROMPT, Sampling(max_new_tokens=1))
    assert len(generation.token_ids) == 1
    assert generation.tokens_per_second == 0


def test_the_table_is_counted_for_each_generation(model):
    counts = [generate_ids(model, PROMPT, Sampling(max_new_tokens=6)).reader for _ in range(2)]
    for reader in counts:
        assert reader.store == "direct"
        assert reader.ids_asked == 9 + 5
        assert reader.batches == 6
        assert 0 < reader.ids_unique <= 14
        assert reader.wait_seconds <= 10
    assert "direct (" in format_statistics(generate_ids(model, PROMPT, Sampling(2)))


def test_a_model_without_a_table_counts_nothing(training_folder):
    generation = generate_ids(le.load(training_folder), PROMPT, Sampling(2))
    assert generation.reader is None
    assert "table" not in format_statistics(generation)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        Sampling(**values)


def test_prompts_that_can_not_be_continued_are_refused(model, tokenizer):
    with pytest.raises(UserError, match="prompt is empty"):
        generate_ids(model, [], Sampling())
    with pytest.raises(UserError, match="prompt is empty"):
        generate_text(model, tokenizer, "", Sampling())
    for wrong in (-1, VOCAB):
        with pytest.raises(UserError, match=rf"Token id {wrong} is outside the vocabulary"):
            generate_ids(model, [1, wrong], Sampling())
    with pytest.raises(UserError, match="has 128 tokens and the model's context is 128"):
        generate_ids(model, [1] * 128, Sampling())


def test_temperature_zero_is_greedy_whatever_the_rest(model):
    first = generate_ids(model, PROMPT, Sampling(8, temperature=0, top_p=0.5, seed=1))
    assert first.token_ids == generate_ids(model, PROMPT, Sampling(8)).token_ids


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_text_ends_with_the_context(family):
    """GPT-2 has no positions beyond, others would babble."""
    model = tiny_model(family)
    generation = generate_ids(model, PROMPT, Sampling(1000))
    assert len(generation.token_ids) == 128 - len(PROMPT)
    assert generation.finish_reason == "context"
    assert format_end(generation) == "Stopped after 119 tokens: the context of 128 is full."
    exactly = generate_ids(model, PROMPT, Sampling(119))
    assert (exactly.token_ids, exactly.finish_reason) == (generation.token_ids, "length")
    assert format_end(exactly) is None


def test_a_token_that_ends_the_text_is_told_from_a_length(model):
    first = generate_ids(model, PROMPT, Sampling(1)).token_ids[0]
    before = model.generation_config.eos_token_id
    for ends in (first, [96, first]):
        model.generation_config.eos_token_id = ends
        generation = generate_ids(model, PROMPT, Sampling(1))
        assert (generation.token_ids, generation.finish_reason) == ([first], "stop")
    model.generation_config.eos_token_id = before


# ------------------------------------------------------------------------- by captured steps


@pytest.fixture
def captures(monkeypatch):
    """Captured steps on a CPU, with simulated graphs; gives what tells if a model's are."""
    simulate(monkeypatch)
    can_capture = text._can_capture

    def as_on_a_gpu(model, device=None):
        return can_capture(model, torch.device("cuda"))

    monkeypatch.setattr(text, "_can_capture", as_on_a_gpu)
    return as_on_a_gpu


def test_captured_steps_give_the_text_of_generate(tokenizer, request):
    model = gateless_model()
    sampling, prompt = Sampling(max_new_tokens=20), "the quick brown fox"
    expected = generate_text(model, tokenizer, prompt, sampling)
    assert request.getfixturevalue("captures")(model)
    pieces = []
    generation = generate_text(model, tokenizer, prompt, sampling, pieces.append)
    assert generation.token_ids == expected.token_ids
    assert "".join(pieces) == generation.text == expected.text
    assert 0 < generation.seconds_to_first_token < generation.seconds


def test_captured_steps_end_where_the_text_ends(request):
    model = gateless_model()
    ids = generate_ids(model, PROMPT, Sampling(12)).token_ids
    request.getfixturevalue("captures")
    model.generation_config.eos_token_id = [96, ids[5]]
    generation = generate_ids(model, PROMPT, Sampling(12))
    end = ids.index(ids[5]) + 1
    assert (generation.token_ids, generation.finish_reason) == (ids[:end], "stop")


def test_captured_steps_draw_anew_each_time(captures):
    model = gateless_model()

    def drawn(seed):
        sampling = Sampling(30, temperature=3.0, top_k=60, seed=seed)
        return generate_ids(model, PROMPT, sampling).token_ids

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 5


def test_what_generate_does_besides_is_left_to_it(captures):
    model = tiny_model("llama")
    assert captures(model)
    model.generation_config.repetition_penalty = 1.3
    assert not captures(model)
    expected = greedy(model, torch.tensor([PROMPT]), 9)
    assert generate_ids(model, PROMPT, Sampling(9)).token_ids == expected[0].tolist()
    assert not captures(tiny_model("mistral", sliding_window=8))


def test_a_record_that_could_not_be_read_ends_the_text(model, captures, monkeypatch):
    """A step's error on a device is known with its token, which isn't told."""
    pieces = []

    def check():
        if len(pieces) == 3:
            raise TableError("Token 5 can't be read.")
        pieces.append(1)

    monkeypatch.setattr(model.expert_source, "check", check)
    with pytest.raises(TableError, match="can't be read"):
        generate_ids(model, PROMPT, Sampling(9))
    assert len(pieces) == 3


# ------------------------------------------------------------------------------- conversation


class Recorded:
    """Stands in for `generate_ids`: notes the prompts, answers by number."""

    def __init__(self) -> None:
        self.prompts = []

    def __call__(self, model, ids, sampling, *, tokenizer, on_text):
        self.prompts.append(tokenizer.decode(ids))
        answer = f"answer {len(self.prompts)}"
        return Generation([5], answer, "length", len(ids), 0.1, 0.2, None, "")


@pytest.fixture
def recorded(monkeypatch):
    from lookup_experts.generation import conversation

    recorded = Recorded()
    monkeypatch.setattr(conversation, "generate_ids", recorded)
    return recorded


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }} {% endfor %}"


def with_template(folder):
    loaded = load_tokenizer(folder)
    loaded.chat_template = TEMPLATE + "{% if add_generation_prompt %}<assistant>{% endif %}"
    return loaded


def test_turns_are_remembered_through_the_template(model, table_folder, recorded):
    conversation = Conversation(model, with_template(table_folder), Sampling(4))
    conversation.answer("the fox")
    conversation.answer("the dog")
    last = recorded.prompts[1].replace("<unk>", "")
    assert "the fox" in last and "the dog" in last
    assert len(recorded.prompts[1]) > len(recorded.prompts[0])


def test_without_a_template_turns_are_one_growing_text(model, table_folder, recorded):
    conversation = Conversation(model, load_tokenizer(table_folder), Sampling(4))
    conversation.answer("the fox")
    conversation.answer("the dog")
    assert recorded.prompts[0] == "the fox"
    assert recorded.prompts[1].startswith("the fox") and recorded.prompts[1].endswith("the dog")


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(model, table_folder, recorded):
    loaded = load_tokenizer(table_folder)
    conversation = Conversation(model, loaded, Sampling(40))
    for turn in ("the quick brown fox", "jumps over", "the lazy dog", "the fox .", "over the dog"):
        conversation.answer(turn)
        conversation.answer("x" * 10)
    for prompt in recorded.prompts:
        assert len(loaded(prompt)["input_ids"]) + 40 <= 128 + 8
    assert "the quick" not in recorded.prompts[-1]


def test_what_is_forgotten_is_said_and_an_answer_keeps_half_the_context_at_most(
    model, table_folder, recorded
):
    """However many tokens an answer may have, the turns before it stay while they fit."""
    said = []
    conversation = Conversation(model, load_tokenizer(table_folder), Sampling(4000), said.append)
    for number in range(6):
        conversation.answer(f"turn {number} of the fox")
    assert recorded.prompts[1].count("turn") == 2  # not dropped for the sake of 4,000 tokens
    assert 1 < recorded.prompts[-1].count("turn") < 6
    assert said and set(said) == {
        "The context of 128 tokens is full: the oldest turn is forgotten."
    }


def test_a_turn_is_never_cut(model, table_folder):
    conversation = Conversation(model, load_tokenizer(table_folder), Sampling(100))
    turn = "the quick brown fox " * 8
    ids = load_tokenizer(table_folder)(turn)["input_ids"]
    assert 28 < len(ids) < 128
    generation = conversation.answer(turn)
    assert (generation.prompt_tokens, len(generation.token_ids)) == (len(ids), 128 - len(ids))
    assert generation.finish_reason == "context"
    with pytest.raises(UserError, match=r"prompt has \d+ tokens and the model's context is 128"):
        conversation.answer("the quick brown fox " * 100)
    assert (
        conversation.answer("the fox").finish_reason == "length"
    )  # the long one is not remembered


def test_an_answer_is_real(model, table_folder):
    pieces = []
    conversation = Conversation(model, with_template(table_folder), Sampling(8))
    generation = conversation.answer("the fox", pieces.append)
    assert "".join(pieces) == generation.text

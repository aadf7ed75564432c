"""What is told of tokens: their own bytes, where they begin, and none that is not in the text."""

import json

import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizers import byte_fallback_tokenizer, writing_model, writing_tokenizer

from lookup_experts.serving.templates import PLAIN_TEMPLATE

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback"])
def client(request, make_client):
    """A random model: most of what it writes are parts of characters."""
    if request.param == "byte-level":
        tokenizer, model = writing_tokenizer(), writing_model()
    else:
        tokenizer = byte_fallback_tokenizer()
        model = tiny_model("llama", vocab_size=len(tokenizer) + 8, max_position_embeddings=2048)
    return make_client(model=model, tokenizer=tokenizer, chat_template=PLAIN_TEMPLATE)


def complete(client, **body):
    response = client.post(COMPLETIONS, json={"prompt": "the", "max_tokens": 60, **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def chat(client, **body):
    body = {"messages": [{"role": "user", "content": "the"}], "max_tokens": 60, **body}
    response = client.post(CHAT, json={"logprobs": True, **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def chunks(client, route, **body):
    response = client.post(route, json={"max_tokens": 60, "stream": True, **body})
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n")]
    return [json.loads(line)["choices"][0] for line in lines if line.startswith("{")]


@pytest.mark.parametrize("seed", range(5))
def test_bytes_joined_are_the_content(client, seed):
    choice = chat(client, seed=seed, top_logprobs=3)
    entries = choice["logprobs"]["content"]
    joined = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert joined.decode(errors="replace") == choice["message"]["content"]
    assert len(entries) == 60 or choice["finish_reason"] == "stop"
    assert any(entry["token"].startswith("bytes:") for entry in entries)
    for entry in entries:
        for told in (entry, *entry["top_logprobs"]):
            if told["bytes"] and not told["token"].startswith("bytes:"):
                assert bytes(told["bytes"]).decode() == told["token"]
        assert len(entry["top_logprobs"]) == 3
    pieces = chunks(
        client,
        CHAT,
        messages=[{"role": "user", "content": "the"}],
        seed=seed,
        logprobs=True,
        top_logprobs=3,
    )
    streamed = [
        one for piece in pieces if piece["logprobs"] for one in piece["logprobs"]["content"]
    ]
    assert streamed == entries


@pytest.mark.parametrize("echo", [True, False])
def test_offsets_are_places_in_the_text(client, echo):
    for seed in range(5):
        choice = complete(client, prompt="the fox 🦊", seed=seed, logprobs=1, echo=echo)
        text, told = choice["text"], choice["logprobs"]
        assert told["text_offset"][0] == 0
        assert told["text_offset"] == sorted(told["text_offset"])
        checked = 0
        for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
            if not token.startswith(("bytes:", "token_id:", "<", "[TOOL")):
                assert text[offset:].startswith(token)
                checked += 1
        assert checked


def test_tokens_with_equal_text_stay_apart(client):
    told = complete(client, seed=0, logprobs=20)["logprobs"]["top_logprobs"]
    assert all(len(top) == 20 for top in told)


def test_tokens_whose_bytes_are_the_same_stay_apart(make_client):
    """A byte and a letter; and two ids that no token has."""
    tokenizer = byte_fallback_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer) + 8)
    client = make_client(model=model, tokenizer=tokenizer)
    same = [tokenizer.convert_tokens_to_ids(name) for name in ("e", "<0x65>")]
    ids = [*same, len(tokenizer), len(tokenizer) + 1]
    scores = complete(client, prompt=[5], logprobs=20, max_tokens=1)
    assert len(scores["logprobs"]["top_logprobs"][0]) == 20
    from lookup_experts.serving.replies import CompletionReplies
    from lookup_experts.serving.sampling import TokenLogProbability

    replies = CompletionReplies("tiny", client.service.vocabulary, 4)
    row = replies._row(5, TokenLogProbability(5, -1.0, ids, [-1.0, -2.0, -3.0, -4.0]), 0, False)
    names = ["e", f"token_id:{same[1]}", f"token_id:{ids[2]}", f"token_id:{ids[3]}"]
    assert list(row.top) == names


def test_the_end_is_no_entry(make_client):
    tokenizer = writing_tokenizer()
    client = make_client(model=writing_model(), tokenizer=tokenizer, chat_template=PLAIN_TEMPLATE)
    ending = {"logit_bias": {"2": 12.0}, "seed": 0}  # the end comes soon
    choice = complete(client, logprobs=1, **ending)
    assert choice["finish_reason"] == "stop"
    assert "<|im_end|>" not in choice["logprobs"]["tokens"]
    answer = client.post(
        COMPLETIONS, json={"prompt": "the", "logprobs": 0, "max_tokens": 60, **ending}
    ).json()
    tokens = answer["choices"][0]["logprobs"]["tokens"]
    assert answer["usage"]["completion_tokens"] == len(tokens) + 1
    choice = chat(client, **ending)
    assert choice["finish_reason"] == "stop"
    joined = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    assert joined.decode(errors="replace") == choice["message"]["content"]
    pieces = chunks(client, COMPLETIONS, prompt="the", logprobs=0, **ending)
    assert [
        one for piece in pieces for one in (piece["logprobs"] or {}).get("tokens", ())
    ] == tokens


def test_what_a_stop_string_cuts_off_is_no_entry(client):
    whole = complete(client, seed=1, logprobs=0)
    text, told = whole["text"], whole["logprobs"]
    for size in (2, 4):
        for place in range(5, len(text) - size, 7):
            stop = text[place : place + size]
            body = {"seed": 1, "logprobs": 0, "stop": stop}
            cut = complete(client, **body)
            assert cut["text"] == text[: text.index(stop)]
            number = sum(offset < len(cut["text"]) for offset in told["text_offset"])
            tokens = cut["logprobs"]["tokens"]
            assert tokens == told["tokens"][: len(tokens)]
            # Those without characters of their own before the cut may be there, or not.
            assert number <= len(tokens)
            assert all(offset <= len(cut["text"]) for offset in cut["logprobs"]["text_offset"])
            pieces = chunks(client, COMPLETIONS, prompt="the", **body)
            streamed = [
                one for piece in pieces for one in (piece["logprobs"] or {}).get("tokens", ())
            ]
            assert streamed == tokens
            assert "".join(piece["text"] for piece in pieces) == cut["text"]


def test_special_tokens_leave_no_holes(make_client):
    """Tokens without text, however many, and then a character of several tokens."""
    tokenizer = writing_tokenizer()
    client = make_client(model=writing_model(), tokenizer=tokenizer)
    ids = [tokenizer.convert_tokens_to_ids("<|im_start|>")] * 12 + tokenizer("🦊")["input_ids"]
    script = iter(ids * 2)
    chooser = "lookup_experts.serving.engine.choose"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            chooser, lambda logits, choosers: torch.tensor([next(script) for _ in choosers])
        )
        whole = complete(client, max_tokens=len(ids), logprobs=0)
        pieces = chunks(client, COMPLETIONS, prompt="the", max_tokens=len(ids))
    assert whole["text"] == "".join(piece["text"] for piece in pieces) == "🦊"
    assert whole["logprobs"]["text_offset"] == [0] * len(ids)


# --------------------------------------------------------------------------------- other ends


def test_a_stop_string_that_is_a_special_token(make_client):
    client = make_client(model=writing_model(), tokenizer=writing_tokenizer())
    body = {"seed": 0, "logit_bias": {"3": 12.0}, "max_tokens": 60}
    assert complete(client, **body)["finish_reason"] == "length"
    for stop in (
        {"stop": "[TOOL_CALLS]"},
        {"stop_token_ids": [3]},
        {"stop": ["zzz", "[TOOL_CALLS]"]},
    ):
        choice = complete(client, **body, **stop)
        assert choice["finish_reason"] == "stop"
        assert complete(client, **body)["text"].startswith(choice["text"])


def test_the_end_can_be_ignored_or_put_off(make_client):
    client = make_client(model=writing_model(), tokenizer=writing_tokenizer())
    body = {"seed": 0, "logit_bias": {"2": 40.0}, "max_tokens": 20}

    def usage(**more):
        answer = client.post(COMPLETIONS, json={"prompt": "the", **body, **more}).json()
        reason = answer["choices"][0]["finish_reason"]
        return answer["usage"]["completion_tokens"], reason

    assert usage() == (1, "stop")
    assert usage(ignore_eos=True) == (20, "length")
    assert usage(min_tokens=7) == (8, "stop")
    assert usage(min_tokens=20) == (20, "length")
    assert usage(ignore_eos=True, min_tokens=5, stop_token_ids=[2]) == (6, "stop")
    text = complete(client, seed=0, max_tokens=20)["text"]
    stop = {"seed": 0, "max_tokens": 20, "stop": text[1:3]}
    assert complete(client, **stop)["text"] == text[: text.index(text[1:3])]
    assert len(complete(client, **stop, min_tokens=10)["text"]) > len(text[: text.index(text[1:3])])


def test_the_model_s_own_sampling_is_the_default(make_client):
    model = writing_model()
    model.generation_config.update(do_sample=True, temperature=0.5, top_k=4, top_p=0.9)
    model.generation_config.update(repetition_penalty=1.2, min_p=0.01)
    own = make_client(model=model, tokenizer=writing_tokenizer())
    plain = make_client(model=writing_model(), tokenizer=writing_tokenizer())
    said = {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "repetition_penalty": 1.2, "min_p": 0.01}
    for seed in range(3):
        assert complete(own, seed=seed)["text"] == complete(plain, seed=seed, **said)["text"]
        assert complete(own, seed=seed)["text"] != complete(plain, seed=seed)["text"]
        neutral = {"temperature": 1, "top_k": -1, "top_p": 1, "repetition_penalty": 1, "min_p": 0}
        assert complete(own, seed=seed, **neutral)["text"] == complete(plain, seed=seed)["text"]
    assert str(own.service.defaults) == (
        "temperature 0.5, top_p 0.9, top_k 4, min_p 0.01, repetition_penalty 1.2"
    )
    assert str(plain.service.defaults) == ""
    model.generation_config.do_sample = False
    greedy = make_client(model=model, tokenizer=writing_tokenizer())
    assert complete(greedy, seed=1)["text"] == complete(greedy, seed=2)["text"]

"""One backbone with several tables behind one server: each request is answered with its own."""

import shutil
import threading

import httpx
import pytest
import torch
from run_command import run_command
from served_sequences import Bench
from server_process import Server
from tables_of_a_backbone import fold
from tiny_models import greedy_reference, tiny_model, token_ids

import lookup_experts as le
from lookup_experts.errors import UserError
from lookup_experts.serving.sequence import Failed, GenerationRequest
from lookup_experts.table.opening import open_table

openai = pytest.importorskip("openai", reason="the client tests need the openai package")

NAMES = (None, "novels", "code", "law", "tales")
LENGTHS = (5, 30, 2, 11, 64, 7, 19, 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with a backbone and tables of it, of which two are alike."""
    place = tmp_path_factory.mktemp("tables")
    tiny_model("llama").save_pretrained(place / "backbone")
    tokenizer.save_pretrained(place / "backbone")
    fold(place / "backbone", place / "novels", 1, num_experts=4, row_size=8)
    fold(place / "backbone", place / "code", 2, num_experts=2, layers="0,2")
    fold(place / "backbone", place / "law", 3, form="meki", row_size=16)
    fold(place / "backbone", place / "tales", 4, num_experts=4, row_size=8)
    return place


def load(place, **options):
    tables = {name: place / name for name in NAMES if name is not None}
    return le.load(place / "backbone", tables=tables, **options)


@pytest.fixture(scope="module")
def alone(place):
    """Greedy ids after a prompt, with a table alone: (name, prompt, number)."""
    models = {name: le.load(place / (name or "backbone")) for name in NAMES}
    return lambda name, prompt, number: greedy_reference(
        models[name], torch.tensor([prompt]), number
    )[0].tolist()


@pytest.mark.parametrize("store", ["memory", "direct"])
def test_each_text_in_any_company(place, alone, store):
    """They come while others run, and leave before them."""
    prompts = [token_ids(length, seed=length).tolist() for length in LENGTHS]
    names = [NAMES[number % len(NAMES)] for number in range(len(prompts))]
    model = load(place, store=store, cache="20kB")
    with Bench(model, max_batch=5) as bench:
        collected = []
        for number, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
            request = GenerationRequest(prompt, 6 + 3 * number, table=name)
            collected += bench.submit(request)
            collected[-1].first.wait(30)
        done = [one.wait() for one in collected]
    for number, (one, prompt, name) in enumerate(zip(done, prompts, names, strict=True)):
        assert one.ids == alone(name, prompt, 6 + 3 * number)


def test_what_experts_did_is_told_of_the_texts_own(place):
    prompt = token_ids(6).tolist()
    shapes = {None: None, "novels": [4, 4, 4], "code": [2, 2], "law": None, "tales": [4, 4, 4]}
    with Bench(load(place, store="direct")) as bench:
        requests = [
            GenerationRequest(prompt, 5, lookup_details=True, table=name) for name in shapes
        ]
        done = bench.run(*requests)
    for one, (name, shape) in zip(done, shapes.items(), strict=True):
        assert len(one.tokens) == 5
        for token in one.tokens:
            weights = token.lookup.weights
            assert (weights and [len(layer) for layer in weights]) == shape
            assert all(sum(layer) == pytest.approx(1, abs=1e-3) for layer in weights or ())
            assert (token.lookup.cache_hit is None) == (name is None)


def test_a_damaged_record_ends_the_texts_of_its_table_alone(place, alone, tmp_path):
    """Also not those of a table that is read together with it."""
    prompt = token_ids(7, seed=4).tolist()
    bad = alone("novels", prompt, 12)[6]
    shutil.copytree(place / "novels", tmp_path / "novels")
    table = open_table(tmp_path / "novels" / "table")
    with table.path(table.shards[0]).open("r+b") as file:
        file.seek(table.layout.record_offset(bad) + 5)
        file.write(b"\xff\xff\xff")
    tables = {name: place / name for name in NAMES if name} | {"novels": tmp_path / "novels"}
    model = le.load(place / "backbone", tables=tables, store="direct", verify_checksums=True)
    assert model.source_by_table.groups[0].tables == ("novels", "tales")
    with Bench(model) as bench:
        requests = [GenerationRequest(prompt, 12, table=name) for name in NAMES]
        done = bench.run(*requests)
    for one, name in zip(done, NAMES, strict=True):
        if name == "novels":
            assert isinstance(one.end, Failed) and one.end.code == "table_error"
            assert f"the record of id {bad} is damaged" in one.end.message
            assert str(tmp_path / "novels") in one.end.message
        else:
            assert one.ids == alone(name, prompt, 12)


# --- the real server ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(place):
    tables = [option for name in NAMES[1:] for option in ("--table", f"{name}={place / name}")]
    options = ("--store", "direct", "--cache", "30kB", "--dtype", "float32", "--max-batch", 8)
    with Server(place / "backbone", *tables, *options) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60)


def test_all_names_are_listed(client):
    names = [one.id for one in client.models.list()]
    assert names == ["backbone", "backbone:novels", *(f"backbone:{name}" for name in NAMES[2:])]
    assert client.models.retrieve("backbone:code").id == "backbone:code"


def test_a_name_that_is_not_there(client):
    with pytest.raises(openai.NotFoundError, match="'backbone:poems' is not served here; this"):
        client.completions.create(model="backbone:poems", prompt="the fox")
    with pytest.raises(openai.NotFoundError, match="'novels' is not served here"):
        client.models.retrieve("novels")


def test_answers_to_many_at_once(server, client, alone, tokenizer):
    """Each as with its table alone, and under the name that was asked for."""
    prompt = tokenizer("the quick brown fox")["input_ids"]
    answers: dict[tuple[str | None, int], tuple[str, str]] = {}

    def ask(name, number):
        model = "backbone" if name is None else f"backbone:{name}"
        stream = client.completions.create(
            model=model, prompt=prompt, max_tokens=10 + number, temperature=0, stream=True
        )
        chunks = list(stream)
        assert {chunk.model for chunk in chunks} == {model}
        text = "".join(chunk.choices[0].text for chunk in chunks)
        answers[name, number] = text

    threads = [
        threading.Thread(target=ask, args=(name, number)) for name in NAMES for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == len(threads)
    for (name, number), text in answers.items():
        ids = alone(name, prompt, 10 + number)
        assert text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert len({answers[name, 3] for name in NAMES}) > 2


def test_without_a_name_it_is_the_backbone(server, alone, tokenizer):
    prompt = tokenizer("the dog")["input_ids"]
    body = {"prompt": prompt, "max_tokens": 6, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    assert answer["model"] == "backbone"
    expected = tokenizer.decode(alone(None, prompt, 6), clean_up_tokenization_spaces=False)
    assert answer["choices"][0]["text"] == expected


def test_what_it_tells_of_itself(server):
    stats = httpx.get(f"{server.url}/v1/stats").json()
    assert stats["kind"] == "dense" and stats["store"] == "direct"
    assert stats["record_bytes"] is None and stats["row_size"] is None
    assert {
        name: (one["experts"], one["row_size"], one["router"])
        for name, one in stats["tables"].items()
    } == {
        "novels": (4, 8, True),
        "code": (2, 32, True),
        "law": (1, 16, False),
        "tales": (4, 8, True),
    }
    assert stats["tables"]["novels"]["record_bytes"] == 3 * 4 * 8 * 4
    assert stats["ids_asked"] > 0
    assert "mole_table_ids_asked" in httpx.get(f"{server.url}/metrics").text


# --- what won't do ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["novels"], "--table novels should be like novels=out/"),
        (["=novels"], "--table =novels should be like"),
        (["novels="], "--table novels= should be like"),
        (["a=x", "a=y"], "--table a=y: a is x already"),
        (["a.b={place}/novels"], "A table can't be called 'a.b'"),
        (["novels={place}/nothing"], "No such folder"),
        (["novels={place}/backbone"], "has no lookup experts"),
    ],
)
def test_the_command_says_what_is_wrong(place, capsys, given, said):
    words = [option for one in given for option in ("--table", one.format(place=place))]
    code, out, err = run_command(capsys, "serve", place / "backbone", "--port", 0, *words)
    assert code == 2
    assert out == ""
    assert said in err.strip().splitlines()[-1]
    assert "Traceback" not in err


def test_tables_of_different_backbones(place, tmp_path, tokenizer, capsys):
    tiny_model("llama", seed=7).save_pretrained(tmp_path / "other")
    fold(tmp_path / "other", tmp_path / "poems", 1, num_experts=2)
    words = ("--table", f"novels={place / 'novels'}", "--table", f"poems={tmp_path / 'poems'}")
    code, _, err = run_command(capsys, "serve", place / "backbone", "--port", 0, *words)
    assert code == 2
    assert "Table poems: " in err and "another backbone than the one in" in err
    with pytest.raises(UserError, match="another backbone"):
        le.load(tmp_path / "other", tables={"novels": place / "novels"})

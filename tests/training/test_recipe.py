"""Recipes: what is accepted, what is refused and in which words."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import tiny_recipe

from lookup_experts.errors import UserError
from lookup_experts.training.recipe import Recipe, load_recipe, recipe_names

PAPER = {"160m": (12, 768, 12), "410m": (24, 1024, 16), "1b": (16, 2048, 8)}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny_recipe({"num_experts": 2}).to_yaml())
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert str(path) in message
    return message


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_survives_being_saved(name: str) -> None:
    recipe = load_recipe(name)
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("name", [n for n in recipe_names() if n.split("-")[1] in PAPER])
def test_the_papers_recipes_state_its_setup(name: str) -> None:
    kind, shape, *experts = name.split("-")
    recipe = load_recipe(name)
    model, training = recipe.model, recipe.training
    assert (model.num_layers, model.hidden_size, model.num_heads) == PAPER[shape]
    assert (model.ffn_size, model.vocab_size, model.init_std) == (
        4 * model.hidden_size,
        50304,
        0.01,
    )
    assert (training.tokens, training.num_steps) == (100_000_000_000, 47_684)
    assert (training.context_length, training.sequences_per_step) == (2048, 1024)
    assert training.learning_rate == (6e-4 if shape == "160m" else 3e-4)
    assert (training.betas, training.weight_decay, training.clip) == ((0.9, 0.95), 0.1, 1.0)
    assert (training.min_lr_ratio, training.warmup_fraction) == (0.1, 0.01)
    assert training.precision == "bf16"
    if kind == "dense":
        assert model.experts is model.moe is None
    elif kind == "moe":
        assert model.moe is not None
        assert f"{model.moe.num_experts}e" == experts[0]
        assert (model.moe.experts_per_token, model.moe.size) == (2, model.ffn_size // 2)
        assert (model.moe.load_balance_loss, model.moe.z_loss) == (0.01, 0.001)
        assert (model.experts, model.moe.shared_size) == (None, None)
    else:
        assert model.experts is not None
        assert f"{model.experts.num_experts}e" == experts[0]
        assert (model.experts.size, model.experts.layers) == (None, None)


def test_a_bare_name_that_is_unknown_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'mole-160m-4e'"):
        load_recipe("mole-160-4e")


@pytest.mark.parametrize("name", ["nowhere.yaml", "no/where"])
def test_a_path_that_does_not_exist(name: str) -> None:
    with pytest.raises(UserError, match="No recipe file"):
        load_recipe(name)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("content", ["a: [1, 2", "", "- a\n- b", "just words"])
def test_a_file_that_is_no_mapping(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)
    refused(path)


def test_a_binary_file_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "no YAML" in refused(path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learning_rat=1", "training.learning_rate"),
        ("training.steps=many", "training.steps is 'many'; expected a whole number"),
        ("training.steps=1.5", "training.steps is 1.5; expected a whole number"),
        ("training.steps=0", "training.steps is 0; expected a number above 0"),
        ("training.steps=true", "training.steps is True; expected a whole number"),
        ("training.learning_rate=.nan", "expected a number above 0"),
        ("training.learning_rate=.inf", "expected a number above 0"),
        ("training.learning_rate=-1", "expected a number above 0"),
        ("training.gradient_checkpointing=1", "expected true or false"),
        ("training.betas=0.9", "expected a list of 2 numbers"),
        ("training.betas=[0.9, 1]", "training.betas is 1.0"),
        ("training.betas=[0.9, x]", "training.betas is 'x'"),
        ("training.min_lr_ratio=2", "a number from 0 to 1"),
        ("training.seed=-1", "at least 0"),
        ("training.context_length=1", "at least 2"),
        ("training.precision=bf8", "Did you mean 'bf16'"),
        ("training.sequences_per_micro_batch=3", "a divisor of sequences_per_step 4"),
        ("model.num_heads=3", "cuts hidden_size 32"),
        ("model.num_heads=32", "heads of even size"),
        ("model.shape=160", "Did you mean '160m'"),
        ("model.hidden_size=null", "model.hidden_size is None"),
        ("model.experts=4", "model.experts should be a section"),
        ("model.experts.num_experts=0", "model.experts.num_experts is 0"),
        ("model.experts.kind=relu", "gelu"),
        ("model.experts.layers=[0, 2]", "blocks from 0 to 1"),
        ("model.experts.size=0", "model.experts.size is 0"),
        ("model.experts.num_experts=null", "model.experts.num_experts is missing"),
        ("model.experts.row_size=0", "model.experts.row_size is 0; expected a number above 0"),
        ("model.experts.row_size=1.5", "model.experts.row_size is 1.5; expected a whole number"),
        ("model.experts.form=mekki", "Did you mean 'meki'"),
        ("model.experts={form: meki, num_experts: 1}", "num_experts is 1, but the form 'meki' has"),
        ("model.experts={form: meki, kind: gelu}", "computes its rows by 'swiglu'; leave the key"),
        ("model.experts={form: meki, z_loss: 0.1}", "z_loss is 0.1, but the form 'meki' has no"),
        ("model.experts.z_loss=-1", "model.experts.z_loss is -1.0; expected a number of at least"),
        ("model.moe.num_experts=4", "both model.experts and model.moe"),
        ("model.moe={num_experts: 4, experts_per_token: 5}", "at most num_experts 4"),
        ("model.moe={num_experts: 4, experts_per_token: 0}", "model.moe.experts_per_token is 0"),
        ("model.moe={num_experts: 4, z_loss: .inf}", "model.moe.z_loss is inf"),
        ("model.moe={num_experts: 4, shared_size: 0}", "model.moe.shared_size is 0"),
        ("model.moe.experts_per_token=2", "model.moe.num_experts is missing"),
        ("model.vocab_size=0", "model.vocab_size is 0"),
        ("mdel.vocab_size=1", "Did you mean 'model'"),
        ("training=3", "training should be a section"),
        ("training.steps", "should be key=value"),
        (".steps=3", "should be key=value"),
        ("training.steps.more=3", "steps is no section"),
        ("training.betas=[1", "no YAML value"),
    ],
)
def test_what_is_refused_and_how(recipe_file: Path, override: str, words: str) -> None:
    message = refused(recipe_file, override)
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize("key", ["learning_rate", "context_length", "steps"])
def test_a_required_key_that_is_missing(recipe_file: Path, key: str) -> None:
    values = yaml.safe_load(recipe_file.read_text())
    del values["training"][key]
    recipe_file.write_text(yaml.safe_dump(values))
    assert key in refused(recipe_file)


def test_sizes_or_a_shape_are_required(recipe_file: Path) -> None:
    values = yaml.safe_load(recipe_file.read_text())
    del values["model"]["num_layers"]
    recipe_file.write_text(yaml.safe_dump(values))
    assert "model.num_layers (or shape) is missing" in refused(recipe_file)


def test_tokens_and_steps_in_one_file_contradict(recipe_file: Path) -> None:
    values = yaml.safe_load(recipe_file.read_text())
    values["training"]["tokens"] = 1000
    recipe_file.write_text(yaml.safe_dump(values))
    assert "either tokens or steps" in refused(recipe_file)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.learning_rate=1e-3", 1e-3),
        ("training.learning_rate=1", 1.0),
        ("training.learning_rate=2E-03", 2e-3),
        ("training.sequences_per_step=1e1", 10),
        ("training.betas=[0.5, 0.75]", (0.5, 0.75)),
        ("training.gradient_checkpointing=true", True),
        ("model.experts.layers=[1]", (1,)),
        ("model.experts=null", None),
    ],
)
def test_overrides_are_yaml_values(recipe_file: Path, override: str, value: Any) -> None:
    found: Any = load_recipe(recipe_file, [override])
    for name in override.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_setting_steps_replaces_tokens_and_the_other_way_round() -> None:
    assert load_recipe("dense-160m", ["training.steps=7"]).training.num_steps == 7
    longer = load_recipe("dense-tiny", ["training.tokens=6145"]).training
    assert (longer.steps, longer.num_steps) == (None, 2)  # 6,144 tokens per step


def test_sizes_beside_a_shape_take_precedence() -> None:
    model = load_recipe("dense-160m", ["model.shape=410M", "model.num_layers=2"]).model
    assert (model.hidden_size, model.num_layers, model.ffn_size) == (1024, 2, 4096)


def test_experts_can_be_added_to_a_dense_recipe() -> None:
    experts = load_recipe("dense-tiny", ["model.experts.num_experts=3"]).model.experts
    assert experts is not None
    assert experts.num_experts == 3


def test_a_form_of_rows_is_set_on_the_command_line(recipe_file: Path) -> None:
    """It settles what the file says of another form's experts, and nothing else that was given."""
    set_form = "model.experts.form=meki"
    for recipe in (recipe_file, "dense-tiny"):
        for overrides in ([set_form, "model.experts.row_size=8"], [set_form]):
            experts = load_recipe(recipe, overrides).model.experts
            assert experts is not None
            assert (experts.form, experts.kind, experts.num_experts) == ("meki", "swiglu", None)
            assert (experts.num_rows, experts.row_size) == (1, 8 if len(overrides) > 1 else None)
    for overrides in (
        ["model.experts.num_experts=2", set_form],
        [set_form, "model.experts.num_experts=2"],
    ):
        assert "no experts to count; leave the key out" in refused(recipe_file, *overrides)
    same = load_recipe(recipe_file, ["model.experts.form=mole"]).model.experts
    assert same is not None and same.num_experts == 2


@pytest.mark.parametrize("experts", [{"form": "meki", "row_size": 8}, {"num_experts": 2}])
def test_every_form_survives_being_saved(experts: dict[str, Any]) -> None:
    recipe = tiny_recipe(experts)
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


@settings(deadline=None)  # a busy machine takes its time
@given(
    learning_rate=st.floats(1e-9, 10),
    steps=st.integers(1, 10**12),
    micro=st.integers(1, 64),
    accumulated=st.integers(1, 64),
    layers=st.none() | st.lists(st.integers(0, 1), max_size=3),
)
def test_any_recipe_survives_being_saved(
    learning_rate: float, steps: int, micro: int, accumulated: int, layers: list[int] | None
) -> None:
    recipe = tiny_recipe(
        {"num_experts": 2, "layers": layers},
        learning_rate=learning_rate,
        steps=steps,
        sequences_per_micro_batch=micro,
        sequences_per_step=micro * accumulated,
    )
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe

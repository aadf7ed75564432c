"""Recipes: everything that decides a training run, in one small YAML file.

    model:                      # the backbone; `experts` adds lookup experts, `moe` others
      shape: 160m
      experts: {num_experts: 4}
    training:
      context_length: 2048
      tokens: 100e9
      ...

The fields of the dataclasses below are the keys of the file. Checks that need no data happen when
a recipe is read. `models.py` turns one into a model, `train.py` into a trained one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, TypeVar, get_args, get_origin, get_type_hints, overload

import yaml  # type: ignore[import-untyped]

from lookup_experts.errors import UserError, unknown_name
from lookup_experts.model.expert_products import EXPERT_KINDS
from lookup_experts.model.gateless_llama import SHAPES

PRECISIONS = ("bf16", "fp32")
SUFFIX = ".yaml"
# Two ways to say how long to train: setting one of them on the command line replaces the other.
LENGTHS = ("tokens", "steps")
# The section that says what is trained -> the command that the recipe is for.
COMMANDS = {"model": "mole train", "backbone": "mole upcycle"}


@dataclass(frozen=True)
class ExpertsRecipe:
    """The routed experts of every layer."""

    num_experts: int
    """Experts per layer."""
    kind: str = "gelu"
    """`gelu`, the paper's expert, or `swiglu`."""
    size: int | None = None
    """The hidden size of each expert; default: that of the backbone's FFN."""
    layers: tuple[int, ...] | None = None
    """The blocks that have experts; default: all."""
    load_balance_loss: float = 0.0
    """Coefficient of the router's load-balance loss; the paper trains without."""
    z_loss: float = 0.0
    """Coefficient of the router's z-loss; the paper trains without."""

    def __post_init__(self) -> None:
        _require_positive("model.experts", self, "num_experts")
        _require_not_negative("model.experts", self, "load_balance_loss", "z_loss")
        if self.kind not in EXPERT_KINDS:
            raise unknown_name("value of model.experts.kind", self.kind, EXPERT_KINDS)
        if self.size is not None:
            _require_positive("model.experts", self, "size")


@dataclass(frozen=True)
class MoeRecipe:
    """A mixture of experts on the hidden state in every block, in place of its FFN."""

    num_experts: int
    """Experts per layer."""
    experts_per_token: int = 2
    """How many of them a router selects."""
    size: int | None = None
    """The hidden size of each expert; default: half of the backbone's FFN."""
    shared_size: int | None = None
    """The hidden size of an expert that every token uses; default: there is none."""
    load_balance_loss: float = 0.01
    """Coefficient of the router's load-balance loss."""
    z_loss: float = 0.001
    """Coefficient of the router's z-loss."""

    def __post_init__(self) -> None:
        _require_positive("model.moe", self, "num_experts", "experts_per_token")
        _require_not_negative("model.moe", self, "load_balance_loss", "z_loss")
        for name in ("size", "shared_size"):
            if getattr(self, name) is not None:
                _require_positive("model.moe", self, name)
        _require(
            self.experts_per_token <= self.num_experts,
            "model.moe.experts_per_token",
            self.experts_per_token,
            f"at most num_experts {self.num_experts}",
        )


@dataclass(frozen=True)
class ModelRecipe:
    """The backbone: the paper's, Llama's attention and norms with a gate-less FFN.

    In a file, `shape: 160m` (or 410m, 1b) stands for the sizes of the paper's model; sizes that
    are given beside it take precedence.
    """

    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Blocks."""
    num_heads: int
    """Attention heads per block."""
    ffn_size: int
    """Hidden size of each block's FFN."""
    init_std: float = 0.01
    """Standard deviation of the weights before training."""
    vocab_size: int | None = None
    """Rows of the embedding; default: the tokenizer's size, rounded up to a multiple of 64."""
    experts: ExpertsRecipe | None = None
    """Lookup experts; without them the model is dense."""
    moe: MoeRecipe | None = None
    """A mixture of experts in place of the FFNs; either this or `experts`."""

    def __post_init__(self) -> None:
        _require_positive(
            "model", self, "hidden_size", "num_layers", "num_heads", "ffn_size", "init_std"
        )
        _require(
            # Rotary embeddings turn the dimensions of a head in pairs.
            self.hidden_size % (2 * self.num_heads) == 0,
            "model.num_heads",
            self.num_heads,
            f"a number of heads that cuts hidden_size {self.hidden_size} into heads of even size",
        )
        if self.vocab_size is not None:
            _require_positive("model", self, "vocab_size")
        if self.experts is not None and self.moe is not None:
            raise UserError(
                "The recipe has both model.experts and model.moe; expected one of them. "
                "Set the other to null."
            )
        for layer in (self.experts and self.experts.layers) or ():
            _require(
                0 <= layer < self.num_layers,
                "model.experts.layers",
                layer,
                f"blocks from 0 to {self.num_layers - 1}",
            )


@dataclass(frozen=True)
class TrainingRecipe:
    """How the model is trained: AdamW, a cosine schedule with a warm-up, clipped gradients."""

    context_length: int
    """Tokens per sequence."""
    sequences_per_step: int
    """Sequences per optimizer step, all processes and micro batches together."""
    sequences_per_micro_batch: int
    """Sequences that one device computes at once; the smaller, the less memory is needed."""
    learning_rate: float
    """Its peak, at the end of the warm-up."""
    tokens: int | None = None
    """Tokens to train on, rounded up to whole steps; either this or `steps`."""
    steps: int | None = None
    """Optimizer steps; either this or `tokens`."""
    min_lr_ratio: float = 0.1
    """The last learning rate as a part of the peak."""
    warmup_fraction: float = 0.01
    """The part of all steps in which the learning rate rises."""
    weight_decay: float = 0.1
    """On matrices; embeddings and norms have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    clip: float = 1.0
    """The largest norm of the gradient."""
    precision: str = "bf16"
    """`bf16`: autocast to bfloat16 over float32 master weights, on CPU too. `fp32`: float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    share_expert_outputs: bool = False
    """Evaluate the routed experts once per step, not once per micro batch: less time, the same
    gradients, and their outputs over the whole step are held in memory. Not under FSDP."""
    seed: int = 0
    """Decides the weights before training and the order of the data."""
    log_every: int = 10
    """Steps between two lines of history.jsonl."""
    validate_every: int = 1000
    """Steps between two validations; there is always one at the end."""
    validate_sequences: int = 512
    """Sequences per validation, spread evenly over the held-out text."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; there is always one at the end."""
    keep_checkpoints: int = 2
    """The latest checkpoints that are kept."""

    def __post_init__(self) -> None:
        _require(
            (self.tokens is None) != (self.steps is None),
            "training",
            {"tokens": self.tokens, "steps": self.steps},
            "either tokens or steps",
        )
        _require_positive(
            "training",
            self,
            *("context_length", "sequences_per_step", "sequences_per_micro_batch"),
            *("learning_rate", "tokens" if self.steps is None else "steps", "clip"),
            *("log_every", "validate_every", "validate_sequences"),
            *("checkpoint_every", "keep_checkpoints"),
        )
        # A context of one token has nothing to predict.
        _require(self.context_length > 1, "training.context_length", 1, "at least 2")
        _require(
            self.sequences_per_step % self.sequences_per_micro_batch == 0,
            "training.sequences_per_micro_batch",
            self.sequences_per_micro_batch,
            f"a divisor of sequences_per_step {self.sequences_per_step}",
        )
        for name in ("min_lr_ratio", "warmup_fraction"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"training.{name}", value, "a number from 0 to 1")
        for beta in self.betas:
            _require(0 <= beta < 1, "training.betas", beta, "numbers from 0 to below 1")
        _require_not_negative("training", self, "weight_decay", "seed")
        if self.precision not in PRECISIONS:
            raise unknown_name("value of training.precision", self.precision, PRECISIONS)

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.context_length

    @property
    def num_sequences(self) -> int:
        """Of the whole run."""
        return self.num_steps * self.sequences_per_step

    @property
    def num_steps(self) -> int:
        """Optimizer steps, whichever way the length is given."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // self.tokens_per_step)


class RecipeFile:
    """What a recipe is, whichever command it is for: sections of a file, `training` among them."""

    training: TrainingRecipe
    subject: ClassVar[str]
    """The section that says what is trained; one of `COMMANDS`."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the content of a recipe file; the error for a bad key or value names it."""
        return _read_section(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """As plain YAML values, without the keys that are left to their default None."""
        return _plain(asdict(self))  # type: ignore[call-overload]

    def to_yaml(self) -> str:
        return str(yaml.safe_dump(self.to_dict(), sort_keys=False))

    @property
    def backbone_learning_rate(self) -> float | None:
        """The peak of the backbone's own learning rate; None: that of everything else."""
        return None


@dataclass(frozen=True)
class Recipe(RecipeFile):
    """A model and how it is trained."""

    model: ModelRecipe
    training: TrainingRecipe

    subject = "model"

    def __post_init__(self) -> None:
        require_experts_to_share(self.training, self.model.experts)


def require_experts_to_share(training: TrainingRecipe, experts: ExpertsRecipe | None) -> None:
    """Refuse to share the outputs of lookup experts that aren't there."""
    if training.share_expert_outputs and experts is None:
        raise UserError(
            "training.share_expert_outputs is true, but the recipe has no lookup experts whose "
            "outputs could be shared. Give it some, or set it to false."
        )


AnyRecipe = TypeVar("AnyRecipe", bound=RecipeFile)


@overload
def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe: ...
@overload
def load_recipe(
    name: str | Path, overrides: Sequence[str] = (), *, kind: type[AnyRecipe]
) -> AnyRecipe: ...
def load_recipe(
    name: str | Path, overrides: Sequence[str] = (), *, kind: type[RecipeFile] = Recipe
) -> RecipeFile:
    """The recipe in a file, or of a bare name such as `mole-160m-4e`.

    Args:
        name: a path, or the name of a recipe that comes with the package.
        overrides: `key=value` with a dotted key and a YAML value: `training.learning_rate=1e-3`.
        kind: the class of the recipe: `Recipe`, or that of another command.
    """
    path = find_recipe(name, kind)
    values = _read_yaml(path)
    for subject, command in COMMANDS.items():
        if subject in values and subject != kind.subject:
            wanted = COMMANDS[kind.subject]
            raise UserError(f"{path} is a recipe for `{command}`; `{wanted}` can't take it.")
    try:
        for override in overrides:
            _set(values, override)
        return kind.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def find_recipe(name: str | Path, kind: type[RecipeFile] = Recipe) -> Path:
    """The file of a recipe that is given by its path or its bare name."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a recipe file or the name of a recipe.")
    if path.suffix or len(path.parts) > 1:
        raise UserError(
            f"No recipe file {path}. Give a YAML file, or a name: {', '.join(recipe_names(kind))}."
        )
    found = _recipes_folder() / f"{name}{SUFFIX}"
    if not found.is_file():
        raise unknown_name("recipe", str(name), recipe_names(kind))
    return found


def recipe_names(kind: type[RecipeFile] = Recipe) -> list[str]:
    """The recipes of a kind that come with the package."""
    has_subject = re.compile(rf"^{kind.subject}:", re.MULTILINE)
    paths = _recipes_folder().glob(f"*{SUFFIX}")
    return sorted(path.stem for path in paths if has_subject.search(path.read_text("utf-8")))


def _recipes_folder() -> Path:
    """Inside the package where it was installed, at the top of the repository where it was not."""
    package = Path(str(files("lookup_experts")))
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 6e-4 is one. YAML 1.1, which PyYAML follows, takes it for a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+"),
    list("-+0123456789"),
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML file: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} should hold the keys model and training; it doesn't.")
    return values


def _set(values: dict[str, Any], override: str) -> None:
    """Apply one `key=value` to the content of a recipe file."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"--set {override!r} should be key=value, like training.steps=100.")
    section = values
    for name in path[:-1]:
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            raise UserError(f"--set {override!r}: {name} is no section of the recipe.")
    if path[0] == "training" and path[-1] in LENGTHS:
        for name in LENGTHS:
            section.pop(name, None)
    try:
        section[path[-1]] = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise UserError(f"--set {override!r}: {text!r} is no YAML value.") from None


def _expand_shape(values: Mapping[str, Any]) -> dict[str, Any]:
    """`shape` replaced by the sizes it stands for."""
    rest = dict(values)
    shape = rest.pop("shape", None)
    if shape is None:
        return rest
    if str(shape).lower() not in SHAPES:
        raise unknown_name("value of model.shape", str(shape), SHAPES)
    sizes = SHAPES[str(shape).lower()]
    return {
        "hidden_size": sizes["hidden_size"],
        "num_layers": sizes["num_hidden_layers"],
        "num_heads": sizes["num_attention_heads"],
        "ffn_size": 4 * sizes["hidden_size"],
        **rest,
    }


def _read_section(section: Any, values: Any, where: str) -> Any:
    """A dataclass from the mapping of a recipe file; `where` is its dotted key."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where or 'The recipe'} should be a section with keys, not {values!r}.")
    all_hints = get_type_hints(section)
    hints = {item.name: all_hints[item.name] for item in fields(section)}
    if section is ModelRecipe:
        values = _expand_shape(values)
        valid = {*hints, "shape"}
    else:
        valid = set(hints)
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in valid:
            raise unknown_name("recipe key", f"{prefix}{key}", (f"{prefix}{k}" for k in valid))
    for item in fields(section):
        if item.name not in values and item.default is MISSING:
            hint = " (or shape)" if section is ModelRecipe else ""
            raise UserError(f"{prefix}{item.name}{hint} is missing; the recipe must state it.")
    return section(
        **{key: _convert(value, hints[key], f"{prefix}{key}") for key, value in values.items()}
    )


_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def _convert(value: Any, hint: Any, key: str) -> Any:
    """A YAML value as the type of its field."""
    if isinstance(hint, UnionType):  # X | None
        return None if value is None else _convert(value, get_args(hint)[0], key)
    if is_dataclass(hint):
        return _read_section(hint, value, key)
    if get_origin(hint) is tuple:
        return _convert_list(value, get_args(hint), key)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 100e9 tokens
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{key} is {value!r}; expected {_EXPECTED[hint]}.")
    return value


def _convert_list(value: Any, items: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    any_length = items[-1] is Ellipsis
    if not isinstance(value, list) or not (any_length or len(value) == len(items)):
        length = "numbers" if any_length else f"{len(items)} numbers"
        raise UserError(f"{key} is {value!r}; expected a list of {length}.")
    return tuple(_convert(item, items[0], key) for item in value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return list(value) if isinstance(value, tuple) else value


def _require(holds: bool, key: str, value: object, expected: str) -> None:
    if not holds:
        raise UserError(f"{key} is {value!r}; expected {expected}.")


def _require_positive(where: str, section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        # Written so that NaN fails, and infinity too.
        _require(0 < value < float("inf"), f"{where}.{name}", value, "a number above 0")


def _require_not_negative(where: str, section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(0 <= value < float("inf"), f"{where}.{name}", value, "a number of at least 0")

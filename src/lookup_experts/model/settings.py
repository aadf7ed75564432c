"""What is attached to a backbone, as plain values that a configuration can hold."""

from dataclasses import asdict, dataclass
from typing import Any

from lookup_experts.errors import UserError, unknown_name
from lookup_experts.model.forms import get_form

FORMS = ("experts", "table")
ROW_FORMS = ("mole", "meki")


@dataclass(frozen=True)
class BackboneReference:
    """Where the backbone is that a folder with experts alone belongs to."""

    name: str
    """A folder, relative ones seen from the folder with the experts, or a name on the hub."""
    fingerprint: str
    """Of its weights, see `folders/experts_alone.py`: another backbone is refused."""
    file: str | None = None
    """The GGUF file in that folder; None: the folder's own weights."""

    @classmethod
    def from_dict(cls, values: Any) -> "BackboneReference":
        if not isinstance(values, dict) or set(values) - {"file"} != {"name", "fingerprint"}:
            raise UserError(
                "The backbone in a model's lookup_experts settings should have a name and a "
                f"fingerprint; it is {values!r}."
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class LookupSettings:
    """What was attached to a backbone; saved in its `config.json` under `lookup_experts`."""

    num_experts: int
    """N, routed experts per layer: rows of one token id."""
    expert_size: int
    """D, the hidden size of each expert."""
    layers: tuple[int, ...]
    """The blocks that have experts, ascending."""
    expert_kind: str = "gelu"
    """One of `EXPERT_KINDS`."""
    norm_eps: float = 1e-6
    """The epsilon of the form's RMSNorms."""
    form: str = "experts"
    """`experts`: training form. `table`: the experts were folded into a table."""
    fingerprint: str | None = None
    """In table form, what was folded; the table beside the model must say the same."""
    backbone: BackboneReference | None = None
    """Where the backbone is, if the model is saved as experts alone."""
    row_form: str = "mole"
    """One of `ROW_FORMS`: how a row is made and read, see `forms`."""
    row_size: int | None = None
    """r, the numbers of a row; None: as many as the model is wide."""

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.expert_size < 1:
            raise UserError(
                f"Lookup experts need at least one expert of at least one unit; got "
                f"num_experts={self.num_experts}, expert_size={self.expert_size}."
            )
        if self.form not in FORMS:
            raise unknown_name("form", self.form, FORMS)
        if self.row_form not in ROW_FORMS:
            raise unknown_name("form", self.row_form, ROW_FORMS)
        if self.row_size is not None and self.row_size < 1:
            raise UserError(f"row_size is {self.row_size}; a row has one number or more.")
        get_form(self.row_form).check(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LookupSettings":
        """From the `lookup_experts` entry of a configuration; unknown keys are refused."""
        known = cls.__dataclass_fields__
        for key in values:
            if key not in known:
                raise unknown_name("lookup_experts setting", key, known)
        for key in ("num_experts", "expert_size", "layers"):
            if key not in values:
                raise UserError(f"The lookup_experts settings of a model have no {key!r}.")
        backbone = values.get("backbone")
        reference = None if backbone is None else BackboneReference.from_dict(backbone)
        return cls(**{**values, "layers": tuple(values["layers"]), "backbone": reference})

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = {**asdict(self), "layers": list(self.layers)}
        del values["backbone"]
        if self.backbone is not None:
            values["backbone"] = self.backbone.to_dict()
        if self.row_form == "mole" and self.row_size is None:  # as older versions know it
            del values["row_form"], values["row_size"]
        return values


def parse_layers(words: str, num_blocks: int) -> tuple[int, ...]:
    """A choice of blocks in words: `0-7`, `0,2,4`, `0-3,8` or `every:2`, from block 0 on."""
    rule, colon, step = words.partition(":")
    if colon and rule.strip() == "every" and step.strip().isdecimal() and int(step) > 0:
        return tuple(range(0, num_blocks, int(step)))
    chosen: set[int] = set()
    for part in words.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(
                f"Layers {words!r} should be like 0-7, 0,2,4 or every:2; {part.strip()!r} isn't."
            )
        chosen.update(range(int(first), int(last if dash else first) + 1))
    return tuple(sorted(chosen))

"""Linear layers for inference on a processor, faster than torch's own.

`make_fast` turns the large `nn.Linear`s of a model into one of the kinds below, in place: the
modules, their names and their parameters' objects stay. The kinds:

- `PackedLinear`: the weight lies in oneDNN's blocks, so that no call has to arrange it. The numbers
  are those of the plain weight, which goes.
- `ConvertingLinear`, for 16-bit weights on a processor that can't multiply these (no AVX-512): from
  a few rows on, the weight is turned into float32 as it is multiplied.
- `Int8Linear`: the weight is rounded to 8 bits, with one scale for each output.

Where gradients are taken, each multiplies with its plain weight, made for the call. Moving and
converting a model, saving and loading weights see plain weights too, and so does training:
`model.train()` makes `nn.Linear`s of them again. What was rounded to 8 bits refuses all of these.

Whoever reads or writes a packed weight as if it were plain gets torch's error: no operation but
oneDNN's takes it.
"""

import platform
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lookup_experts.errors import UserError, unknown_name
from lookup_experts.model.attention import use_fast_attention
from lookup_experts.model.forms import LookupBlock, is_called_plainly

WEIGHTS = ("auto", "plain", "int8")
"""How a model has its linear layers: of the fastest kind for the same numbers, as torch has them,
or in 8 bits."""
SMALLEST = 2**16
"""Numbers of a weight below which it stays as it is: there a call of oneDNN takes longer than the
product, whichever way the weight lies."""
CONVERTED_FROM = 4
"""Rows from which on it takes less time to convert a 16-bit weight than to multiply it as it is."""
EIGHT_BITS_UP_TO = 31
"""Rows up to which the product in 8 bits is faster than that of the weight turned back."""
BLOCK_NUMBERS = 2**19
"""Of a weight, converted at a time: 2 MB in float32, which stay in the processor's cache."""
LARGEST_CODE = 127


class FastLinear(nn.Linear):
    """What the kinds have in common.

    Attributes:
        shares_weight: whether others use the weight as well, such as the embedding, where rows are
            looked up: then it stays, and what the product takes lies beside it.
    """

    shares_weight: bool

    @property
    def words(self) -> str:
        """What is said of the kind, by `--stats`."""
        raise NotImplementedError

    def plain_weight(self) -> Tensor:
        """[out, in], the weight as `nn.Linear` has it, or what the 8 bits stand for."""
        return self.weight

    def _begin(self) -> None:
        """Make of an `nn.Linear`'s weight what this kind multiplies with."""

    def _end(self) -> None:
        """Give `weight` back to an `nn.Linear`."""

    def _turn_plain(self) -> None:
        self._end()
        del self.shares_weight
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def train(self, mode: bool = True) -> Any:
        """Training is for an `nn.Linear`."""
        if mode:
            self._turn_plain()
        return nn.Linear.train(self, mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kind, shares_weight, dtype = type(self), self.shares_weight, self.weight.dtype
        self._turn_plain()
        nn.Linear._apply(self, fn, recurse)
        if self.weight.dtype == dtype and kind_for(self.weight, 0) is kind:
            turn_into(kind, self, shares_weight)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        kind, shares_weight = type(self), self.shares_weight
        self._turn_plain()
        nn.Linear._load_from_state_dict(self, *args, **kwargs)
        turn_into(kind, self, shares_weight)


class PackedLinear(FastLinear):
    """A weight in oneDNN's blocks.

    Attributes:
        packed: the weight so, [out, in].
        packed_of: the plain weight that stays, and which version of it; None: it went, and
            `weight` is `packed`.
    """

    packed: Tensor
    packed_of: tuple[Tensor, int | None] | None

    @property
    def words(self) -> str:
        """See `FastLinear`."""
        return f"packed ({_name(self.packed.dtype)})"

    def plain_weight(self) -> Tensor:
        """See `FastLinear`; made anew where it went."""
        return self.weight if self.packed_of else self.weight.to_dense()

    def _begin(self) -> None:
        weight = self.weight
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.packed_of = (weight, _version(weight)) if self.shares_weight else None
        if not self.shares_weight:
            torch.utils.swap_tensors(weight, nn.Parameter(self.packed, weight.requires_grad))

    def _end(self) -> None:
        if not self.packed_of:
            plain = nn.Parameter(self.packed.to_dense(), self.weight.requires_grad)
            torch.utils.swap_tensors(self.weight, plain)
        del self.packed, self.packed_of

    def forward(self, states: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        # Each call here is one that a step of decoding makes some hundred times, with the code long
        # gone from the processor's caches.
        packed, packed_of, bias = self.packed, self.packed_of, self._parameters["bias"]
        if torch.is_grad_enabled() or states.dtype is not packed.dtype:
            return F.linear(states, self.plain_weight(), bias)
        if packed_of is not None and not _is_still(self._parameters["weight"], packed_of):
            self._turn_plain()  # the embedding has changed since, and with it the head
            return F.linear(states, self.weight, bias)
        if torch.compiler.is_compiling():
            return torch.ops.lookup_experts.packed_linear(states, packed, bias)
        return _packed_product(states, packed, bias, "none", [], "")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.packed_of:
            destination[f"{prefix}weight"] = self.packed.to_dense()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if not state.pop("packed_of"):
            plain = nn.Parameter(self.packed.to_dense(), self.weight.requires_grad)
            state["_parameters"] = {**self._parameters, "weight": plain}
        del state["packed"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if kind_for(self.weight, 0) is PackedLinear:
            self._begin()
        else:  # unpickled on another kind of processor
            del self.shares_weight
            self.__class__ = nn.Linear  # type: ignore[assignment]


class ConvertingLinear(FastLinear):
    """A 16-bit weight, as it is, on a processor that has no products for it."""

    @property
    def words(self) -> str:
        """See `FastLinear`."""
        name = _name(self.weight.dtype)
        return f"{name}, converted to float32 from {CONVERTED_FROM} rows on"

    def forward(self, states: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        weight, bias = self.weight, self.bias
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or states.dtype != weight.dtype
            or states.numel() < CONVERTED_FROM * self.in_features
        ):
            return F.linear(states, weight, bias)
        output = _product_in_blocks(states, weight, torch.float32)
        return output if bias is None else output.add_(bias)


class Int8Linear(FastLinear):
    """A weight in 8 bits; products are of activations in bfloat16.

    Attributes:
        codes: int8 [out, in].
        scale: bfloat16 [out], what a code of 1 stands for.
    """

    codes: Tensor
    scale: Tensor

    @property
    def words(self) -> str:
        """See `FastLinear`."""
        return "int8"

    def plain_weight(self) -> Tensor:
        """See `FastLinear`."""
        return self.codes * self.scale[:, None]

    def _begin(self) -> None:
        self.codes, self.scale = round_to_int8(self.weight.detach())
        if not self.shares_weight:
            self.weight = nn.Parameter(self.codes, requires_grad=False)
            self.__dict__["codes"] = self.weight  # one object, which copies keep one

    def _end(self) -> None:
        raise UserError(
            "This model's linear layers were rounded to 8 bits when it was loaded, so it can't be "
            "saved, trained, moved or converted; load it with weights='plain' for that."
        )

    def forward(self, states: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        bias = self._parameters["bias"]
        if torch.is_grad_enabled():
            return F.linear(states, self.plain_weight().to(states.dtype), bias)
        rows = states.reshape(-1, self.in_features).to(torch.bfloat16)
        if len(rows) <= EIGHT_BITS_UP_TO:
            output = torch._weight_int8pack_mm(rows, self.codes, self.scale)
        else:
            output = _product_in_blocks(rows, self.codes, _product_dtype()).mul_(self.scale)
        if bias is not None:
            output = output.add_(bias)
        return output.to(states.dtype).view(*states.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._end()


# ------------------------------------------------------------------------------------- products


# The overload itself: resolving it takes longer than a small product.
_packed_product: Any = (
    torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
)


@torch.library.custom_op("lookup_experts::packed_linear", mutates_args=())
def _packed_operation(states: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """As one that a compiled graph doesn't look into: inductor takes no packed inputs."""
    return _packed_product(states, packed, bias, "none", [], "")


@_packed_operation.register_fake
def _shape_of_product(states: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return states.new_empty(*states.shape[:-1], packed.shape[0])


def _product_in_blocks(states: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., in] times a weight [out, in] of another dtype: the product in `dtype`, the result in
    that of `states`."""
    num_outputs, num_inputs = weight.shape
    rows = states.reshape(-1, num_inputs).to(dtype)
    output = states.new_empty(len(rows), num_outputs)
    step = max(1, BLOCK_NUMBERS // num_inputs)
    for first in range(0, num_outputs, step):
        block = slice(first, first + step)
        output[:, block] = F.linear(rows, weight[block].to(dtype))
    return output.view(*states.shape[:-1], num_outputs)


def round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and their scale bfloat16 [out]: the largest magnitude of each output's
    weights becomes 127."""
    values = weight.float()
    # Rounded first, so that the codes make up for it.
    scale = (values.abs().amax(dim=1) / LARGEST_CODE).to(torch.bfloat16)
    steps = values / scale.float().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return steps.round_().clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8), scale


def _product_dtype() -> torch.dtype:
    """In which 8 bits are multiplied once they are turned back; each code is exact in it."""
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if supported else torch.float32


def _is_still(weight: Any, then: tuple[Tensor, int | None]) -> bool:
    return weight is then[0] and _version(weight) == then[1]


def _version(weight: Tensor) -> int | None:
    """Counts changes in place; None of a tensor that is made for inference and can't be changed."""
    return None if weight.is_inference() else weight._version


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------ of a model


def check_weights(weights: str, device: str | torch.device) -> None:
    """Raise a `UserError` for what is none of `WEIGHTS`, or not to be had on a device."""
    if weights not in WEIGHTS:
        raise unknown_name("weights", weights, WEIGHTS)
    if weights == "int8" and torch.device(device).type != "cpu":
        raise UserError(
            f"weights='int8' is for a model on the CPU, and the device is {device}. Leave one of "
            "the two out."
        )


def make_fast(
    model: Any, weights: str = "auto", notify: Callable[[str], None] = lambda message: None
) -> Any:
    """Let the linear layers of a model on a CPU be of the fastest kind for its dtype and this
    processor, and its attention too; where there is none, they stay.

    So do those that another library has replaced or hooks, those whose weight others have too (a
    head with the embedding's aside), and what makes rows in training form.

    Args:
        model: a causal LM, in evaluation mode.
        weights: one of `WEIGHTS`; `plain` changes nothing.
        notify: told of dtypes that this processor doesn't multiply in.

    Returns:
        The model.

    Raises:
        UserError: 8 bits for a model that is quantised.
    """
    if weights == "plain":
        return model
    if weights == "int8" and getattr(model, "is_quantized", False):
        raise UserError("The model is quantised already; leave weights='int8' out.")
    shared = _shared_weights(model)
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is model.get_input_embeddings().weight

    @torch.no_grad()
    def turn_all() -> None:
        for module in _called_by(model):
            weight: Any = module.weight
            ties = is_tied and module is head
            if id(weight) not in shared or ties:
                kind = kind_for(weight)
                if kind is not None:
                    turn_into(Int8Linear if weights == "int8" else kind, module, ties)
        make_blocks_fast(model)

    # By a thread that ends. OpenMP keeps helpers for each thread that has used it; with more of
    # them than cores it lets all sleep between two operations, and a step in whatever other thread
    # (a server's) then takes half as long again.
    with ThreadPoolExecutor(1, "make-fast") as thread:
        thread.submit(turn_all).result()
    use_fast_attention(model)
    if any(isinstance(module, ConvertingLinear) for module in model.modules()):
        notify(
            f"This processor doesn't multiply in {_name(model.dtype)}: linear layers convert their "
            "weights to float32 in every call, so steps take longer than with dtype float32, which "
            "needs twice the memory."
        )
    return model


def describe_linears(model: Any) -> str:
    """Of which kinds the linear layers of a model are: `73 packed (bfloat16), 12 plain`."""
    found = Counter(
        module.words if isinstance(module, FastLinear) else "plain"
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )
    return ", ".join(f"{count} {words}" for words, count in found.items()) or "none"


@torch.no_grad()
def make_blocks_fast(model: nn.Module) -> None:
    """`make_fast` for what reads rows alone, which stays in its dtype, 8 bits or not."""
    for block in model.modules():
        if isinstance(block, LookupBlock):
            _make_block_fast(block)


def _make_block_fast(block: LookupBlock) -> None:
    """A router is a small product, but for several rows in bfloat16 torch arranges its weight anew
    in every call, which takes longer; packed it uses the code that the FFN has just used as well.
    For a single row the plain weight is best, so it stays.
    """
    for name, module in block.named_children():
        if is_called_plainly(module, nn.Linear):
            weight: Any = module.weight
            is_router = name == "router"
            kind = kind_for(weight, 0 if is_router else SMALLEST)
            packs = kind is PackedLinear and weight.dtype == torch.bfloat16
            if kind is not None and (packs or not is_router):
                turn_into(kind, module, shares_weight=is_router)


def _called_by(module: nn.Module) -> Iterator[Any]:
    """The backbone's `nn.Linear`s that do what these do and nothing beside."""
    for child in module.children():
        if is_called_plainly(child, nn.Linear) and type(child.weight) is nn.Parameter:
            yield child
        # What an adapter of PEFT wraps is PEFT's, which also writes to it.
        elif not isinstance(child, LookupBlock) and not hasattr(child, "base_layer"):
            yield from _called_by(child)


def _shared_weights(model: nn.Module) -> set[int]:
    """The ids of parameters that several modules have."""
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    return {weight for weight, count in uses.items() if count > 1}


def kind_for(weight: Tensor, smallest: int = SMALLEST) -> type[FastLinear] | None:
    """The fastest kind for a weight as it is, from so many numbers on; None: torch's own."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not (is_x86 and torch.backends.mkldnn.is_available()):
        return None
    if weight.device.type != "cpu" or weight.numel() < smallest:
        return None
    operations = torch.ops.mkldnn
    multiplied = {
        torch.float32: True,
        torch.bfloat16: operations._is_mkldnn_bf16_supported(),
        torch.float16: operations._is_mkldnn_fp16_supported(),
    }
    if weight.dtype not in multiplied:
        return None
    return PackedLinear if multiplied[weight.dtype] else ConvertingLinear


def turn_into(kind: type[FastLinear], module: Any, shares_weight: bool = False) -> None:
    """Make an `nn.Linear` one of the kinds, in place; see `FastLinear` for `shares_weight`."""
    module.__class__ = kind
    module.shares_weight = shares_weight
    module._begin()

"""The pickle inside a torch checkpoint, read without running it.

`pickle` would import and call whatever the file asks for. This is a reader of the few dozen instructions that
``torch.save`` writes for a state dict; names stay names, and the three functions it calls
(`OrderedDict`, `_rebuild_tensor_v2`, `_rebuild_parameter`) are acted out here, so nothing in a file can be executed.
A training checkpoint, which holds plain values beside its state dict, may name a few more: `torch.Size`, `set` and the
types of tensors. The instructions are those of the standard library's `pickletools`.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
from collections.abc import Callable, Set
from typing import Any

from spt_jax.errors import UserError

STORAGE_TYPES = {
    "FloatStorage": ("F32", 4),
    "DoubleStorage": ("F64", 8),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
"""Torch's storage classes: safetensors' name of the type, and bytes of an element."""


@dataclasses.dataclass(frozen=True)
class TorchStorage:
    """A run of elements in the archive.

    Attributes:
        dtype: The type, by safetensors' name.
        itemsize: Bytes of an element.
        key: Name of the archive's entry below ``data/``.
        numel: Elements.
    """

    dtype: str
    itemsize: int
    key: str
    numel: int


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A strided window on a storage; offset and strides count elements."""

    storage: TorchStorage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


_ORDERED_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_ALLOWED = {_ORDERED_DICT, _TENSOR, _PARAMETER, *(f"torch.{name}" for name in STORAGE_TYPES)}
_SIZE = "torch.Size"
_SETS = ("__builtin__.set", "builtins.set")  # as protocol 2 writes a set, and as later ones name it
_DTYPES = frozenset(
    f"torch.{name}"
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
)
_ALLOWED_BESIDE_TENSORS = _ALLOWED | {_SIZE, *_SETS} | _DTYPES
_MOST_ELEMENTS = 2**48  # far above any weight, far below where byte offsets overflow


def read_state_dict(pickle: bytes, where: str) -> dict[str, TorchTensor]:
    """The tensors by name that a torch checkpoint's ``data.pkl`` describes.

    Raises:
        UserError: It is damaged, asks for anything but tensors (named), or is not a flat dict of tensors.
    """
    state = _run(_Machine(where, _ALLOWED, "a dict of tensors"), pickle)
    if not isinstance(state, dict):
        raise UserError(f"{where} holds {_described(state)}; expected a dict of tensors by name (a state dict)")
    for name, value in state.items():
        if isinstance(value, dict):
            raise UserError(
                f"{where} holds a dict inside its dict, under {name!r}; expected a flat dict of tensors by name: "
                "save that part alone"
            )
        if not isinstance(name, str) or not isinstance(value, TorchTensor):
            raise UserError(f"{where} holds {_described(value)} under {name!r}; expected tensors by name alone")
    return state


def read_training_checkpoint(pickle: bytes, where: str, part: str) -> tuple[dict[str, TorchTensor], dict[str, Any]]:
    """What the ``data.pkl`` of a training checkpoint describes: a dict with a state dict under one of its keys.

    Args:
        pickle: The pickle.
        where: The file, for messages.
        part: The key of the state dict.

    Returns:
        The tensors of that part by name, and everything else: dicts, lists, tuples, sets, numbers, texts and
        `TorchTensor`; a type such as ``torch.float16`` is its name as text, a ``torch.Size`` a tuple.

    Raises:
        UserError: It is damaged, asks for anything but tensors and plain values (named), is no dict, lacks `part`, or
            has something else there than a flat dict of tensors.
    """
    machine = _Machine(where, _ALLOWED_BESIDE_TENSORS, "a checkpoint of tensors and plain values")
    values = _run(machine, pickle)
    if not isinstance(values, dict):
        raise UserError(f"{where} holds {_described(values)}; expected a dict with a state dict under {part!r}")
    if part not in values:
        raise UserError(f"{where} holds no {part!r}; it holds {', '.join(map(repr, list(values)[:10])) or 'nothing'}")
    state = values.pop(part)
    if not isinstance(state, dict):
        raise UserError(f"{where} holds {_described(state)} under {part!r}; expected a dict of tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, TorchTensor):
            raise UserError(
                f"{where} holds {_described(value)} under {name!r} in {part!r}; expected tensors by name alone"
            )
    return state, values


def _run(machine: _Machine, pickle: bytes) -> Any:
    try:
        return machine.run(pickle)
    except UserError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise UserError(f"{machine.where} is damaged: its pickle does not parse ({error})") from error


def _described(value: object) -> str:
    if isinstance(value, TorchTensor):
        return "a single tensor"
    if isinstance(value, _Global):
        return f"the name {value.name!r}"
    return f"a value of type {type(value).__name__}"


class _Machine:
    """Pickle's stack machine over plain values; one method for each instruction that does more than push."""

    def __init__(self, where: str, allowed: Set[str], what: str) -> None:
        self.where = where
        self.allowed = allowed
        self.what = what
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, pickle: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(pickle):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _PUSHED_ARGUMENTS:
                if isinstance(argument, int) and argument.bit_length() > _MOST_BITS:
                    raise ValueError(f"a number of {argument.bit_length()} bits")
                self.stack.append(argument)
            elif name in _PUSHED:
                self.stack.append(_PUSHED[name]())
            elif name in _ACTIONS:
                _ACTIONS[name](self, argument)
            else:
                raise UserError(
                    f"{self.where}: its pickle uses the instruction {name}, which {self.what} does not need; "
                    "the file is refused and nothing in it was run"
                )
        raise ValueError("no STOP")

    def nothing(self, _: Any) -> None:
        pass

    def mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, key: int) -> None:
        self.stack.append(self.memo[key])

    def tuple_since_mark(self, _: Any) -> None:
        items = tuple(self.since_mark())
        self.stack.append(items)

    def short_tuple(self, length: int) -> None:
        if len(self.stack) < length:
            raise ValueError("a tuple longer than the stack")
        self.stack[-length:] = [tuple(self.stack[-length:])]

    def append(self, _: Any) -> None:
        value = self.stack.pop()
        self.extend([value])

    def appends(self, _: Any) -> None:
        self.extend(self.since_mark())

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("items for something that is not a list")
        self.stack[-1].extend(values)

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def set_items(self, _: Any) -> None:
        self.update(self.since_mark())

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError("items for something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):  # a deep tuple would overflow the stack when hashed
                raise TypeError(f"a dict's key of type {type(key).__name__}")
            target[key] = value

    def named(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.name(module, name)

    def named_by_stack(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a name that is not text")
        self.name(module, name)

    def name(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in self.allowed or "." in name:
            raise UserError(
                f"{self.where}: its pickle asks for {full!r}, which {self.what} does not need and which is "
                "never run; only plain tensors can be read: save the model's state dict"
            )
        self.stack.append(full.removeprefix("torch.") if full in _DTYPES else _Global(full))

    def storage(self, _: Any) -> None:
        match self.stack.pop():
            case ("storage", _Global(name), str(key), str(_), int(numel)) if name.startswith("torch.") and numel >= 0:
                kind = name.removeprefix("torch.")
                if kind not in STORAGE_TYPES:
                    raise TypeError(f"a storage of type {name}")
                self.stack.append(TorchStorage(*STORAGE_TYPES[kind], key, numel))
            case _:
                raise TypeError("a persistent id that is not a storage")

    def reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        match function, arguments:
            case _Global(name), () if name == _ORDERED_DICT:
                self.stack.append({})
            case _Global(name), (TorchTensor() as data, *_) if name == _PARAMETER:
                self.stack.append(data)
            case _Global(name), (TorchStorage() as storage, int(offset), tuple(shape), tuple(strides), _, _, *more) if (
                name == _TENSOR and not any(more)
            ):
                self.stack.append(_checked(TorchTensor(storage, offset, shape, strides)))
            case _Global(name), (tuple(sizes),) if name == _SIZE:
                self.stack.append(sizes)
            case _Global(name), (list(items),) if name in _SETS and all(isinstance(item, str | int) for item in items):
                self.stack.append(set(items))
            case _Global(name), _:
                raise TypeError(f"a call of {name} with arguments that torch.save does not write")
            case _:
                raise TypeError("a call of something that is not a name")

    def build(self, _: Any) -> None:
        # A state dict's attribute `_metadata` (versions of its modules) is all that comes this way; it is let go.
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise TypeError("attributes for something that is not a dict")


def _checked(tensor: TorchTensor) -> TorchTensor:
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    if len(tensor.shape) != len(tensor.strides) or len(tensor.shape) > 32:
        raise ValueError("a tensor whose shape and strides do not fit")
    if any(type(number) is not int or not 0 <= number < _MOST_ELEMENTS for number in numbers):
        raise ValueError("a tensor with impossible shape, strides or offset")
    if math.prod(tensor.shape) >= _MOST_ELEMENTS:
        raise ValueError("a tensor with impossibly many elements")
    if math.prod(tensor.shape) == 0:
        return tensor
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if last >= tensor.storage.numel:
        raise ValueError(f"a tensor of shape {tensor.shape} that ends behind its storage of {tensor.storage.numel}")
    return tensor


_MOST_BITS = 1000  # larger numbers fit no float, and much larger ones cannot be printed
_PUSHED_ARGUMENTS = frozenset(
    ["BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"]
)
_PUSHED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.nothing,
    "FRAME": _Machine.nothing,
    "MARK": _Machine.mark,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": _Machine.tuple_since_mark,
    "TUPLE1": lambda machine, _: machine.short_tuple(1),
    "TUPLE2": lambda machine, _: machine.short_tuple(2),
    "TUPLE3": lambda machine, _: machine.short_tuple(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": _Machine.named_by_stack,
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}

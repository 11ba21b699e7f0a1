"""What a compiled program moves: bytes of HBM and collectives of one device, from its text.

XLA's own cost analysis counts a loop's body once, and memory on the chip like HBM. Here a body counts as often as it
runs, and of each instruction what it reads from HBM and writes there: a layout with a memory space, ``S(1)``, is on the
chip. A kernel that reads an operand several times is counted once; so the bytes are a lower bound.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\(\d+\)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BITS = re.compile(r"\d+")

_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier"),
)
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One communication among devices, as often as it happens.

    Attributes:
        kind: XLA's name of it.
        bytes: Of its result on one device.
        group: How many devices take part.
        times: How often it happens in a run of the program.
    """

    kind: str
    bytes: float
    group: int
    times: float

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all, in the best known algorithm (as many arrive)."""
        share = (self.group - 1) / self.group
        once = {
            "all-reduce": 2 * self.bytes * share,
            "reduce-scatter": self.bytes * (self.group - 1),
            "collective-permute": self.bytes,
        }
        return self.times * once.get(self.kind, self.bytes * share)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device moves in a run of a program.

    Attributes:
        hbm: Bytes read from HBM and written there.
        collectives: In the program's order.
    """

    hbm: float
    collectives: tuple[Collective, ...]

    def by_kind(self) -> dict[str, tuple[float, float, float]]:
        """For each kind of collective: how many, bytes of their results, bytes that a device sends."""
        found: dict[str, tuple[float, float, float]] = collections.defaultdict(lambda: (0.0, 0.0, 0.0))
        for c in self.collectives:
            times, size, sent = found[c.kind]
            found[c.kind] = (times + c.times, size + c.times * c.bytes, sent + c.sent)
        return dict(found)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    line: str
    root: bool


def traffic(compiled_text: str, unknown_trips: int = 1) -> Traffic:
    """Reads a compiled program's text.

    Args:
        compiled_text: Of a `jax.stages.Compiled`, ``as_text()``.
        unknown_trips: How often the body of a loop runs whose condition does not say.
    """
    return _Program(compiled_text, unknown_trips).of_entry()


class _Program:
    def __init__(self, text: str, unknown_trips: int) -> None:
        self._unknown_trips = unknown_trips
        self._bodies: dict[str, dict[str, _Instruction]] = {}
        self._entry = ""
        body: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                body = self._bodies[match[2]] = {}
                self._entry = match[2] if match[1] else self._entry
            elif match := _INSTRUCTION.match(line):
                instruction = _parsed(match[2], match[3], bool(match[1]))
                body[instruction.name] = instruction
        self._of = functools.cache(self._computed)

    def of_entry(self) -> Traffic:
        return self._of(self._entry)

    def _computed(self, name: str) -> Traffic:
        parts = [self._instruction(each, self._bodies[name]) for each in self._bodies[name].values()]
        return Traffic(sum(part.hbm for part in parts), tuple(c for part in parts for c in part.collectives))

    def _instruction(self, it: _Instruction, body: dict[str, _Instruction]) -> Traffic:
        called = dict(_CALLED.findall(it.line))
        if it.opcode in _FREE or it.opcode.endswith("-done"):
            return Traffic(0.0, ())
        if it.opcode == "while":
            trips = self._trips(called["condition"])
            return _times(self._of(called["body"]), trips)
        if it.opcode in ("call", "async-start"):
            return self._of(called.get("calls") or called["to_apply"])
        if it.opcode == "conditional":
            listed = _BRANCHES.search(it.line)
            names = _OPERAND.findall(listed[1]) if listed else [v for k, v in called.items() if "computation" in k]
            return max((self._of(branch) for branch in names), key=lambda branch: branch.hbm)
        kind = it.opcode.removesuffix("-start")
        if kind in _COLLECTIVES:
            return Traffic(self._moved(it, body), (_collective(kind, it),))
        if it.opcode == "fusion":
            inside = self._of(called["calls"]).collectives
            return Traffic(self._fusion(it, body, called["calls"]), inside)
        return Traffic(self._moved(it, body), ())

    def _trips(self, condition: str) -> int:
        """How often a loop runs whose counter starts at 0: its condition compares with a constant."""
        body = self._bodies[condition]
        root = next(each for each in body.values() if each.root)
        limits = [
            int(match[1])
            for name in root.operands
            if name in body and (match := re.search(r"constant\((\d+)\)", body[name].line))
        ]
        return limits[0] if len(limits) == 1 and root.opcode in ("compare", "fusion") else self._unknown_trips

    def _moved(self, it: _Instruction, body: dict[str, _Instruction]) -> float:
        written, read = _hbm(it.shape), sum(_hbm(body[name].shape) for name in it.operands if name in body)
        match it.opcode:
            case "dynamic-slice" | "slice" | "gather" | "broadcast" | "iota":
                return written + min(read, _size(it.shape) if read else 0.0)
            case "dynamic-update-slice":  # in place
                return 2 * _hbm(body[it.operands[1]].shape) if it.operands[1] in body else 0.0
            case "custom-call" if "AllocateBuffer" in it.line:
                return 0.0
            case opcode if opcode.endswith("-start"):
                # The result names source and destination.
                arrays = _ARRAY.findall(it.shape)
                return _hbm(_text(arrays[0])) + min(read, _size(_text(arrays[0]))) if arrays else 0.0
        return written + read

    def _fusion(self, it: _Instruction, body: dict[str, _Instruction], called: str) -> float:
        """A fusion reads of an operand what it slices from it, and writes of an updated operand the update."""
        inner = self._bodies[called]
        parameters = {
            int(match[1]): each
            for each in inner.values()
            if each.opcode == "parameter" and (match := re.search(r"parameter\((\d+)\)", each.line))
        }
        total, updated = 0.0, 0.0
        for number, name in enumerate(it.operands):
            if name not in body or not (whole := _hbm(body[name].shape)):
                continue
            parts = self._slices(inner, parameters[number].name) if number in parameters else None
            total += whole if parts is None else min(whole, parts)
        for each in inner.values():
            if each.opcode == "dynamic-update-slice" and _hbm(each.shape) == _hbm(it.shape) and _hbm(it.shape):
                updated = _size(inner[each.operands[1]].shape)
        return total + (updated or _hbm(it.shape))

    def _slices(self, inner: dict[str, _Instruction], name: str) -> float | None:
        """Bytes that a computation takes of a parameter through slices, and updates in place; None for all of it."""
        total = 0.0
        for each in inner.values():
            if name not in each.operands:
                continue
            if each.opcode in ("dynamic-slice", "slice", "gather") and each.operands[0] == name:
                total += _size(each.shape)
            elif each.opcode == "dynamic-update-slice" and each.operands[0] == name:
                continue
            elif each.opcode == "bitcast":
                if (below := self._slices(inner, each.name)) is None:
                    return None
                total += below
            elif each.opcode == "fusion":
                called = self._bodies[dict(_CALLED.findall(each.line))["calls"]]
                inside = [p.name for p in called.values() if f"parameter({each.operands.index(name)})" in p.line]
                if not inside or (below := self._slices(called, inside[0])) is None:
                    return None
                total += below
            else:
                return None
        return total


def _parsed(name: str, rest: str, root: bool) -> _Instruction:
    """Splits ``SHAPE opcode(operands), attributes``; a tuple's shape is in brackets."""
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, after = rest[:end], rest[end:].lstrip()
    opcode, _, arguments = after.partition("(")
    operands = tuple(_OPERAND.findall(arguments[: _closing("(" + arguments)]))
    return _Instruction(name, opcode, shape, operands, rest, root)


def _closing(text: str) -> int:
    """Where the bracket that opens `text` closes."""
    depth = 0
    for place, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return place
    return len(text) - 1


def _text(array: tuple[str, str, str]) -> str:
    return f"{array[0]}[{array[1]}]{array[2]}"


def _size(shape: str) -> float:
    """Bytes of all arrays of a shape."""
    return sum(_bytes(kind, sizes) for kind, sizes, _ in _ARRAY.findall(shape))


def _hbm(shape: str) -> float:
    """Bytes of those of them that lie in HBM."""
    return sum(_bytes(kind, sizes) for kind, sizes, layout in _ARRAY.findall(shape) if not _SPACE.search(layout))


def _bytes(kind: str, sizes: str) -> float:
    if kind == "pred":
        bits = 8
    elif found := _BITS.search(kind):
        bits = int(found[0])
    else:
        return 0.0  # a token
    return math.prod(int(size) for size in sizes.split(",") if size) * bits / 8


def _times(once: Traffic, trips: int) -> Traffic:
    repeated = tuple(dataclasses.replace(c, times=c.times * trips) for c in once.collectives)
    return Traffic(once.hbm * trips, repeated)


def _collective(kind: str, it: _Instruction) -> Collective:
    # The start of one that runs beside other work gives (operands, results): the larger of a gather, or equals.
    arrays = [_size(_text(array)) for array in _ARRAY.findall(it.shape)]
    starts = it.opcode.endswith("-start") and kind != "all-reduce"
    size = (min(arrays) if kind == "reduce-scatter" else max(arrays)) if starts and arrays else sum(arrays)
    return Collective(kind, size, _group(it.line), 1.0)


def _group(line: str) -> int:
    """How many devices take part, in each of the ways to write ``replica_groups``; 2 for pairs."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    return 2

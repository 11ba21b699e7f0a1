"""Reads the text of a compiled program (XLA's HLO): its computations, their instructions, and what these call."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(condition|body|calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count["\\]*:\s*\{["\\]*n["\\]*:\s*["\\]*(\d+)')
_LIMIT = re.compile(r"constant\((\d+)\)")
_ARRAY = re.compile(r"\b(pred|token|bf16|[a-z]\d+\w*)\[([\d,]*)\](\{[^{}]*\})?")


class Array(NamedTuple):
    """A type and shape in the text, such as ``bf16[3,5]{1,0:T(8,128)S(1)}``.

    Attributes:
        dtype: XLA's name of it.
        shape: Sizes of the axes.
        layout: How it lies in memory, in braces; empty where the text does not say.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        """In memory, without padding: ``pred`` takes a byte, ``s4`` half of one, a token nothing."""
        if self.dtype == "token":
            return 0
        # ``f8e4m3fn`` and its kin spell their width first.
        bits = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])
        return -(-bits * math.prod(self.shape) // 8)


def arrays_of(type_: str) -> list[Array]:
    """The arrays of a type, which may be a tuple."""
    found = _ARRAY.findall(type_)
    return [Array(dtype, tuple(int(n) for n in sizes.split(",") if n), layout) for dtype, sizes, layout in found]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``%name = type opcode(operands), attributes``.

    Attributes:
        name: Without its percent sign.
        type: Of its result.
        opcode: What it does.
        operands: Names of those that it has.
        rest: The text behind ``opcode(``: operands and attributes.
        root: Whether its result is that of its computation.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def chained(self) -> bool:
        """Whether it is a part of a collective that a TPU's compiler carries on in several fusions beside their work.

        Each of them names the collective; that of the first has an ``AsyncCollectiveStart`` (`starts_chain`).
        """
        return 'chain_id="' in self.rest

    def called(self) -> Iterator[tuple[str, str]]:
        """What it calls: in which part (``body``, ``condition``, ``calls``, …), and the computation's name."""
        for part, names in _CALLED.findall(self.rest):
            yield from ((part, name.strip().lstrip("%")) for name in names.strip("{}").split(",") if name.strip())


def starts_chain(computation: Mapping[str, Instruction]) -> bool:
    """Whether a chained collective begins in a fusion's computation; see `Instruction.chained`."""
    return any('"AsyncCollectiveStart"' in each.rest for each in computation.values() if each.opcode == "custom-call")


class Module(NamedTuple):
    """A program.

    Attributes:
        entry: Name of the computation that it begins with.
        computations: The instructions of every computation, by their names.
        devices: How many run it.
    """

    entry: str
    computations: Mapping[str, Mapping[str, Instruction]]
    devices: int

    def trips(self, loop: Instruction, unknown: int = 1) -> int:
        """How often the body of a ``while`` runs.

        Args:
            loop: The instruction.
            unknown: The answer where the text does not say it: neither in the loop's own words, nor by a condition that
                compares the counter with a constant, from 0 on.
        """
        if told := _TRIPS.search(loop.rest):
            return int(told[1])
        condition = self.computations.get(dict(loop.called()).get("condition", ""), {})
        root = next((each for each in condition.values() if each.root), None)
        if root is None or root.opcode not in ("compare", "fusion"):
            return unknown
        constants = (condition[name] for name in root.operands if name in condition)
        limits = [int(found[1]) for each in constants if (found := _LIMIT.search(f"{each.opcode}({each.rest}"))]
        return limits[0] if len(limits) == 1 else unknown


def read_module(compiled_text: str) -> Module:
    """The program in a text.

    Args:
        compiled_text: What ``jitted.lower(...).compile().as_text()`` gives.

    Raises:
        ValueError: The text is no HLO module.
    """
    entry = ""
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] | None = None
    for raw in compiled_text.splitlines():
        if header := _COMPUTATION.match(raw):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(raw)):
            current[found[2]] = _instruction(found[2], found[3], bool(found[1]))
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", compiled_text[:100_000])
    return Module(entry, computations, math.prod(map(int, counts)))


def _instruction(name: str, definition: str, root: bool) -> Instruction:
    """Splits behind the type, which may be a tuple in parentheses and holds layouts such as ``{1,0:T(8,128)}``."""
    end = _end(definition, 0, " ")
    opcode, _, rest = definition[end + 1 :].partition("(")
    operands = tuple(_OPERAND.findall(rest[: _end(rest, 0, ")")]))
    return Instruction(name, definition[:end], opcode, operands, rest, root)


def _end(text: str, place: int, mark: str) -> int:
    """Where the mark stands outside of all brackets; the text's end where it does not."""
    depth = 0
    while place < len(text) and (text[place] != mark or depth):
        depth += (text[place] in "({[") - (text[place] in ")}]")
        place += 1
    return place

"""What a compiled program moves: bytes of HBM and collectives of one device, from its text.

XLA's own cost analysis counts a loop's body once, and memory on the chip like HBM. Here a body counts as often as it
runs, and of each instruction what it reads from HBM and writes there: a layout with a memory space, ``S(1)``, is on the
chip. A kernel that reads an operand several times is counted once; so the bytes are a lower bound.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Collection, Mapping

from spt_jax.parallel.collectives import Collective, collectives
from spt_jax.parallel.hlo_text import Array, Instruction, Module, arrays_of, read_module, starts_chain

_SPACE = re.compile(r"S\(\d+\)")
_NUMBER = re.compile(r"(\d+)\)")

_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier"),
)


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
        found: dict[str, tuple[float, float, float]] = defaultdict(lambda: (0.0, 0.0, 0.0))
        for c in self.collectives:
            times, size, sent = found[c.kind]
            found[c.kind] = (times + c.times, size + c.times * c.bytes, sent + c.sent)
        return dict(found)


def traffic(compiled_text: str, unknown_trips: int = 1) -> Traffic:
    """Reads a compiled program's text.

    Args:
        compiled_text: Of a `jax.stages.Compiled`, ``as_text()``.
        unknown_trips: How often the body of a loop runs of which the text does not say it.

    Raises:
        ValueError: As `spt_jax.parallel.collectives.collectives`.
    """
    found = collectives(compiled_text, unknown_trips)
    return Traffic(_Bytes(read_module(compiled_text), unknown_trips).of_entry(), tuple(found))


class _Bytes:
    """Bytes that the computations of a program move, each computed once.

    Args:
        module: The program.
        unknown_trips: See `traffic`.
    """

    def __init__(self, module: Module, unknown_trips: int) -> None:
        self._module, self._unknown_trips = module, unknown_trips
        self._of = functools.cache(self._computed)

    def of_entry(self) -> float:
        """Of the whole program."""
        return self._of(self._module.entry)

    def _computed(self, name: str) -> float:
        body = self._module.computations[name]
        return sum(self._instruction(each, body) for each in body.values())

    def _instruction(self, it: Instruction, body: Mapping[str, Instruction]) -> float:
        called = list(it.called())
        if it.opcode in _FREE or it.opcode.endswith("-done"):
            return 0.0
        match it.opcode:
            case "while":
                return self._of(dict(called)["body"]) * self._module.trips(it, self._unknown_trips)
            case "call" | "async-start":
                return self._of(called[0][1])
            case "conditional":
                return max(self._of(branch) for part, branch in called if "computation" in part)
            case "fusion":
                return self._fusion(it, body, self._module.computations[dict(called)["calls"]])
        return self._moved(it, body)

    def _moved(self, it: Instruction, body: Mapping[str, Instruction]) -> float:
        written, read = _hbm(it.type), sum(_hbm(body[name].type) for name in it.operands if name in body)
        match it.opcode:
            case "dynamic-slice" | "slice" | "gather" | "broadcast" | "iota":
                return written + min(read, _size(it.type) if read else 0.0)
            case "dynamic-update-slice":  # in place
                return 2 * _hbm(body[it.operands[1]].type) if it.operands[1] in body else 0.0
            case "custom-call" if "AllocateBuffer" in it.rest:
                return 0.0
            case opcode if opcode.endswith("-start"):
                # The result names source and destination.
                first = arrays_of(it.type)[:1]
                return sum(_in_hbm(array) + min(read, array.bytes) for array in first)
        return written + read

    def _fusion(self, it: Instruction, body: Mapping[str, Instruction], inner: Mapping[str, Instruction]) -> float:
        """A fusion reads of an operand what it slices from it, and writes of an updated operand the update.

        What a chained collective takes and gives is passed through its fusions in place, and counts at its start alone.
        """
        parameters = _parameters(inner)
        total, updated = 0.0, 0.0
        chained = [array for each in inner.values() if each.chained for array in _ends(each, inner)]
        passed = {(array.dtype, array.shape) for array in chained}
        if chained and starts_chain(inner):
            total += sum(map(_in_hbm, chained))
        for number, name in enumerate(it.operands):
            if name not in body or not (whole := _hbm(body[name].type)):
                continue
            if chained and number in parameters and _is_passed(inner, parameters[number]):
                continue
            parts = self._slices(inner, parameters[number]) if number in parameters else None
            total += whole if parts is None else min(whole, parts)
        for each in inner.values():
            if each.opcode == "dynamic-update-slice" and _hbm(each.type) == _hbm(it.type) and _hbm(it.type):
                updated = _size(inner[each.operands[1]].type)
        return total + (updated or _hbm(it.type, passed))

    def _slices(self, inner: Mapping[str, Instruction], name: str) -> float | None:
        """Bytes that a computation takes of a parameter through slices, and updates in place; None for all of it."""
        total = 0.0
        for each in inner.values():
            if name not in each.operands:
                continue
            if each.opcode in ("dynamic-slice", "slice", "gather") and each.operands[0] == name:
                total += _size(each.type)
            elif each.opcode == "dynamic-update-slice" and each.operands[0] == name:
                continue
            elif each.opcode == "bitcast":
                if (below := self._slices(inner, each.name)) is None:
                    return None
                total += below
            elif each.opcode == "fusion":
                called = self._module.computations[dict(each.called())["calls"]]
                inside = _parameters(called).get(each.operands.index(name))
                if inside is None or (below := self._slices(called, inside)) is None:
                    return None
                total += below
            else:
                return None
        return total


def _parameters(computation: Mapping[str, Instruction]) -> dict[int, str]:
    """Names of a computation's parameters, by their numbers."""
    found = ((each.name, _NUMBER.match(each.rest)) for each in computation.values() if each.opcode == "parameter")
    return {int(number[1]): name for name, number in found if number}


def _size(type_: str) -> float:
    """Bytes of all arrays of a type."""
    return float(sum(array.bytes for array in arrays_of(type_)))


def _hbm(type_: str, besides: Collection[tuple[str, tuple[int, ...]]] = ()) -> float:
    """Bytes of those of them that lie in HBM, without those of some types and shapes."""
    return float(sum(_in_hbm(array) for array in arrays_of(type_) if (array.dtype, array.shape) not in besides))


def _is_passed(inner: Mapping[str, Instruction], parameter: str) -> bool:
    """Whether a fusion hands a parameter on, to the next one or to a chained collective, and does nothing with it."""
    return all(each.chained or each.root for each in inner.values() if parameter in each.operands)


def _ends(it: Instruction, body: Mapping[str, Instruction]) -> list[Array]:
    """What an instruction takes and gives."""
    return [array for type_ in (*(body[name].type for name in it.operands), it.type) for array in arrays_of(type_)]


def _in_hbm(array: Array) -> int:
    return 0 if _SPACE.search(array.layout) else array.bytes

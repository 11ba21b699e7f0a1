"""Which collective operations a compiled program holds, read from its text (XLA's HLO)."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program for many devices.

    Attributes:
        kind: One of `KINDS`.
        shapes: Type and shape of every result on one device, such as ``("f32", (8, 16))``.
        bytes: All results on one device, once.
        groups: The devices, by their place in the program, that take part together; of a ``collective-permute`` the
            pairs of sender and receiver.
        in_loop: Whether it stands inside a loop, such as the one over layers.
        times: How often one run of the program executes it; a loop of unknown length counts once.
        source: What JAX was tracing, such as ``jit(step)/.../dot_general``; empty where the compiler made it.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    bytes: int
    groups: Groups
    in_loop: bool
    times: int
    source: str

    @property
    def group_size(self) -> int:
        """Devices that take part together."""
        return max(map(len, self.groups))


@dataclasses.dataclass(frozen=True)
class _Line:
    """An instruction: ``%name = type opcode(operands), attributes``."""

    name: str
    type: str
    opcode: str
    rest: str


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|token|bf16|[a-z]\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(condition|body|calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count["\\]*:\s*\{["\\]*n["\\]*:\s*["\\]*(\d+)')


def collectives(compiled_text: str) -> list[Collective]:
    """The collectives of a program, those of the entry computation and of all that it calls, in the text's order.

    An asynchronous pair (``all-gather-start``, ``all-gather-done``) is one.

    Args:
        compiled_text: What ``jitted.lower(...).compile().as_text()`` gives.

    Raises:
        ValueError: The text is no HLO module, or names its groups of devices in an unknown way.
    """
    entry, computations = _computations(compiled_text)
    devices = math.prod(int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", compiled_text[:100_000]))
    runs = _runs(entry, computations)
    return [
        _collective(kind, line, lines, devices, *runs[name])
        for name, lines in computations.items()
        if name in runs
        for line in lines
        for kind in KINDS
        if line.opcode in (kind, f"{kind}-start")
    ]


def _computations(text: str) -> tuple[str, Mapping[str, list[_Line]]]:
    """The entry's name, and the instructions of every computation by its name."""
    entry, current = "", ""
    found: dict[str, list[_Line]] = {}
    for raw in text.splitlines():
        if header := _COMPUTATION.match(raw):
            current = header[2]
            found[current] = []
            entry = current if header[1] else entry
        elif current and (instruction := _INSTRUCTION.match(raw)):
            found[current].append(_line(instruction[1], instruction[2]))
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    return entry, found


def _line(name: str, definition: str) -> _Line:
    """Splits behind the type, which may be a tuple in parentheses and holds layouts such as ``{1,0:T(8,128)}``."""
    depth = end = 0
    while definition[end] != " " or depth:
        depth += (definition[end] in "({[") - (definition[end] in ")}]")
        end += 1
    opcode, _, rest = definition[end + 1 :].partition("(")
    return _Line(name, definition[:end], opcode, rest)


def _runs(entry: str, computations: Mapping[str, Sequence[_Line]]) -> Mapping[str, tuple[bool, int]]:
    """For every computation that is reached: whether inside a loop, and how often it runs."""
    times: defaultdict[str, int] = defaultdict(int)
    looped: defaultdict[str, bool] = defaultdict(bool)

    def visit(name: str, in_loop: bool, count: int) -> None:
        times[name] += count
        looped[name] |= in_loop
        for line in computations[name]:
            loop = line.opcode == "while"
            trips = int(found[1]) if loop and (found := _TRIPS.search(line.rest)) else 1
            for called in _called(line):
                if called in computations:
                    visit(called, in_loop or loop, count * trips)

    visit(entry, False, 1)
    return {name: (looped[name], times[name]) for name in times}


def _called(line: _Line) -> Iterator[str]:
    for _, names in _CALLED.findall(line.rest):
        yield from (name.strip().lstrip("%") for name in names.strip("{}").split(",") if name.strip())


def _collective(
    kind: str, line: _Line, neighbours: Sequence[_Line], devices: int, in_loop: bool, times: int
) -> Collective:
    type_ = line.type
    if line.opcode.endswith("-start"):
        # The type of the start names its operands too; that of the end the results alone.
        operand = re.compile(rf"%?{re.escape(line.name)}\b(?![.\-])")
        type_ = next(x.type for x in neighbours if x.opcode == f"{kind}-done" and operand.search(x.rest))
    shapes = tuple(
        (dtype, tuple(int(n) for n in sizes.split(",") if n))
        for dtype, sizes in _ARRAY.findall(_without_layouts(type_))
    )
    source = re.search(r'op_name="([^"]*)"', line.rest)
    return Collective(
        kind=kind,
        shapes=shapes,
        bytes=sum(-(-_bits(dtype) * math.prod(shape) // 8) for dtype, shape in shapes),
        groups=_groups(line.rest, devices),
        in_loop=in_loop,
        times=times,
        source=source[1] if source else "",
    )


def _without_layouts(type_: str) -> str:
    return re.sub(r"\{[^{}]*\}", "", type_)


def _bits(dtype: str) -> int:
    """``pred`` is stored in a byte, ``s4`` in half of one; ``f8e4m3fn`` and its kin spell their width first."""
    if dtype in ("pred", "token"):
        return 8 if dtype == "pred" else 0
    width = re.search(r"\d+", dtype)
    assert width is not None, f"the pattern of arrays admits a type without a width: {dtype}"
    return int(width[0])


def _groups(attributes: str, devices: int) -> Groups:
    """Reads the notations of XLA.

    They are ``{{0,1},{2,3}}``; ``{}``, all together; ``[2,4]<=[4,2]T(1,0)``, an iota, transposed and reshaped; and
    ``mesh['a'=2,'b'=4] {'b'}``, the groups along axes of a mesh, or along a part of one: ``{'b':(2)2}``.
    """
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        return _listed(pairs[1]) or ((0,),)
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?\s*)*)\}", attributes):
        return _listed(listed[1]) or (tuple(range(devices)),)
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", attributes):
        return _rows(_iota(iota[2], iota[3]).reshape(_numbers(iota[1])))
    if mesh := re.search(rf"replica_groups=mesh\[([^]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}", attributes):
        return _along_axes(mesh[1], _iota(mesh[2], mesh[3]) if mesh[2] else None, mesh[4])
    raise ValueError(f"a collective's groups of devices are written in an unknown way: {attributes[:300]}")


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _iota(dims: str, order: str | None) -> np.ndarray:
    shape = _numbers(dims)
    return np.arange(math.prod(shape)).reshape(shape).transpose(_numbers(order) if order else range(len(shape)))


def _along_axes(axes: str, order: np.ndarray | None, chosen: str) -> Groups:
    """The groups along the `chosen` axes of a mesh whose places `order` gives to devices."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    places = np.arange(math.prod(sizes.values())) if order is None else order
    cuts: dict[str, set[int]] = {name: {1, size} for name, size in sizes.items()}
    wanted = set()
    for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", chosen):
        start, end = (int(before), int(before) * int(size)) if before else (1, sizes[name])
        cuts[name] |= {start, end}
        wanted.add((name, start, end))
    # Every axis falls into parts between its cuts, the major first; a part is taken or is not.
    parts = [(name, a, b) for name, cut in cuts.items() for a, b in itertools.pairwise(sorted(cut))]
    taken = [i for i, (name, a, b) in enumerate(parts) if any(n == name and s <= a and b <= e for n, s, e in wanted)]
    others = [i for i in range(len(parts)) if i not in taken]
    grid = places.reshape([b // a for _, a, b in parts]).transpose(others + taken)
    return _rows(grid.reshape(-1, math.prod(parts[i][2] // parts[i][1] for i in taken)))


def _rows(groups: np.ndarray) -> Groups:
    return tuple(tuple(int(n) for n in group) for group in groups)


def _listed(text: str) -> Groups:
    return tuple(_numbers(group) for group in re.findall(r"\{([\d,]+)\}", text))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))

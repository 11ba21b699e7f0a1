"""Which collective operations a compiled program holds, read from its text (XLA's HLO)."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from spt_jax.parallel.hlo_text import Instruction, Module, arrays_of, read_module, starts_chain

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
        times: How often one run of the program executes it; a loop of unknown length counts as often as the reader
            was told, once by default.
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

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all its `times`, in the best known algorithm (as many arrive)."""
        share = (self.group_size - 1) / self.group_size
        once = {
            "all-reduce": 2 * self.bytes * share,
            "reduce-scatter": self.bytes * (self.group_size - 1),
            "collective-permute": self.bytes,
        }
        return self.times * once.get(self.kind, self.bytes * share)


def collectives(compiled_text: str, unknown_trips: int = 1) -> list[Collective]:
    """The collectives of a program, those of the entry computation and of all that it calls, in the text's order.

    An asynchronous pair (``all-gather-start``, ``all-gather-done``) is one; so is a chain of fusions that carry it on.

    Args:
        compiled_text: What ``jitted.lower(...).compile().as_text()`` gives.
        unknown_trips: How often the body of a loop runs of which the text does not say it.

    Raises:
        ValueError: The text is no HLO module, or names its groups of devices in an unknown way.
    """
    module = read_module(compiled_text)
    runs = _runs(module, unknown_trips)
    return [
        _collective(kind, instruction, body, module.devices, *runs[name])
        for name, body in module.computations.items()
        if name in runs
        for instruction in body.values()
        for kind in KINDS
        if instruction.opcode in (kind, f"{kind}-start") and (not instruction.chained or starts_chain(body))
    ]


def _runs(module: Module, unknown_trips: int) -> Mapping[str, tuple[bool, int]]:
    """For every computation that is reached: whether inside a loop, and how often it runs."""
    times: defaultdict[str, int] = defaultdict(int)
    looped: defaultdict[str, bool] = defaultdict(bool)

    def visit(name: str, in_loop: bool, count: int) -> None:
        times[name] += count
        looped[name] |= in_loop
        for instruction in module.computations[name].values():
            loop = instruction.opcode == "while"
            trips = module.trips(instruction, unknown_trips) if loop else 1
            for _, called in instruction.called():
                if called in module.computations:
                    visit(called, in_loop or loop, count * trips)

    visit(module.entry, False, 1)
    return {name: (looped[name], times[name]) for name in times}


def _collective(
    kind: str, it: Instruction, body: Mapping[str, Instruction], devices: int, in_loop: bool, times: int
) -> Collective:
    type_ = it.type
    if it.opcode.endswith("-start"):
        # The type of the start names its operands too; that of the end the results alone.
        type_ = next(each.type for each in body.values() if each.opcode == f"{kind}-done" and it.name in each.operands)
    arrays = arrays_of(type_)
    source = re.search(r'op_name="([^"]*)"', it.rest)
    return Collective(
        kind=kind,
        shapes=tuple((array.dtype, array.shape) for array in arrays),
        bytes=sum(array.bytes for array in arrays),
        groups=_groups(it.rest, devices),
        in_loop=in_loop,
        times=times,
        source=source[1] if source else "",
    )


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

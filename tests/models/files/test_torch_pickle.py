"""The pickle of a torch file is read, never run: anything but tensors is refused by name."""

from __future__ import annotations

import collections
import functools
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_archives import Pickled, archive, reading, refused_pickle

from spt_jax.errors import UserError
from spt_jax.models.files.torch_file import TorchFolder, TorchTrainingCheckpoint


def marked(folder: Path) -> tuple[str, Path]:
    marker = folder / "executed"
    return f"touch {marker}", marker


class Reduced:
    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return self.parts


ATTACKS: dict[str, Callable[[str], Any]] = {
    "os.system": lambda command: Reduced(os.system, (command,)),
    "eval": lambda command: Reduced(eval, (f"__import__('os').system({command!r})",)),
    "getattr": lambda command: Reduced(getattr, (Reduced(__import__, ("os",)), "system")),
    "partial": lambda command: Reduced(functools.partial, (os.system, command)),
    "setstate": lambda command: Reduced(functools.partial, (print,), (os.system, (command,), {}, {"x": 1})),
    "hook": lambda command: collections.OrderedDict(a=Reduced(os.system, (command,))),
    "items": lambda command: Reduced(
        collections.OrderedDict, (), None, None, iter([("a", Reduced(os.system, (command,)))])
    ),
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_pickle_that_calls_anything_is_refused_by_name_and_not_run(
    attack: str, protocol: int, tmp_path: Path
) -> None:
    command, marker = marked(tmp_path)
    pickled = pickle.dumps({"a": ATTACKS[attack](command)}, protocol)
    refused_pickle(tmp_path, pickled, "asks for '", "never run")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (b"\x80\x02cos\nsystem\n.", ("'os.system'",)),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", ("'os.system'",)),
        (b"\x80\x04\x8c\x05torch\x8c\x0e_utils.os.name\x93.", ("'torch._utils.os.name'",)),
        (b"\x80\x04\x8c\x0ctorch._utils\x8c\x06import\x93.", ("'torch._utils.import'",)),
        (b"\x80\x02ctorch\n_utils._rebuild_tensor_v2\n.", ("'torch._utils._rebuild_tensor_v2'",)),
        (b"\x80\x02ctorch\nload\n.", ("'torch.load'",)),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2 \n.", ("asks for",)),
        (b"(S'touch x'\nios\nsystem\n.", ("instruction STRING",)),
        (b"(ios\nsystem\n.", ("instruction INST",)),
        (b"\x80\x02(]o.", ("instruction OBJ",)),
        (b"\x80\x02})\x81.", ("instruction NEWOBJ",)),
        (b"\x80\x04}}}\x92.", ("instruction NEWOBJ_EX",)),
        (b"\x80\x02\x82\x01.", ("instruction EXT1",)),
        (b"\x80\x02\x83\x01\x00.", ("instruction EXT2",)),
        (b"\x80\x02\x84\x01\x00\x00\x00.", ("instruction EXT4",)),
        (b"Pstorage\n.", ("instruction PERSID",)),
        (b"\x80\x05\x97.", ("instruction NEXT_BUFFER",)),
    ],
)
def test_instructions_that_torch_never_writes_are_refused(
    pickled: bytes, words: tuple[str, ...], tmp_path: Path
) -> None:
    refused_pickle(tmp_path, pickled, *words)


def test_attributes_may_be_set_on_nothing_but_a_state_dict(tmp_path: Path) -> None:
    write = Pickled()
    attributes = b"}" + write.text("__code__") + b"Ns"
    tensor = write.tensor("0", "FloatStorage", 6, 0, (6,), (1,))
    for target in (write.name("torch._utils", "_rebuild_tensor_v2"), tensor, b"]"):
        refused_pickle(tmp_path, b"\x80\x02" + target + attributes + b"b.", "damaged", "not a dict")
    inner = write.state({"a": tensor})[:-1]
    archive(tmp_path / "pytorch_model.bin", inner + attributes + b"b.", {"0": bytes(24)})
    assert TorchFolder(tmp_path).shapes == {"a": (6,)}


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (("0", "FloatStorage", 6, 1, (6,), (1,)), ("ends behind its storage",)),
        (("0", "FloatStorage", 6, 0, (2, 3), (4, 1)), ("ends behind its storage",)),
        (("0", "FloatStorage", 7, 0, (7,), (1,)), ("'a'", "24 bytes", "7 elements of F32 take 28")),
        (("0", "DoubleStorage", 6, 0, (6,), (1,)), ("24 bytes", "take 48")),
        (("1", "FloatStorage", 6, 0, (6,), (1,)), ("the tensor 'a' is missing",)),
        (("../../x", "FloatStorage", 6, 0, (6,), (1,)), ("is missing",)),
        (("0", "FloatStorage", 6, -1, (2,), (1,)), ("impossible",)),
        (("0", "FloatStorage", 6, 0, (-2,), (1,)), ("impossible",)),
        (("0", "FloatStorage", 6, 5, (6,), (-1,)), ("impossible",)),
        (("0", "FloatStorage", 6, 0, (2**62, 2**62), (0, 0)), ("impossibl",)),
        (("0", "FloatStorage", 6, 0, (2**30, 2**30), (0, 0)), ("impossibly many elements",)),
        (("0", "FloatStorage", 2**70, 0, (6,), (1,)), ("24 bytes",)),
        (("0", "FloatStorage", -6, 0, (6,), (1,)), ("not a storage",)),
        (("0", "FloatStorage", 6, 0, (6,), (1, 1)), ("do not fit",)),
        (("0", "ComplexFloatStorage", 3, 0, (3,), (1,)), ("'torch.ComplexFloatStorage'",)),
        (("0", "OrderedDict", 3, 0, (3,), (1,)), ("'torch.OrderedDict'",)),
    ],
)
def test_tensors_that_do_not_fit_their_storage_are_refused(
    tensor: tuple[Any, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    write = Pickled()
    refused_pickle(tmp_path, write.state({"a": write.tensor(*tensor)}), *words)


def test_anything_but_a_flat_dict_of_tensors_is_refused(tmp_path: Path) -> None:
    write = Pickled()
    tensor = write.tensor("0", "FloatStorage", 6, 0, (6,), (1,))
    for value, words in {
        b"]": ("a value of type list", "state dict"),
        b"N": ("a value of type NoneType",),
        tensor: ("a single tensor",),
        write.name("torch", "FloatStorage"): ("the name 'torch.FloatStorage'",),
        b"}" + write.text("model") + write.state({"a": tensor})[2:-1] + b"s": ("dict inside its dict", "'model'"),
        b"}" + write.text("epoch") + b"K\x03s": ("a value of type int", "'epoch'"),
        b"}K\x03" + tensor + b"s": ("under 3", "by name alone"),
    }.items():
        refused_pickle(tmp_path, b"\x80\x02" + value + b".", *words)


def test_deep_and_endless_pickles_end_in_a_sentence(tmp_path: Path) -> None:
    deep = b"\x80\x02}" + b"K\x01" + b"\x85" * 200_000 + b"K\x01s."
    refused_pickle(tmp_path, deep, "damaged", "key of type tuple")
    refused_pickle(tmp_path, b"\x80\x02" + b"]" * 100_000, "damaged")
    refused_pickle(tmp_path, b"\x80\x02}q\x00" + Pickled().text("self") + b"h\x00s.", "dict inside its dict", "'self'")
    refused_pickle(tmp_path, b"\x80\x04\x8d" + (2**63 - 1).to_bytes(8, "little") + b"x.", "damaged")


PIECES = [bytes([code]) for code in b"}])(t\x85\x86suaeRbQN\x94."] + [
    b"K\x01",
    b"q\x00",
    b"h\x00",
    b"X\x01\x00\x00\x000",
    b"ccollections\nOrderedDict\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"\x8b\xd0\x07\x00\x00" + b"\x7f" * 2000,  # a number that is too long to print
]


@settings(max_examples=400, deadline=None)
@given(pickled=st.binary(max_size=60) | st.lists(st.sampled_from(PIECES)).map(b"".join))
def test_no_pickle_ends_in_anything_but_a_sentence(tmp_path_factory: pytest.TempPathFactory, pickled: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "pickles"
    archive(folder / "pytorch_model.bin", b"\x80\x02" + pickled + b".", {"0": bytes(24)})
    found = reading(folder)
    assert found is None or found == {}


MORE_PIECES = [
    *PIECES,
    b"X\x06\x00\x00\x00module",
    b"ctorch\nSize\n",
    b"ctorch\nfloat16\n",
    b"c__builtin__\nset\n",
    b"}X\x06\x00\x00\x00module}s",
]


@settings(max_examples=400, deadline=None)
@given(pickled=st.binary(max_size=60) | st.lists(st.sampled_from(MORE_PIECES)).map(b"".join))
def test_no_training_checkpoint_ends_in_anything_but_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, pickled: bytes
) -> None:
    file = archive(tmp_path_factory.getbasetemp() / "checkpoint.pt", b"\x80\x02" + pickled + b".", {"0": bytes(24)})
    try:
        assert TorchTrainingCheckpoint(file, "module").shapes == {}
    except UserError as error:
        assert "\n" not in str(error)


def test_plain_values_beside_a_state_dict_are_read_and_their_types_are_text(tmp_path: Path) -> None:
    write = Pickled()
    tensor = write.tensor("0", "FloatStorage", 6, 0, (2, 3), (3, 1))
    entries = {
        "module": write.state({"a": tensor})[2:-1],
        "size": write.name("torch", "Size") + b"(" + write.numbers((2, 3)) + b"tR",
        "type": write.name("torch", "float16"),
        "names": write.name("__builtin__", "set") + b"(](" + write.text("b") + b"etR",
        "nothing": b"N",
        "nested": b"}" + write.text("x") + write.numbers((1,)) + b"s",
    }
    file = archive(tmp_path / "checkpoint.pt", write.state(entries), {"0": bytes(24)})
    checkpoint = TorchTrainingCheckpoint(file, "module")
    assert checkpoint.shapes == {"a": (2, 3)} and not checkpoint.read("a").any()
    expected = {"size": (2, 3), "type": "float16", "names": {"b"}, "nothing": None, "nested": {"x": (1,)}}
    assert checkpoint.values == expected


@pytest.mark.parametrize(
    "value",
    [
        b"ctorch\nSize\n(X\x01\x00\x00\x000tR",
        b"ctorch\nSize\n)R",
        b"c__builtin__\nset\n(](]etR",
        b"ctorch\nfloat16\n)R",
        b"c__builtin__\nset\n(K\x01tR",
    ],
)
def test_calls_that_deepspeed_never_writes_are_refused(value: bytes, tmp_path: Path) -> None:
    file = archive(tmp_path / "checkpoint.pt", b"\x80\x02}X\x01\x00\x00\x00a" + value + b"s.", {})
    with pytest.raises(UserError, match="is damaged: its pickle does not parse"):
        TorchTrainingCheckpoint(file, "module")


@pytest.mark.parametrize("name", ["torch.Size", "torch.float16", "__builtin__.set"])
def test_a_file_of_weights_alone_may_not_name_what_a_checkpoint_may(name: str, tmp_path: Path) -> None:
    module, _, attribute = name.rpartition(".")
    refused_pickle(tmp_path, b"\x80\x02" + Pickled().name(module, attribute) + b".", f"asks for '{name}'")

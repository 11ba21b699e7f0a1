from __future__ import annotations

import gzip
import lzma
import tracemalloc
from pathlib import Path

import pytest

from spt_jax.data import persona_key, read_dialogues
from spt_jax.data.sources import LONGEST_LINE
from spt_jax.errors import UserError

TEXT = b"1 your persona: i run.\n2 hi\thello\n"


def test_shared_validation_file_is_1000_dialogues_and_7801_turns(valid_set):
    assert (len(valid_set), valid_set.turns, valid_set.skipped) == (1000, 7801, ())
    assert valid_set.dialogues[0].persona[1] == "i'm a stunt double as my second job."
    assert not any(turn.candidates for dialogue in valid_set.dialogues for turn in dialogue.turns)


def test_shared_training_file_is_1356_dialogues_and_10000_turns(train_set):
    assert (len(train_set), train_set.turns, train_set.skipped) == (1356, 10000, ())


def test_file_with_candidates_is_the_same_dialogues_with_20_candidates_of_which_the_last_answers(valid_set, shared_dir):
    ranked = read_dialogues(str(shared_dir / "data" / "convai2" / "valid_self_original.txt.xz"))
    assert len(ranked) == len(valid_set)
    for with_candidates, plain in zip(ranked.dialogues, valid_set.dialogues, strict=True):
        assert with_candidates.persona == plain.persona
        assert [(t.query, t.response) for t in with_candidates.turns] == [(t.query, t.response) for t in plain.turns]
        for turn in with_candidates.turns:
            assert len(turn.candidates) == 20 and turn.candidates[-1] == turn.response


def test_builtin_sets_are_read_from_the_package_and_share_no_persona():
    train, heldout = read_dialogues("builtin:train"), read_dialogues("builtin:heldout")
    assert train.dialogues[0].source == "builtin:train:1"
    assert len(train) + len(heldout) >= 80 and len(heldout) >= 16
    personas = [{persona_key(d.persona) for d in part.dialogues} for part in (train, heldout)]
    assert not personas[0] & personas[1]


@pytest.mark.parametrize(("name", "pack"), [("a.txt", bytes), ("a.txt.gz", gzip.compress), ("a.txt.xz", lzma.compress)])
def test_compressed_files_read_like_plain_ones(tmp_path: Path, name, pack):
    (tmp_path / name).write_bytes(pack(TEXT))
    read = read_dialogues(str(tmp_path / name))
    assert read.dialogues[0].turns[0].response == "hello"
    assert read.dialogues[0].source == f"{tmp_path / name}:1"


def test_format_overrides_the_name(tmp_path: Path):
    (tmp_path / "dialogues.dat").write_bytes(TEXT)
    with pytest.raises(UserError, match=r"cannot be told from the name's end '\.dat'"):
        read_dialogues(str(tmp_path / "dialogues.dat"))
    assert len(read_dialogues(str(tmp_path / "dialogues.dat"), format="parlai")) == 1


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path):
    def refused(name: str, pattern: str, **options) -> None:
        with pytest.raises(UserError, match=pattern):
            read_dialogues(name, **options)

    (tmp_path / "valid.txt").write_bytes(TEXT)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b"\n \n")
    (tmp_path / "broken.txt").write_bytes(b"1 a\n2 b\n")
    whole = lzma.compress(TEXT * 100)
    (tmp_path / "cut.txt.xz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(TEXT * 100)[:-9])
    (tmp_path / "false.txt.gz").write_bytes(TEXT)
    refused(str(tmp_path / "vald.txt"), r"vald\.txt does not exist\. Did you mean '.*valid\.txt'\?")
    refused(str(tmp_path / "nowhere" / "valid.txt"), "does not exist")
    refused(str(tmp_path / "empty.txt"), "is empty")
    refused(str(tmp_path / "blank.txt"), "holds no dialogue")
    refused(
        str(tmp_path / "broken.txt"), "holds no dialogue; all its lines are malformed, the first: ", on_error="skip"
    )
    refused(str(tmp_path / "cut.txt.xz"), r"cut\.txt\.xz cannot be read to its end")
    refused(str(tmp_path / "cut.txt.gz"), r"cut\.txt\.gz cannot be read to its end")
    refused(str(tmp_path / "false.txt.gz"), r"false\.txt\.gz cannot be read to its end")
    refused(str(tmp_path), "is a folder", format="parlai")
    refused("builtin:trian", "Did you mean 'builtin:train'")
    refused("builtin:train", "Did you mean 'jsonl'", format="jsnl")
    refused("builtin:train", "which has none; data.format='datasets' reads tables", columns={"persona": "p"})


@pytest.mark.parametrize("unpacked", [b"a" * (1 << 26), b"\n" * (1 << 23)], ids=["one line", "lines without end"])
def test_a_small_file_that_unfolds_is_refused_in_little_memory(unpacked: bytes, tmp_path: Path):
    path = tmp_path / "bomb.txt.xz"
    path.write_bytes(lzma.compress(unpacked))
    assert path.stat().st_size < 20_000
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"xz(:1: the line is longer than 16 MiB| unpacks to more than 200 times)"):
            read_dialogues(str(path), on_error="skip")
        assert tracemalloc.get_traced_memory()[1] < 5 * LONGEST_LINE
    finally:
        tracemalloc.stop()


def test_the_longest_line_that_is_allowed_is_read(tmp_path: Path):
    path, start = tmp_path / "long.txt", b"1 your persona: "
    path.write_bytes(start + b"i" * (LONGEST_LINE - len(start) - 1) + b"\n2 hi\thello\n")
    (dialogue,) = read_dialogues(str(path)).dialogues
    assert len(dialogue.persona[0]) == LONGEST_LINE - len(start) - 1
    path.write_bytes(b"1" + path.read_bytes())
    with pytest.raises(UserError, match=r"long\.txt:1: the line is longer than 16 MiB"):
        read_dialogues(str(path))


def test_skipped_lines_are_listed(tmp_path: Path):
    path = tmp_path / "some.txt"
    path.write_bytes(TEXT + b"3 broken\n4 a\tb\n")
    read = read_dialogues(str(path), on_error="skip")
    assert read.turns == 2 and read.name == str(path)
    assert len(read.skipped) == 1 and read.skipped[0].startswith(f"{path}:3: no tab")

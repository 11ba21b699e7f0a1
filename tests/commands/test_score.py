from __future__ import annotations

import json

import numpy as np
import pytest
from absl import flags
from tiny_run import TALK, walk, write_dialogues

from spt_jax.commands.data_flags import define_on_error
from spt_jax.commands.main import main
from spt_jax.data.problems import ON_ERROR
from spt_jax.data.sources import read_dialogues

FIELDS = ["dialogue", "turn", "target_tokens", "nll", "scores", "selected"]


@pytest.fixture
def score(trained, tmp_path):
    """Scores a file; gives the objects written."""

    def run(data, *more: str) -> list[dict]:
        walk("score", f"--workdir={trained / 'run'}", f"--data={data}", f"--out={tmp_path / 'out.jsonl'}", *more)
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    return run


def assert_same(packed: list[dict], turns: list[dict]) -> None:
    names = ("dialogue", "turn", "target_tokens", "selected")
    assert [[a[name] for name in names] for a in packed] == [[b[name] for name in names] for b in turns]
    for name in ("nll", "scores"):
        a, b = (np.array([line[name] for line in lines]) for lines in (packed, turns))
        assert np.abs(a - b).max() / np.abs(b).max() <= 1e-5


def test_one_object_a_turn_in_file_order_with_exactly_the_promised_fields(score, tmp_path, capsys):
    # Lengths in no order, so that buckets and batches deal the rows otherwise than the file does.
    written = score(write_dialogues(tmp_path / "d.txt"))
    assert [(line["dialogue"], line["turn"]) for line in written] == [
        (d, t) for d, (_, turns) in enumerate(TALK) for t in range(len(turns))
    ]
    for line in written:
        assert list(line) == FIELDS
        assert line["target_tokens"] == len(f" {TALK[line['dialogue']][1][line['turn']][1]}".encode()) + 1
        assert len(line["nll"]) == len(line["scores"]) == 3
        assert line["selected"] == int(np.argmax(line["scores"]))
    said = capsys.readouterr()
    total = sum(line["target_tokens"] * line["nll"][line["selected"]] for line in written)
    perplexity = np.exp(total / sum(line["target_tokens"] for line in written))
    assert f"{len(written)} turns of {len(TALK)} dialogues: perplexity {perplexity:.3f}, in " in said.out
    assert "scoring turns" in said.err


def test_both_layouts_give_the_same_numbers_on_real_dialogues(score, shared_dir, tmp_path):
    source = shared_dir / "data" / "convai2" / "valid_self_original_no_cands.txt"
    by_length = sorted(
        read_dialogues(str(source)).dialogues, key=lambda d: sum(len(t.query + t.response) for t in d.turns)
    )
    # Three that fit into one row, and one that does not.
    real = [
        (" ".join(line.removesuffix(".") for line in d.persona), tuple((t.query, t.response) for t in d.turns))
        for d in [*by_length[:3], by_length[500]]
    ]
    data = write_dialogues(tmp_path / "real.txt", real)
    packed, turns = score(data, "--layout=dialogue"), score(data, "--layout=turn")
    assert len(packed) == sum(len(d) for _, d in real)
    assert_same(packed, turns)


def test_rows_longer_than_the_limit_are_cut_alike_in_both_layouts(score, tmp_path):
    chatter = tuple((f"question {i} of many", f"an answer, the {i}th, of the usual length") for i in range(12))
    data = write_dialogues(tmp_path / "long.txt", [("i talk.", chatter), TALK[0]])
    packed, turns = score(data), score(data, "--layout=turn")
    assert len(packed) == 14
    assert_same(packed, turns)


def test_limit_scores_the_first_dialogues_alone(score, tmp_path):
    data = write_dialogues(tmp_path / "d.txt")
    whole, first = score(data), score(data, "--limit=2")
    assert_same(first, whole[: len(first)])
    assert {line["dialogue"] for line in first} == {0, 1}


def test_skipped_lines_are_told_and_the_rest_is_scored(trained, score, tmp_path, capsys, monkeypatch):
    data = write_dialogues(tmp_path / "d.txt", TALK[:2])
    data.write_text(data.read_text().replace("\ti bake\n", "\t \n"))
    assert main(["score", f"--workdir={trained / 'run'}", f"--data={data}", f"--out={tmp_path / 'no.jsonl'}"]) == 2
    assert f"{data}:5: " in capsys.readouterr().err
    assert not (tmp_path / "no.jsonl").exists()


def test_an_output_that_cannot_be_written_is_told_before_the_run_is_opened(tmp_path, capsys):
    data = write_dialogues(tmp_path / "d.txt")
    out = tmp_path / "no" / "o.jsonl"
    assert main(["score", f"--workdir={tmp_path}", f"--data={data}", f"--out={out}"]) == 2
    assert "the folder" in capsys.readouterr().err


def test_on_error_is_what_the_option_is():
    flag_values = flags.FlagValues()
    define_on_error(flag_values)
    assert flag_values["on_error"].parser.enum_values == list(ON_ERROR)


def test_malformed_lines_are_left_out_where_that_is_asked_for(score, tmp_path, capsys):
    whole = score(write_dialogues(tmp_path / "d.txt"))
    with (tmp_path / "d.txt").open("a") as file:
        file.write("1 your persona: i sail .\n2 no tab\n")
    assert score(tmp_path / "d.txt", "--on_error=skip") == whole
    assert "skipped " in capsys.readouterr().err


def test_standard_output_takes_the_lines_alone(trained, tmp_path, capfd):
    data = write_dialogues(tmp_path / "d.txt")
    walk("score", f"--workdir={trained / 'run'}", f"--data={data}", f"--out={tmp_path / 'out.jsonl'}")
    capfd.readouterr()
    walk("score", f"--workdir={trained / 'run'}", f"--data={data}", "--out=-")
    said = capfd.readouterr()
    assert said.out == (tmp_path / "out.jsonl").read_text()
    assert "dialogues: perplexity" in said.err

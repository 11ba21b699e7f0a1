from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluated_folders import references, replies, write_run

from spt_jax.commands.main import main

TURNS = references(8)
FILES = ["comparison.json", "table.csv", "table.html", "table.tex"]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [
        write_run(
            tmp_path / "runs" / f"{method}{seed}",
            TURNS,
            replies(TURNS, quality, seed),
            seed=seed,
            settings={"method": {"kind": method}},
        )
        for method, quality in (("pt", 0.2), ("spt", 0.6))
        for seed in (0, 1)
    ]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["compare", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("spt-jax compare: ")
    assert said.err.count("\n") == 1
    return said.err


def test_a_comparison_is_printed_and_written(folders: list[Path], tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    out = tmp_path / "new" / "out"
    runs = [f"{folders[0]}/", *map(str, folders[1:])]
    assert main(["compare", *runs, f"--baseline={folders[2]}", f"--out={out}", "--samples=100"]) == 0
    said = capsys.readouterr().out
    assert "Mean change" in said
    assert "Change over spt" in said
    assert str(out / "table.html") in said
    assert sorted(path.name for path in out.iterdir()) == FILES
    figures = json.loads((out / "comparison.json").read_text())
    assert [row["label"] for row in figures["rows"]] == ["pt", "spt"]
    assert (figures["baseline"], figures["samples"], figures["seed"]) == ("spt", 100, 0)
    before = (out / "comparison.json").read_text()
    assert main(["compare", *runs, f"--baseline={folders[2]}", f"--out={out}", "--samples=100"]) == 0
    assert (out / "comparison.json").read_text() == before


def test_every_run_is_a_row_on_request_and_flags_may_name_runs(folders: list[Path], tmp_path: Path) -> None:
    runs = [f"--runs={folder}" for folder in folders]
    assert main(["compare", *runs, "--nogroup", f"--out={tmp_path / 'out'}", "--samples=100", "--seed=3"]) == 0
    figures = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["label"] for row in figures["rows"]] == ["pt0", "pt1", "spt0", "spt1"]
    assert figures["seed"] == 3


def test_mistakes_are_one_sentence_and_write_nothing(folders: list[Path], tmp_path: Path, capsys) -> None:
    a, b = map(str, folders[:2])
    out = f"--out={tmp_path / 'out'}"
    assert "no run is given" in refused(capsys)
    assert "is not the working directory of a run" in refused(capsys, a, str(tmp_path), out)
    assert "is given twice" in refused(capsys, a, a, out)
    assert "is not among the runs" in refused(capsys, a, b, "--baseline=c", out)
    assert "--samples is '5'; allowed: a whole number, 100 or more" in refused(capsys, a, b, "--samples=5", out)
    (folders[1] / "results.json").unlink()
    said = refused(capsys, a, b, out)
    assert f"{b} has not been evaluated; run: spt-jax evaluate --workdir={b}" in said
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("x")
    assert "is a file; allowed: a folder" in refused(capsys, a, f"--out={tmp_path / 'file'}")


def test_runs_on_other_turns_are_refused_with_the_first_difference(folders, tmp_path: Path, capsys) -> None:
    other = write_run(tmp_path / "other", TURNS[1:], replies(TURNS[1:], 0.3, 1))
    said = refused(capsys, str(folders[0]), str(other), f"--out={tmp_path / 'out'}")
    assert "not evaluated on the same turns: turn 0 of dialogue 0 has a reply in" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ({"settings": 3}, "its 'settings' are not values by name"),
        ({"settings": "x"}, "its 'settings' are not values by name"),
        ({"settings": [["evaluation.selection", "soft"]]}, "its 'settings' are not values by name"),
        ({"settings": {"evaluation.selection": "\ud83d"}}, "holds half of a surrogate pair"),
        ({"checkpoint": 3}, "its 'checkpoint' is no text"),
        ({"checkpoint": None}, "its 'checkpoint' is no text"),
    ],
)
def test_damaged_settings_of_an_evaluation_are_one_sentence(folders, capsys, damage, sentence) -> None:
    path = folders[1] / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    said = refused(capsys, str(folders[0]), str(folders[1]))
    assert str(path) in said and sentence in said


@pytest.mark.parametrize("value", [None, [3], {"a": [None]}, {}, float("nan"), 10**400])
def test_settings_whose_values_no_option_has_part_rows_and_are_told(folders, capsys, monkeypatch, value) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    for folder, selection in zip(folders[:2], ("hard", value), strict=True):
        path = folder / "results.json"
        settings = {"evaluation.selection": selection}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": settings}))
    assert main(["compare", *map(str, folders[:2]), "--samples=100"]) == 0
    told = f"different evaluation.selection: 'hard' (pt0), {value!r} (pt1)."
    assert told in capsys.readouterr().out


def test_control_characters_of_results_never_reach_the_terminal(folders, capsys) -> None:
    path = folders[0] / "results.json"
    steering = {"data": "\x1b[2Jvalid.txt", "settings": {"evaluation.\x1b[2J": 1}}
    path.write_text(json.dumps(json.loads(path.read_text()) | steering))
    assert main(["compare", *map(str, folders[:2]), "--samples=100"]) == 0
    said = capsys.readouterr().out
    assert "dialogues of [2Jvalid.txt" in said and "different evaluation.[2J" in said
    assert "\x1b[2J" not in said


def test_a_real_evaluation_can_be_compared(trained: Path, capsys) -> None:
    assert main(["compare", str(trained / "run"), "--samples=100"]) == 0
    assert "5 replies in" in capsys.readouterr().out

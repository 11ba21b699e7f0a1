from __future__ import annotations

import json
from pathlib import Path

import pytest

from spt_jax.commands.restored import heldout_dialogues
from spt_jax.config import default_config
from spt_jax.data import Turn, read_dialogues
from spt_jax.errors import UserError
from spt_jax.training.experiment import read_splits

datasets = pytest.importorskip("datasets")

ROWS = [
    {"personality": ["i run."], "past": ["q1"], "answer": "r1", "options": ["x", "r1"]},
    {"personality": ["i run."], "past": ["q1", "r1", "q2"], "answer": "r2", "options": ["y", "r2"]},
    {"personality": ["i swim."], "past": ["q3"], "answer": "r3", "options": ["z", "r3"]},
]
COLUMNS = {"persona": "personality", "history": "past", "response": "answer", "candidates": "options"}
EXPECTED = [(Turn("q1", "r1", ("x", "r1")), Turn("q2", "r2", ("y", "r2"))), (Turn("q3", "r3", ("z", "r3")),)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(form: str, folder: Path) -> str:
    table = datasets.Dataset.from_list(ROWS)
    match form:
        case "parquet":
            table.to_parquet(folder / "rows.parquet")
            return str(folder / "rows.parquet")
        case "json":
            (folder / "rows.json").write_text("\n".join(json.dumps(row) for row in ROWS))
            return str(folder / "rows.json")
        case "data folder":
            (folder / "set").mkdir()
            table.to_parquet(folder / "set" / "train.parquet")
            return str(folder / "set")
        case "saved":
            table.save_to_disk(folder / "saved")
            return str(folder / "saved")
        case "arrow":
            table.save_to_disk(folder / "saved")
            return str(next((folder / "saved").glob("*.arrow")))
        case _:
            datasets.DatasetDict({"train": table}).save_to_disk(folder / "saved dict")
            return str(folder / "saved dict")


@pytest.mark.parametrize("form", ["parquet", "json", "data folder", "saved", "arrow", "saved dict"])
def test_every_local_form_gives_the_same_dialogues(form, tmp_path, capsys):
    source = write(form, tmp_path)
    capsys.readouterr()
    read = read_dialogues(source, columns=COLUMNS)
    assert [d.turns for d in read.dialogues] == EXPECTED
    assert [d.source for d in read.dialogues] == [f"{source}:1", f"{source}:3"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("saved", [True, False], ids=["saved dict", "data folder"])
def test_a_run_learns_from_train_is_tuned_on_validation_and_tested_on_test(saved, tmp_path):
    rows = {
        part: [{"persona": [part], "history": ["hi"], "response": part}] for part in ("train", "validation", "test")
    }
    tables = datasets.DatasetDict({part: datasets.Dataset.from_list(rows[part]) for part in rows})
    if saved:
        tables.save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        for part, table in tables.items():
            table.to_parquet(tmp_path / "set" / f"{part}.parquet")
    config = default_config()
    config.data.train = config.data.development = config.data.test = str(tmp_path / "set")
    splits = read_splits(config)
    for name, part in {"train": "train", "development": "validation", "test": "test"}.items():
        (dialogue,) = getattr(splits, name)
        assert dialogue.persona == (part,)
        assert heldout_dialogues(config, tmp_path, str(tmp_path / "set"), split=name)[1] == [dialogue]


def test_csv_rows_and_tables_of_turns(tmp_path: Path):
    (tmp_path / "t.csv").write_text('persona,history,response\n"i run.\ni swim.",hello,hi\n')
    (one,) = read_dialogues(str(tmp_path / "t.csv")).dialogues
    assert (one.persona, one.turns) == (("i run.", "i swim."), (Turn("hello", "hi"),))
    turns = [{"persona": ["p"], "turns": [{"query": "a", "response": "b"}]}] * 2
    datasets.Dataset.from_list(turns).to_parquet(tmp_path / "t.parquet")
    assert [d.turns for d in read_dialogues(str(tmp_path / "t.parquet")).dialogues] == [(Turn("a", "b"),)] * 2


def test_a_data_set_without_a_name_is_told_without_the_hub():
    with pytest.raises(UserError, match=r"hf: names no data set; allowed: hf:NAME"):
        read_dialogues("hf:")


def test_malformed_rows_are_named_by_number(tmp_path: Path):
    rows = [*ROWS, {**ROWS[2], "answer": " "}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet:4: the response is empty"):
        read_dialogues(str(tmp_path / "t.parquet"), columns=COLUMNS)
    assert read_dialogues(str(tmp_path / "t.parquet"), columns=COLUMNS, on_error="skip").turns == 3


def test_what_a_table_lacks_is_one_sentence(tmp_path: Path):
    source = write("saved dict", tmp_path)
    with pytest.raises(UserError, match=r"has no column 'personalty' for 'persona'; .* Did you mean 'personality'"):
        read_dialogues(source, columns={**COLUMNS, "persona": "personalty"})
    with pytest.raises(UserError, match=r"names the field 'respons'.* Did you mean 'response'"):
        read_dialogues(source, columns={"respons": "answer"})
    with pytest.raises(UserError, match="has no column 'persona' among"):
        read_dialogues(source)
    with pytest.raises(UserError, match="needs a column 'turns', or 'history' and 'response'"):
        read_dialogues(source, columns={"persona": "personality", "history": "past"})
    with pytest.raises(UserError, match=r"has no split 'tran'; .* Did you mean 'train'"):
        read_dialogues(source, columns=COLUMNS, split="tran")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"damaged\.parquet: datasets cannot read"):
        read_dialogues(str(tmp_path / "damaged.parquet"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="nothing: datasets cannot read the split"):
        read_dialogues(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="hf:no/such-set: datasets cannot read the split 'train'"):
        read_dialogues("hf:no/such-set")
    with pytest.raises(UserError, match="does not exist"):
        read_dialogues(str(tmp_path / "gone.parquet"))
    (tmp_path / "notes.docx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"must end in one of \.parquet, .*, not '\.docx'"):
        read_dialogues(str(tmp_path / "notes.docx"), format="datasets")


def test_columns_that_are_not_asked_for_are_not_decoded(tmp_path: Path):
    rows = [row | {"picture": {"bytes": b"no picture", "path": None}} for row in ROWS]
    datasets.Dataset.from_list(rows).cast_column("picture", datasets.Image()).save_to_disk(tmp_path / "saved")
    assert [d.turns for d in read_dialogues(str(tmp_path / "saved"), columns=COLUMNS).dialogues] == EXPECTED

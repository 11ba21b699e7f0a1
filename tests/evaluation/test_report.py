"""Laws of the report: one file, valid, complete, and safe whatever text it is given."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from spt_jax.errors import UserError
from spt_jax.evaluation.report import ReportInputs, flatten, render_report, write_report
from spt_jax.evaluation.report_curves import column
from spt_jax.evaluation.table import FURTHER_ROWS, ROWS
from spt_jax.metric_groups import ALWAYS, GROUPS

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}
EVIL = "<script>alert('x')</script>\"><img src=x onerror=y>"


class Walker(HTMLParser):
    """Walks a document and keeps its elements, its visible text and whatever is out of balance."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.problems: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(document)
        self.close()
        self.problems += [f"<{tag}> stays open" for tag in self.open]

    def handle_starttag(self, tag: str, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()} closes nothing")

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def test_every_figure_of_an_evaluation_has_its_row():
    figures = {figure for group in GROUPS.values() for figure in group.figures} | {*ALWAYS}
    assert sorted(row.key for row in (*ROWS, *FURTHER_ROWS)) == sorted(figures)


def test_the_report_has_the_further_figures_the_notes_and_what_was_evaluated():
    given = inputs()
    columns = {"after training": {"perplexity": 25.0, "rouge_2": 3.25, "perplexity_per_word": 41.5}}
    more = {"columns": columns, "notes": ["METEOR is left out: <WordNet>."], "data": "valid.txt", "step": 300}
    more["settings"] = {"generation.temperature": 0.7}
    text = Walker(render_report(dataclasses.replace(given, results={**given.results, **more}))).text
    for expected in ("Further figures", "3.25", "41.50", "METEOR is left out: <WordNet>.", "valid.txt", "300"):
        assert expected in text
    assert "generation.temperature" in text and "0.7" in text
    assert "Further figures" not in Walker(render_report(given)).text


def inputs(text: str = "a text", steps: int = 80) -> ReportInputs:
    rows = [
        {
            "step": step,
            "loss/total": 5.0 / step,
            "loss/lm": math.nan if step == 7 else 3.0,
            "loss/selection": None,
            "usage/0": 0.4,
            "usage/1": 0.6,
            "learning_rate": 1e-4,
            **({"development/perplexity": 30.0 - step / 10} if step % 20 == 0 else {}),
        }
        for step in range(1, steps + 1)
    ]
    return ReportInputs(
        title=f"Title {text}",
        results={
            "columns": {
                "no soft prompt": {"perplexity": 40.0, "f1": 8.0},
                "before training": {"perplexity": 50.0, "f1": 9.0, "usage": [0.5, 0.5]},
                f"after training{text if text == EVIL else ''}": {"perplexity": 25.0, "f1": 12.0, "usage": [0.1, 0.9]},
            },
            "definitions": {"f1": f"Definition {text}"},
            "versions": {"sacrebleu": text},
            "model": {"name": text, "parameters": 134_515_008},
            "hardware": text,
        },
        metrics=rows,
        selection=[
            {"dialogue": f"{text} {i}", "usage": [i / 3, 1 - i / 3], "scores": [0.1, 0.2], "nll": [3.0, 2.0 + i]}
            for i in range(4)
        ],
        samples=[
            {
                "persona": [f"persona {text}"],
                "history": [f"hello {text}", "hi", "who are you ?"],
                "reference": f"reference {text}",
                "selected": 1,
                "replies": [f"reply zero {text}", f"reply one {text}"],
                "no_prompt": f"plain {text}",
            }
        ],
        config={"train": {"steps": 80, "note": text}, "empty": {}},
        command=f"spt-jax chat --workdir=run --persona='{text}'",
    )


@pytest.mark.parametrize("text", ["a text", EVIL, "ünïcode 😀 & <b>"])
def test_report_is_balanced_html_with_unique_ids_that_its_labels_find(text: str) -> None:
    walker = Walker(render_report(inputs(text)))
    assert walker.problems == []
    ids = Counter(str(attributes["id"]) for _, attributes in walker.elements if "id" in attributes)
    assert set(ids.values()) == {1}
    named = [str(attributes["aria-labelledby"]).split() for tag, attributes in walker.elements if tag == "svg"]
    assert named
    assert all(set(names) <= set(ids) for names in named)


def test_report_loads_nothing_and_says_so_to_the_browser() -> None:
    document = render_report(inputs())
    walker = Walker(document)
    for tag, attributes in walker.elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "video", "audio", "image", "use"), tag
        assert not {"src", "href", "srcset", "xlink:href", "action", "data"} & set(attributes)
    assert not re.search(r"https?://|url\(|@import", document)
    policies = [
        attributes["content"] for tag, attributes in walker.elements if tag == "meta" and "http-equiv" in attributes
    ]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_every_text_of_the_inputs_is_shown_as_text() -> None:
    safe, evil = Walker(render_report(inputs("harmless"))), Walker(render_report(inputs(EVIL)))
    assert Counter(tag for tag, _ in evil.elements) == Counter(tag for tag, _ in safe.elements)
    assert not any(name.startswith("on") for _, attributes in evil.elements for name in attributes)
    for part in ("Title", "Definition", "persona", "hello", "reference", "reply zero", "reply one", "plain"):
        assert f"{part} {EVIL}" in evil.text, part


def test_report_holds_headline_table_curves_maps_samples_and_command() -> None:
    walker = Walker(render_report(inputs()))
    for part in ("50.00 → 25.00", "50.0 % lower", "40.00 → 25.00", "37.5 % lower", "50 / 50 %", "10 / 90 %"):
        assert part in walker.text, part
    for part in (
        "Total loss",
        "LM loss",
        "Perplexity of the selected prompt",
        "Selection by dialogue",
        "Share of turns",
    ):
        assert part in walker.text, part
    assert "spt-jax chat --workdir=run --persona='a text'" in walker.text
    assert "train.steps" in walker.text
    assert "Selection loss" not in walker.text  # never logged: no empty chart
    assert walker.count("caption") == walker.count("table")
    assert sum(attributes.get("class") == "selected" for _, attributes in walker.elements) == 1


def test_selected_prompt_alone_carries_the_badge() -> None:
    document = render_report(inputs())
    row = re.search(r'<tr class="selected">(.*?)</tr>', document)
    assert row
    assert "reply one" in row[1]
    assert document.count('class="badge">') == 1


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ReportInputs) if f.name != "title"])
def test_any_part_may_be_absent(field: str) -> None:
    empty = next(f for f in dataclasses.fields(ReportInputs) if f.name == field)
    value = empty.default if empty.default is not dataclasses.MISSING else {}
    assert Walker(render_report(dataclasses.replace(inputs(), **{field: value}))).problems == []
    assert Walker(render_report(ReportInputs("Alone"))).problems == []
    assert Walker(render_report(ReportInputs("Alone", **{field: getattr(inputs(), field)}))).problems == []


def test_worse_after_training_is_told_as_worse() -> None:
    results = {"columns": {"before training": {"perplexity": 20.0}, "after training": {"perplexity": 30.0}}}
    assert "50.0 % higher" in render_report(ReportInputs("t", results))


def test_repeated_and_unordered_steps_are_put_in_order() -> None:
    rows = [{"step": 3, "a": 1.0}, {"step": 1, "a": 2.0}, {"step": 3, "a": 4.0}, {"a": 9.0}, {"step": 2, "a": None}]
    series = column(rows, "a")
    assert (series.x, series.y) == ([1, 3], [2.0, 4.0])


def test_dialogues_stand_by_the_prompt_they_select_and_many_are_sampled() -> None:
    chosen = [i % 2 for i in range(300)]
    selection = [{"dialogue": i, "usage": [1.0 - k, float(k)]} for i, k in enumerate(chosen)]
    document = render_report(ReportInputs("t", selection=selection))
    assert "96 of 300 dialogues" in document
    picked = [int(i) for i in re.findall(r"<title>(\d+) · prompt 0", document)]
    assert len(picked) == len(set(picked)) == 96
    assert [chosen[i] for i in picked] == [0] * 48 + [1] * 48


def test_lists_of_different_lengths_are_refused() -> None:
    selection = [{"dialogue": "a", "usage": [1.0]}, {"dialogue": "b", "usage": [0.5, 0.5]}]
    with pytest.raises(UserError, match=r"\[1, 2\]"):
        render_report(ReportInputs("t", selection=selection))


def test_flattened_names_are_dotted_and_keep_every_leaf() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2]}) == [("a.b", 1), ("a.c", {}), ("d", [2])]


def test_long_runs_keep_the_page_small() -> None:
    assert len(render_report(inputs(steps=20_000))) < 400_000


def test_report_is_written_whole_over_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, ReportInputs("first"))
    write_report(path, inputs())
    assert path.read_text(encoding="utf-8") == render_report(inputs())
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_failed_write_leaves_the_old_report_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_report(path, ReportInputs("old"))
    old = path.read_text(encoding="utf-8")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=r"report\.html cannot be written: No space left on device"):
        write_report(path, inputs())
    assert path.read_text(encoding="utf-8") == old
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]

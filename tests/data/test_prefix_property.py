"""The prefix property of packing, on real text with the tokenizers of real models (METHOD: dialogue packing)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from toy_encoders import MergingEncoder, WordEncoder

from spt_jax.data import Dialogue, DialogueSet, Turn
from spt_jax.models.loading import load_tokenizer
from spt_jax.models.tokenization.folder_tokenizer import tokenizer_of_folder
from spt_jax.models.tokenization.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
# Mean and greatest tokens of a dialogue of the whole validation set (METHOD counts the last eos too: one more).
WHOLE_SET = {"opt": (265.5, 403), "llama2": (287.9, 424), "smollm2": (268.6, 402)}


@pytest.fixture(scope="module")
def prefix_check() -> Iterator[ModuleType]:
    """The program ``benchmarks/prefix_check.py``, which finds its parts beside itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        yield importlib.import_module("prefix_check")


@pytest.fixture(params=sorted(WHOLE_SET))
def named_tokenizer(request: pytest.FixtureRequest) -> tuple[str, Tokenizer]:
    if request.param == "smollm2":
        return request.param, load_tokenizer(request.getfixturevalue("smollm2_source"))
    folder = request.getfixturevalue("shared_dir") / "data" / "tokenizers" / request.param
    return request.param, tokenizer_of_folder(folder, {"opt": "opt", "llama2": "llama"}[request.param])


@pytest.mark.first_python
@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.campaign)])
def test_no_validation_dialogue_falls_back(
    named_tokenizer: tuple[str, Tokenizer], valid_set: DialogueSet, prefix_check: ModuleType, count: int
) -> None:
    name, tokenizer = named_tokenizer
    report = prefix_check.prefix_report(valid_set.dialogues[:count], tokenizer, 512)
    print(f"{name}:\n{prefix_check.table(report, tokenizer, 512)}")
    assert (report.dialogues, report.broken, report.too_long, report.split_turns) == (count, (), (), 0)
    if count == 1000:
        mean, greatest = WHOLE_SET[name]
        assert (round(report.dialogue_tokens / count, 1), report.longest_dialogue) == (mean, greatest)
        assert report.turns == 7801 and report.turn_tokens > 4.9 * report.dialogue_tokens


def test_the_report_tells_length_from_prefix(prefix_check: ModuleType) -> None:
    short = Dialogue(("p",), (Turn("q", "r"), Turn("q", "r")), source="f.txt:1")
    long = Dialogue(("p",), tuple(Turn("q", "r") for _ in range(9)), source="f.txt:5")
    report = prefix_check.prefix_report([short, long], WordEncoder(), 20)
    assert (report.broken, report.too_long) == ((), ("f.txt:5",))
    report = prefix_check.prefix_report([short, long], MergingEncoder(7), 1000)
    assert (report.broken, report.too_long) == (("f.txt:1", "f.txt:5"), ())
    assert report.dialogue_tokens == report.turn_tokens


def test_the_program_prints_a_table_and_mends_nothing_in_silence(
    prefix_check: ModuleType, shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "one.txt"
    data.write_text("1 your persona: i have a dog .\n2 hi , do you ?\tyes , one .\n3 nice .\tvery .\n")
    opt = f"--tokenizer={shared_dir / 'data' / 'tokenizers' / 'opt'}"
    assert prefix_check.main([opt, "--model_type=opt", f"--data={data}"]) == 0
    table = dict(line.rsplit("  ", 1) for line in capsys.readouterr().out.strip().split("\n"))
    figures = {name.strip(): figure for name, figure in table.items()}
    assert figures["dialogues in one row"] == "1" and figures["bos, eos, pad, stops"] == "2, 2, 1, (2,)"
    assert prefix_check.main([opt, f"--data={data}"]) == 2
    assert "put its config.json beside them" in capsys.readouterr().err
    assert prefix_check.main([opt, "--model_type=opt", "--data=absent.txt"]) == 2
    assert "absent.txt" in capsys.readouterr().err

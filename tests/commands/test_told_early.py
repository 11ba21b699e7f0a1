"""What can be known to be wrong without the weights of an LM is told before they are loaded, which may take minutes."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_run import write_dialogues

from spt_jax.commands.main import main
from spt_jax.models.loading import OpenedLM

LONG = 1000

TRAIN = {
    "a bank that is not there": (
        ["bank.init=file", "bank.init_file={here}/none.npy"],
        "bank.init_file: there is no file",
    ),
    "a bank of another shape": (["bank.init=file", "bank.init_file={here}/bank.npy"], "holds prompts of shape (2, 2)"),
    "adapters that are not there": (
        ["bank.init=peft", "bank.init_file={here}/none"],
        "bank.init_file: there is no folder",
    ),
    "projections of another LM": (["method.kind=lora", "lora.targets=('fc1',)"], "which is no projection of this LM"),
    "rows that are longer than the context": (["data.max_length=100000"], "but the context of"),
    "a dialogue that does not fit": (["data.train={here}/long.txt", "data.max_length=64"], "persona"),
    "more steps than can be counted": (["train.steps=0", "train.epochs=2000000000"], "allowed: below"),
}

REPLIES = {
    "a prompt that is not in the bank": (["--prompt=3"], "--prompt is 3; this run has prompts 0 to 2"),
    "a cut of nothing": (["--top_k=5"], "top_k would cut a draw, but temperature is 0"),
    "a search that draws": (["--beams=3", "--temperature=0.7"], "a beam search draws nothing"),
    "more tokens at least than at most": (["--min_new_tokens=9", "--max_new_tokens=8"], "allowed: up to"),
    "a step that is not there": (["--checkpoint=3"], "there is no checkpoint of step 3"),
}


@pytest.fixture(autouse=True)
def unloaded(monkeypatch):
    monkeypatch.setattr(OpenedLM, "load", lambda *_, **__: pytest.fail("the LM was loaded"))


@pytest.fixture
def here(tmp_path):
    """A folder with inputs that do not serve."""
    np.save(tmp_path / "bank.npy", np.zeros((2, 2)))
    persona = "your persona: " + "i sail and sail and sail . " * LONG
    (tmp_path / "long.txt").write_text("".join(f"1 {persona}{n}\n2 hi\thello there\n" for n in range(9)))
    (tmp_path / "contexts.jsonl").write_text('{"persona": [], "history": ["hi"]}\n')
    (tmp_path / "broken.txt").write_text("1 your persona: i sail .\n2 no tab\n")
    write_dialogues(tmp_path / "d.txt")
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", TRAIN)
def test_of_a_training(trained, here, capsys, name):
    options, sentence = TRAIN[name]
    given = [f"--config.{option.format(here=here)}" for option in options]
    workdir = here / "run"
    assert sentence in refused(capsys, "train", f"--config={trained / 'tiny.py'}:3", f"--workdir={workdir}", *given)
    assert not workdir.exists()


@pytest.mark.parametrize("name", REPLIES)
@pytest.mark.parametrize("door", ["generate", "chat"])
def test_of_replies(trained, here, capsys, door, name):
    options, sentence = REPLIES[name]
    files = [f"--input={here / 'contexts.jsonl'}", f"--out={here / 'out.jsonl'}"] if door == "generate" else []
    assert sentence in refused(capsys, door, f"--workdir={trained / 'run'}", *files, *options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data={here}/none.txt"], "none.txt does not exist"),
        (["--data={here}/broken.txt"], "--on_error=skip of evaluate and score, leaves malformed lines out"),
        (["--data={here}/d.txt", "--checkpoint=3"], "there is no checkpoint of step 3"),
    ],
)
@pytest.mark.parametrize("door", ["score", "evaluate"])
def test_of_dialogues_and_checkpoints_to_measure(trained, here, capsys, door, options, sentence):
    given = [option.format(here=here) for option in options]
    out = [f"--out={here / 'out.jsonl'}"] if door == "score" else []
    assert sentence in refused(capsys, door, f"--workdir={trained / 'run'}", *out, *given)


def test_of_a_reply_that_is_longer_than_the_context(trained, here, capsys):
    given = [f"--data={here / 'd.txt'}", "--max_new_tokens=100000"]
    assert "but the context of" in refused(capsys, "evaluate", f"--workdir={trained / 'run'}", *given)

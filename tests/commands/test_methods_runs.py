"""Every method goes through the same doors: trained, stopped and resumed, evaluated, scored, asked for replies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import TALK, train_arguments, walk

from spt_jax.commands.restored import open_run

pytestmark = pytest.mark.first_python

STEPS = 2
LATEST = "--checkpoint=latest"
BASICS = {
    "train.steps": STEPS,
    "train.save_every": 1,
    "train.evaluate_every": STEPS,
    "optimizer.learning_rate": 0.01,
    "tracking.tensorboard": "false",
    "evaluation.replies": 3,
}
SPT_OPTIONS = {
    "bank.init": "clusters",
    "objective.prompts_per_step": 2,
    "objective.gold_noise": 0.1,
    "objective.annealing": 2.0,
    "objective.annealing_min": 0.1,
    "objective.balance_weight": 0.1,
    "model.dropout": 0.1,
    "data.last_turn_only": "true",
    "data.fraction": 0.9,
    "optimizer.retriever_factor": 3.0,
}
TRANSFORMER = {
    "retriever.kind": "transformer",
    "retriever.heads": 2,
    "retriever.feed_forward": 8,
    "retriever.dropout": 0.1,
    "retriever.share": "false",
}
LEAVES = {
    "spt": {"bank", "retriever"},
    "prompt_tuning": {"bank"},
    "prefix_tuning": {"bank"},
    "p_tuning": {"prompt_encoder"},
    "lora": {"lora"},
    "full": {"lm"},
    "zero_shot": set(),
    "few_shot": set(),
}
LORA = {"lora.dropout": 0.1, "lora.targets": "('q_proj', 'down_proj')"}
MESH = {"mesh.fsdp": 2, "mesh.tensor": 2}
campaign = pytest.mark.campaign


def run_of(name: str, kind: str, options: dict[str, Any] | None = None, *marks: Any) -> Any:
    return pytest.param({"method.kind": kind} | (options or {}), id=name, marks=marks)


RUNS = [
    run_of("spt-options", "spt", SPT_OPTIONS),
    run_of("spt-prefixes", "spt", {"bank.kind": "prefixes", "bank.init": "normal"}),
    run_of("spt", "spt", None, campaign),
    run_of("spt-transformer", "spt", TRANSFORMER, campaign),
    run_of("spt-transformer-options", "spt", SPT_OPTIONS | TRANSFORMER, campaign),
    run_of("prompt-tuning", "prompt_tuning", None, campaign),
    run_of("prefix-tuning", "prefix_tuning", None, campaign),
    run_of("prefix-tuning-encoded", "prefix_tuning", {"method.hidden_size": 6}, campaign),
    run_of("p-tuning", "p_tuning", None, campaign),
    run_of("lora", "lora", LORA),
    run_of("lora-mesh", "lora", LORA | MESH, campaign),
    run_of("full-mesh", "full", MESH),
    run_of("full-bfloat16", "full", {"model.dtype": "bfloat16"}, campaign),
    run_of("zero-shot", "zero_shot", None, campaign),
    run_of("few-shot", "few_shot"),
    run_of("zero-shot-chat", "zero_shot", {"data.template": "chat"}),
    run_of("spt-chat", "spt", {"data.template": "chat", "evaluation.selection": "soft"}, campaign),
    run_of("lora-persona", "lora", {"data.task": "persona"}, campaign),
]


CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + '] ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


def arguments(folder: Path, workdir: Path, options: dict[str, Any]) -> list[str]:
    """What trains a tiny LM, which has a chat template, in `folder`."""
    given = BASICS | options
    words = train_arguments(folder, workdir=workdir)
    tokenizer = folder / "lm" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"chat_template": CHAT}))
    return [*words, *(f"--config.{name}={value}" for name, value in given.items())]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digests(workdir: Path, step: int) -> dict[str, str]:
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())["digests"]


def logged(workdir: Path) -> list[dict[str, Any]]:
    """What does not depend on the clock."""
    rows = lines_of(workdir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.endswith("_per_second")} for row in rows]


def check_resume(command: list[str], workdir: Path, last: int) -> None:
    """A run that lost its last checkpoint goes on from the one before, to the same state bit by bit."""
    before, rows = digests(workdir, last), logged(workdir)
    if last:
        shutil.rmtree(workdir / "checkpoints" / str(last))
    walk(*command)
    assert digests(workdir, last) == before
    assert logged(workdir) == rows


def check_score(folder: Path, workdir: Path, results: dict[str, Any], layout: str) -> None:
    """`score` and `evaluate` say the same of every turn, in either layout."""
    out = folder / f"{layout}.jsonl"
    walk("score", f"--workdir={workdir}", f"--data={folder / 'test.txt'}", f"--out={out}", f"--layout={layout}", LATEST)
    turns = lines_of(out)
    assert len(turns) == results["turns"]
    total = sum(turn["target_tokens"] * turn["nll"][turn["selected"]] for turn in turns)
    perplexity = np.exp(total / sum(turn["target_tokens"] for turn in turns))
    assert perplexity == pytest.approx(results["columns"]["after training"]["perplexity"], rel=1e-5)


def check_replies(folder: Path, workdir: Path) -> None:
    """What is restored answers as it does inside `evaluate`."""
    predictions = lines_of(workdir / "predictions.jsonl")
    asked = [{"persona": p["persona"], "history": p["history"]} for p in predictions]
    (folder / "asked.jsonl").write_text("".join(json.dumps(request) + "\n" for request in asked))
    walk(
        "generate",
        f"--workdir={workdir}",
        f"--input={folder / 'asked.jsonl'}",
        f"--out={folder / 'answers.jsonl'}",
        "--max_new_tokens=4",
        LATEST,
    )
    answers = lines_of(folder / "answers.jsonl")
    assert [a["reply"] for a in answers] == [p["prediction"] for p in predictions]
    assert [a["selected"] for a in answers] == [p["selected"] for p in predictions]
    for answer, prediction in zip(answers, predictions, strict=True):
        assert answer["scores"] == pytest.approx(prediction["scores"], rel=1e-5)


@pytest.mark.parametrize("options", RUNS)
def test_a_method_trains_resumes_evaluates_scores_and_replies(tmp_path, options):
    workdir, kind = tmp_path / "run", options["method.kind"]
    command = arguments(tmp_path, workdir, options)
    walk(*command)
    learns = kind not in ("zero_shot", "few_shot")
    last = STEPS if learns else 0
    losses = [row["loss/total"] for row in logged(workdir) if "loss/total" in row]
    assert len(losses) == last
    assert np.isfinite(losses).all()
    if learns:
        assert digests(workdir, 0) != digests(workdir, last)
    check_resume(command, workdir, last)

    run = open_run(str(workdir), "latest")
    assert run.step == last
    encoded = {"prefix_encoder"} if options.get("method.hidden_size") else None
    assert set(run.trainable) == (encoded or LEAVES[kind])

    walk("evaluate", f"--workdir={workdir}", LATEST)
    results = json.loads((workdir / "results.json").read_text())
    columns = ["no soft prompt", "before training", "after training"]
    if not learns:
        columns = columns[2:]
    elif kind in ("lora", "full"):
        columns = columns[::2]
    assert list(results["columns"]) == columns
    assert (workdir / "report.html").stat().st_size > 10_000
    if learns:
        assert results["columns"]["after training"]["perplexity"] != results["columns"]["no soft prompt"]["perplexity"]
    check_score(tmp_path, workdir, results, "turn" if kind == "lora" else "dialogue")
    check_replies(tmp_path, workdir)


def test_where_the_persona_is_learned_it_is_the_reference_and_the_whole_dialogue_is_what_is_read(tmp_path):
    workdir = tmp_path / "run"
    options = {"method.kind": "prompt_tuning", "data.task": "persona", "train.steps": 1, "evaluation.replies": 0}
    walk(*arguments(tmp_path, workdir, options))
    walk("evaluate", f"--workdir={workdir}", "--nobaselines", LATEST)
    predictions = lines_of(workdir / "predictions.jsonl")
    assert len(predictions) == 4
    for (persona, turns), prediction in zip(TALK, predictions, strict=False):
        assert prediction["reference"] == persona
        assert prediction["history"] == [text for turn in turns for text in turn]
    samples = json.loads((workdir / "results.json").read_text())["samples"]
    assert {sample["reference"] for sample in samples} <= {persona for persona, _ in TALK[:4]}
    check_replies(tmp_path, workdir)

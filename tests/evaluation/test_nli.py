"""Laws of the persona's consistency, with a random classifier of entailment made here."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny_experiment import experiment

from spt_jax.errors import UserError
from spt_jax.evaluation import nli
from spt_jax.evaluation.nli import check_nli, persona_consistency
from spt_jax.evaluation.run_evaluation import AFTER, evaluate_run
from spt_jax.evaluation.text_metrics import text_metrics

REPLIES = ["i have two dogs .", "", "i sail alone .", "i have two dogs .", "clocks"]
PERSONAS = [
    ["I have dogs.", "I mend clocks.", " "],
    ["I sail."],
    ["I sail.", "I have no dogs."],
    ["I have dogs."],
    [],
]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] i have two dogs . sail alone mend clocks no".split


def write_classifier(folder: Path, labels: tuple[str, ...] = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")) -> Path:
    """A random BERT of a few thousand weights with a tokenizer of a dozen words."""
    torch = pytest.importorskip("torch")
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir()
    words = WORDS()
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = dict(enumerate(labels))
    config = BertConfig(vocab_size=len(words), id2label=names, label2id={b: a for a, b in names.items()}, **sizes)
    config.initializer_range = 2.0
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def worth_alone(folder: Path, reply: str, line: str) -> int:
    """Of one pair, by the library's functions and the label's name."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = model(**AutoTokenizer.from_pretrained(folder)(reply, line, return_tensors="pt")).logits[0]
    return {"e": 1, "n": 0, "c": -1}[model.config.id2label[int(logits.argmax())][0].lower()]


@pytest.mark.torch
def test_the_score_is_entailed_minus_contradicted_lines(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "nli")
    found = persona_consistency(REPLIES, PERSONAS, str(folder))
    expected = [
        sum(worth_alone(folder, reply, line) for line in persona if line.strip()) if reply else 0
        for reply, persona in zip(REPLIES, PERSONAS, strict=True)
    ]
    assert found.scores.tolist() == expected
    assert len(set(expected)) > 1
    assert f"by the classifier {folder}" in found.definitions["persona_consistency"]


@pytest.mark.torch
def test_labels_are_known_by_their_names_in_any_order(tmp_path: Path) -> None:
    one = write_classifier(tmp_path / "one", ("entailment", "neutral", "contradiction"))
    other = write_classifier(tmp_path / "other", ("contradiction", "neutral", "entailment"))
    scores = persona_consistency(REPLIES, PERSONAS, str(one)).scores
    np.testing.assert_array_equal(persona_consistency(REPLIES, PERSONAS, str(other)).scores, -scores)
    assert np.abs(scores).sum() > 0


@pytest.mark.torch
def test_text_metrics_and_evaluations_take_the_mean(tmp_path: Path) -> None:
    folder = str(write_classifier(tmp_path / "nli"))
    found = text_metrics(REPLIES, REPLIES, PERSONAS, metrics=("nli",), nli_model=folder)
    scores = persona_consistency(REPLIES, PERSONAS, folder).scores
    assert found.values["persona_consistency"] == scores.mean()
    assert found.per_pair["persona_consistency"] == scores.tolist()
    run = evaluate_run(experiment(metrics=("f1",), nli=folder), tiny.trainable(), None, tiny.DIALOGUES[:2], replies=2)
    figures = run.results["columns"][AFTER]
    assert figures["persona_consistency"] == np.mean([p["persona_consistency"] for p in run.predictions])


@pytest.mark.torch
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("no", "yes"), r"has the labels no, yes; allowed: three whose names begin with entail, neutral, contradict"),
        (("LABEL_0", "LABEL_1", "LABEL_2"), "has the labels LABEL_0, LABEL_1, LABEL_2; allowed"),
    ],
)
def test_a_classifier_of_something_else_is_refused(labels: tuple[str, ...], message: str, tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "nli", labels)
    with pytest.raises(UserError, match=message):
        persona_consistency(REPLIES, PERSONAS, str(folder))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./absent", "does not exist"),
        ("shape:llama2-7b", "the classifier of entailment 'shape:llama2-7b' is a shape; allowed"),
        ("no-one/no-such-model", "classifier of entailment 'no-one/no-such-model' cannot be loaded"),
    ],
)
def test_a_classifier_that_cannot_be_loaded_is_one_sentence(model: str, message: str) -> None:
    pytest.importorskip("torch")
    with pytest.raises(UserError, match=message) as caught:
        persona_consistency(REPLIES, PERSONAS, model)
    assert "\n" not in str(caught.value)


def test_without_torch_the_sentence_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    nli._classifier.cache_clear()
    for call in (lambda: persona_consistency(["a"], [["b"]], "./x"), lambda: check_nli("./x")):
        with pytest.raises(UserError, match=r"pip install .*eval"):
            call()


def test_without_a_classifier_the_group_is_refused() -> None:
    with pytest.raises(UserError, match="'nli' needs a classifier of entailment"):
        text_metrics(REPLIES, REPLIES, PERSONAS, metrics=("nli",))

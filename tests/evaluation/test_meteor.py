"""METEOR through nltk, with a WordNet of a few words and, where this machine has it, the real one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import nltk.data
import numpy as np
import pytest
from nltk.translate.meteor_score import meteor_score
from tiny_wordnet import readers_closed, write_wordnet

from spt_jax.errors import UserError
from spt_jax.evaluation import wordnet
from spt_jax.evaluation.meteor import meteor_scores
from spt_jax.evaluation.text_metrics import text_metrics

PREDICTIONS = ["The hound sleeps .", "", "i cook a meal", "movies are fun", "no"]
REFERENCES = ["the dog sleeps .", "hello", "i prepare food", "i like the film", "yes"]

# What this machine has, before a test hides it.
DATA_PATH, DEBIAN = list(nltk.data.path), wordnet.DEBIAN
VARIABLES = {name: os.environ[name] for name in ("WNSEARCHDIR", "WNHOME") if name in os.environ}


@pytest.fixture(autouse=True)
def _nothing_found(cache_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No WordNet anywhere, whatever this machine has."""
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(wordnet, "DEBIAN", tmp_path / "debian")
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    monkeypatch.delenv("WNHOME", raising=False)
    wordnet._temporary.cache_clear()
    with readers_closed():
        yield


def test_scores_are_nltks_with_the_same_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WNSEARCHDIR", str(write_wordnet(tmp_path / "dict")))
    found = meteor_scores(PREDICTIONS, REFERENCES)
    reader = wordnet.find_wordnet()
    pairs = zip(PREDICTIONS, REFERENCES, strict=True)
    expected = [meteor_score([r.split()], p.split(), wordnet=reader) for p, r in pairs]
    np.testing.assert_array_equal(found.scores, expected)
    assert found.scores[1] == found.scores[4] == 0


def test_synonyms_match_through_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WNSEARCHDIR", str(write_wordnet(tmp_path / "dict")))
    found = meteor_scores(["the hound sleeps", "the cat sleeps", "the dog sleeps"], ["the dog sleeps"] * 3).scores
    # All of three words in one chunk: 1 - 0.5 (1/3)^3; two of three in two chunks: 2/3 (1 - 0.5 (2/2)^3).
    assert found == pytest.approx([1 - 0.5 / 27, 1 / 3, 1 - 0.5 / 27])


@pytest.mark.parametrize("place", ["WNSEARCHDIR", "WNHOME", "debian", "nltk"])
@pytest.mark.parametrize("cache", [True, False])
def test_the_database_is_found_in_every_place(
    place: str, cache: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cache:
        monkeypatch.setenv("SPT_JAX_CACHE_GB", "0")
    if place == "nltk":
        folder = write_wordnet(tmp_path / "data" / "corpora" / "wordnet")
        (folder / "lexnames").write_text(wordnet._lexicographer_lines())
        for made in (tmp_path / "data", folder.parent, folder):
            made.chmod(0o700)
        nltk.data.path.append(str(tmp_path / "data"))
    elif place == "debian":
        write_wordnet(tmp_path / "debian")
    else:
        write_wordnet(tmp_path / "named" / "dict")
        monkeypatch.setenv(place, str(tmp_path / "named" / ("" if place == "WNHOME" else "dict")))
    reader = wordnet.find_wordnet()
    assert {lemma for synset in reader.synsets("dog") for lemma in synset.lemma_names()} == {"dog", "hound"}
    assert reader.synsets("dog")[0].lexname() == "noun.animal"
    assert reader.get_version() == "3.0"


def test_a_copy_is_kept_and_taken_again(cache_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WNSEARCHDIR", str(write_wordnet(tmp_path / "dict")))
    wordnet.find_wordnet()
    [entry] = (cache_home / "wordnet").iterdir()
    written = (entry / "corpora" / "wordnet" / "data.noun").stat().st_mtime_ns
    wordnet._reader.cache_clear()
    wordnet.find_wordnet()
    assert [entry] == list((cache_home / "wordnet").iterdir())
    assert (entry / "corpora" / "wordnet" / "data.noun").stat().st_mtime_ns == written


def test_lexicographer_files_are_those_of_wordnet_3() -> None:
    lines = wordnet._lexicographer_lines().splitlines()
    assert len(lines) == 45
    assert (lines[0], lines[3], lines[5], lines[29], lines[44]) == (
        *("00\tadj.all\t3", "03\tnoun.Tops\t1", "05\tnoun.animal\t1", "29\tverb.body\t2", "44\tadj.ppl\t3"),
    )


def test_without_a_database_meteor_is_left_out_with_one_sentence_and_the_rest_is_there() -> None:
    found = text_metrics(PREDICTIONS, REFERENCES, metrics=("f1", "meteor"))
    assert "meteor" not in found.values and "f1" in found.values
    [note] = found.notes
    assert re.match(r"METEOR is left out: this machine has no WordNet; .*wordnet-base wordnet-sense-index.*\.$", note)
    assert "nltk.downloader wordnet" in note and "\n" not in note


def test_a_folder_without_a_database_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    with pytest.raises(UserError, match=r"variable WNSEARCHDIR leads to .*, where WordNet's file index\.adj is not"):
        text_metrics(PREDICTIONS, REFERENCES, metrics=("meteor",))


def test_text_metrics_take_the_mean_in_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WNSEARCHDIR", str(write_wordnet(tmp_path / "dict")))
    found, scores = text_metrics(PREDICTIONS, REFERENCES, metrics=("meteor",)), meteor_scores(PREDICTIONS, REFERENCES)
    assert found.values["meteor"] == pytest.approx(100 * scores.scores.mean())
    assert found.per_pair["meteor"] == scores.scores.tolist()
    assert "WordNet 3.0" in found.definitions["meteor"] and found.versions["WordNet"] == "3.0"
    assert set(found.definitions) == set(found.values) == {"meteor", "pairs", "empty_replies"}


def test_the_real_wordnet_knows_synonyms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", DATA_PATH)
    monkeypatch.setattr(wordnet, "DEBIAN", DEBIAN)
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    try:
        reader = wordnet.find_wordnet()
    except wordnet.WordNetMissingError as error:
        pytest.skip(str(error))
    assert reader.get_version().startswith("3.")
    scores = meteor_scores(["the child gave it to the doctor ."], ["the kid gave it to the physician ."]).scores
    assert scores[0] == pytest.approx(1 - 0.5 / 8**3)

"""Laws of the text figures, against oracles written apart and the libraries' own functions."""

from __future__ import annotations

import importlib.metadata
import string
from pathlib import Path

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from spt_jax.errors import UserError
from spt_jax.evaluation.text_metrics import text_metrics, token_f1, token_f1_parlai

PREDICTIONS = ["i like to cook .", "The dog, a Spaniel!", "", "yes yes yes", "what do you do for a living ?"]
REFERENCES = ["i love to cook !", "my dog is the spaniel", "hello", "yes", "what do you do for work ?"]

WORDS = st.sampled_from(["i", "like", "the", "dog", "a", "an", "cat.", "Cooking", "Don't", "!", "naïve"])
REPLIES = st.lists(WORDS, max_size=7).map(" ".join)
PAIRS = st.lists(st.tuples(REPLIES, REPLIES), min_size=1, max_size=8)


def f1_by_hand(prediction: list[str], reference: list[str]) -> float:
    left = list(reference)
    common = 0
    for word in prediction:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def parlai_by_hand(text: str) -> list[str]:
    spaced = "".join(" " if character in string.punctuation else character for character in text.lower())
    return [word for word in spaced.split() if word not in ("a", "an", "the")]


def lcs_length(left: list[str], right: list[str]) -> int:
    if not left or not right:
        return 0
    if left[-1] == right[-1]:
        return 1 + lcs_length(left[:-1], right[:-1])
    return max(lcs_length(left[:-1], right), lcs_length(left, right[:-1]))


@given(REPLIES, REPLIES)
def test_token_f1_is_the_harmonic_mean_of_precision_and_recall(prediction: str, reference: str) -> None:
    assert token_f1(prediction, reference) == pytest.approx(f1_by_hand(prediction.split(), reference.split()))
    expected = f1_by_hand(parlai_by_hand(prediction), parlai_by_hand(reference))
    assert token_f1_parlai(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "plain", "parlai"),
    [
        ("", "", 0.0, 0.0),
        ("", "hello", 0.0, 0.0),
        ("hello", "", 0.0, 0.0),
        ("the", "a", 0.0, 0.0),
        ("Hello !", "hello", 0.0, 1.0),
        ("a dog", "the dog", 0.5, 1.0),
        ("an apple", "apple", 2 / 3, 1.0),
        ("don't", "don t", 0.0, 1.0),
        ("yes yes yes", "yes", 0.5, 0.5),
        ("theatre", "atre", 0.0, 0.0),
    ],
)
def test_token_f1_of_small_known_pairs(prediction: str, reference: str, plain: float, parlai: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(plain)
    assert token_f1_parlai(prediction, reference) == pytest.approx(parlai)


def test_bleu_is_sacrebleus_corpus_bleu() -> None:
    values = text_metrics(PREDICTIONS, REFERENCES).values
    expected = sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES], force=True)
    assert values["bleu"] == expected.score > 0
    assert values["bleu_brevity_penalty"] == expected.bp
    assert [values[f"bleu_precision_{n}"] for n in (1, 2, 3, 4)] == expected.precisions


def test_tokenised_texts_raise_no_advice_and_score_as_without_it(caplog: pytest.LogCaptureFixture) -> None:
    replies = [f"this is reply {index} ." for index in range(120)]
    references = [f"this was reply {index} ." for index in range(120)]
    score = text_metrics(replies, references).values["bleu"]
    assert not caplog.records
    assert score == sacrebleu.corpus_bleu(replies, [references], force=True).score


def test_rouge_is_the_mean_f_measure_of_rouge_score() -> None:
    values = text_metrics(PREDICTIONS, REFERENCES).values
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    scores = [scorer.score(reference, reply) for reply, reference in zip(PREDICTIONS, REFERENCES, strict=True)]
    for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        assert values[ours] == pytest.approx(100 * sum(score[theirs].fmeasure for score in scores) / len(scores))


@settings(max_examples=40)
@given(st.lists(st.sampled_from("abcd"), max_size=6), st.lists(st.sampled_from("abcd"), max_size=6))
def test_rouge_l_counts_the_longest_common_subsequence(left: list[str], right: list[str]) -> None:
    length = lcs_length(left, right)
    expected = 100 * 2 * length / (len(left) + len(right)) if length else 0.0
    assert text_metrics([" ".join(left)], [" ".join(right)]).values["rouge_l"] == pytest.approx(expected)


def test_dist_counts_distinct_over_all_ngrams_of_the_corpus() -> None:
    values = text_metrics(["a b a b", "a b", "c", ""], ["x"] * 4).values
    assert values["dist_1"] == pytest.approx(100 * 3 / 7)  # a, b, c of a b a b a b c
    assert values["dist_2"] == pytest.approx(100 * 2 / 4)  # ab, ba of ab ba ab | ab
    assert values["dist_3"] == pytest.approx(100 * 2 / 2)  # aba, bab
    assert values["reply_words"] == 7 / 4
    assert values["empty_replies"] == 1
    assert values["pairs"] == 4


@settings(max_examples=30)
@given(PAIRS, st.randoms(use_true_random=False))
def test_order_of_pairs_changes_nothing(pairs: list[tuple[str, str]], random) -> None:
    shuffled = list(pairs)
    random.shuffle(shuffled)
    before = text_metrics([p for p, _ in pairs], [r for _, r in pairs]).values
    after = text_metrics([p for p, _ in shuffled], [r for _, r in shuffled]).values
    assert after == pytest.approx(before)


@settings(max_examples=30)
@given(PAIRS)
def test_every_figure_lies_in_its_range_and_has_a_definition(pairs: list[tuple[str, str]]) -> None:
    metrics = text_metrics([p for p, _ in pairs], [r for _, r in pairs])
    assert set(metrics.definitions) == set(metrics.values)
    for name in set(metrics.values) - {"bleu_brevity_penalty", "entropy_4", "reply_words", "empty_replies", "pairs"}:
        assert 0 <= metrics.values[name] <= 100 + 1e-9, name
    assert 0 <= metrics.values["bleu_brevity_penalty"] <= 1


@settings(max_examples=30)
@given(st.lists(st.lists(st.sampled_from(["i", "like", "cats"]), min_size=4, max_size=9).map(" ".join), min_size=1))
def test_perfect_replies_score_100(replies: list[str]) -> None:
    values = text_metrics(replies, replies).values
    for name in ("f1", "f1_parlai", "bleu", "rouge_1", "rouge_2", "rouge_l"):
        assert values[name] == pytest.approx(100), name
    assert values["bleu_brevity_penalty"] == 1


def test_replies_without_any_word_score_zero_everywhere() -> None:
    values = text_metrics(["", "  "], ["hello", ""]).values
    for name in ("f1", "f1_parlai", "bleu", "rouge_1", "rouge_l", "dist_1", "dist_2", "reply_words"):
        assert values[name] == 0, name
    assert values["empty_replies"] == 2


def test_definitions_record_versions_and_bleus_signature() -> None:
    metrics = text_metrics(PREDICTIONS, REFERENCES)
    for name in ("sacrebleu", "rouge-score"):
        assert metrics.versions[name] == importlib.metadata.version(name)
    assert (
        f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{metrics.versions['sacrebleu']}"
        in (metrics.definitions["bleu"])
    )


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a"], ["a", "b"], "1 predictions and 2 references"),
        ([], [], "at least one"),
        ("reply", ["reply"], "list of texts"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(predictions, references, message: str) -> None:
    with pytest.raises(UserError, match=message):
        text_metrics(predictions, references)


def test_real_references_score_100_against_themselves_and_little_against_their_neighbours(shared_dir: Path) -> None:
    files = sorted((shared_dir / "data" / "convai2").glob("valid*.txt"))
    if not files:
        pytest.skip("the shared data holds no ConvAI2 validation text")
    lines = files[0].read_text(encoding="utf-8").splitlines()
    replies = [line.split("\t")[1] for line in lines if "\t" in line][:300]
    # Replies under four words have no 4-gram, but a corpus has; BLEU of itself is 100 all the same.
    same, shifted = text_metrics(replies, replies).values, text_metrics(replies[1:], replies[:-1]).values
    for name in ("f1", "f1_parlai", "bleu", "rouge_1", "rouge_l"):
        assert same[name] == pytest.approx(100, abs=0.5), name
        assert shifted[name] < 20, name

"""The authors' rows: the laws behind them; test_official_golden compares them with what the program computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from official_tokenizer import BOS, EOS, PAD, small_tokenizer

from spt_jax.data import Dialogue, Row, Turn
from spt_jax.data.official import official_prompt, official_rows, official_turns
from spt_jax.errors import UserError
from spt_jax.models.tokenization.sentencepiece_bpe import read_sentencepiece
from spt_jax.models.tokenization.tokenizer import Tokenizer


def prompt_of(row: Row) -> np.ndarray:
    assert row.inference_prompt is not None
    return row.inference_prompt


TOKENIZER = small_tokenizer()
PAD_IS_EOS = small_tokenizer(pad_id=EOS)


def learned(row: Row) -> str:
    return TOKENIZER.backend.decode(row.target_ids.tolist(), skip_special_tokens=False)


def shown(tokens: np.ndarray) -> str:
    return TOKENIZER.backend.decode(tokens.tolist(), skip_special_tokens=False)


def single(query: str, response: str, persona: Sequence[str] = ("i ski",)) -> Dialogue:
    return Dialogue(tuple(persona), (Turn(query, response),))


def row_of(dialogue: Dialogue, tokenizer: Tokenizer = TOKENIZER, max_length: int = 500, **options: Any) -> Row:
    return official_rows([dialogue], tokenizer, max_length=max_length, **options)[-1]


def authors_scan(tokens: list[str], persona: bool, context: bool) -> list[bool]:
    """Which of a row's tokens are learned, by the published rule, position by position; an oracle for the arrays."""
    following = tokens[1:]
    kept = [True] * len(following)
    colons = [b.endswith(":") for b in [*following[1:], ""]]
    texts = [i for i, token in enumerate(following) if token.endswith("context") and colons[i]]
    said = "".join(following).replace("Ġ", " ")
    if persona and "given persona:" in said:
        first = texts[0] if texts else len(following)
        kept[:first] = [False] * first
    texts = [i for i in texts if kept[i] and (i + 1 == len(kept) or kept[i + 1])]
    marks = [i for i, token in enumerate(following) if token.endswith("R") and colons[i] and kept[i] and kept[i + 1]]
    if context and texts and marks:
        for i in range(texts[-1], marks[-1] + 2):
            kept[i] = False
    return kept


WORDS = (
    "i",
    "ski",
    "context:",
    "subcontext:",
    "context :",
    "R:",
    "HR:",
    "R :",
    "r:",
    "given persona:",
    "R",
    ":",
    "a:b",
)
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(lambda words: " ".join(words) + " .")
# "persona:" in a turn's line makes it a persona line, which has a test of its own.
turns = st.builds(Turn, *2 * [sentences.map(lambda text: text.replace("persona:", "persona"))])
dialogues = st.builds(
    Dialogue, st.lists(sentences, max_size=3).map(tuple), st.lists(turns, min_size=1, max_size=4).map(tuple)
)


@settings(max_examples=200)
@given(dialogues, st.sampled_from([EOS, PAD]), st.booleans(), st.booleans(), st.integers(30, 300))
def test_learned_labels_are_those_of_the_authors_scan(
    dialogue: Dialogue, pad_id: int, persona: bool, context: bool, max_length: int
) -> None:
    free: Any = {"freeze_persona": False, "freeze_context": False}
    whole = official_rows([dialogue], TOKENIZER, max_length=max_length, **free)
    expected = []
    for row in whole:
        spelled = [TOKENIZER.backend.id_to_token(int(token)) or "" for token in row.tokens]
        kept = authors_scan(spelled, persona, context)
        expected.append([i for i, keep in enumerate(kept) if keep and row.tokens[i + 1] != pad_id])
    freeze: Any = {"pad_id": pad_id, "freeze_persona": persona, "freeze_context": context}
    if not all(expected):
        with pytest.raises(UserError, match="leaves nothing to learn"):
            official_rows([dialogue], TOKENIZER, max_length=max_length, **freeze)
        return
    rows = official_rows([dialogue], TOKENIZER, max_length=max_length, **freeze)
    assert [row.turns.tolist() for row in rows] == [[t] for t in range(len(dialogue.turns))]
    for row, unfrozen, positions in zip(rows, whole, expected, strict=True):
        np.testing.assert_array_equal(row.tokens, unfrozen.tokens)
        assert row.target_positions.tolist() == positions
        assert row.target_ids.tolist() == [row.tokens[i + 1] for i in positions]
        assert pad_id not in row.target_ids
        assert row.context_lengths.tolist() == [positions[0] + 1]
        assert len(row) <= max_length
        assert not row.target_turns.any()
        for array in (row.tokens, row.context_lengths, row.target_positions, row.target_ids, prompt_of(row)):
            assert array.dtype == np.int32


@settings(max_examples=50)
@given(dialogues, st.integers(30, 300))
def test_an_over_long_row_and_its_prompt_lose_their_left_side(dialogue: Dialogue, max_length: int) -> None:
    free: Any = {"freeze_persona": False, "freeze_context": False}
    cut = official_rows([dialogue], TOKENIZER, max_length=max_length, **free)
    for row, whole in zip(cut, official_rows([dialogue], TOKENIZER, max_length=10_000, **free), strict=True):
        np.testing.assert_array_equal(row.tokens, whole.tokens[-max_length:])
        np.testing.assert_array_equal(prompt_of(row), prompt_of(whole)[-max_length:])
        assert shown(whole.tokens).startswith("<s>given persona: ")
        assert shown(prompt_of(whole)) == shown(whole.tokens).removesuffix(
            f"{dialogue.turns[row.turns[0]].response}</s>"
        )


def test_the_response_and_its_end_are_learned_and_the_prompt_ends_with_a_lone_space() -> None:
    row = row_of(single("hello", "hi there"))
    assert shown(row.tokens) == "<s>given persona: i ski; context: Q: hello R: hi there</s>"
    assert learned(row) == " hi there</s>"
    assert shown(row.tokens[: row.context_lengths[0]]) == "<s>given persona: i ski; context: Q: hello R:"
    assert shown(prompt_of(row)) == "<s>given persona: i ski; context: Q: hello R: "


def test_where_the_padding_is_the_end_of_sequence_it_is_never_learned() -> None:
    row = row_of(single("hello", "hi there"), PAD_IS_EOS)
    assert learned(row) == " hi there"
    np.testing.assert_array_equal(row.tokens, row_of(single("hello", "hi there")).tokens)
    bos_as_padding = row_of(single("hello", "hi there"), PAD_IS_EOS, pad_id=BOS)
    assert learned(bos_as_padding) == " hi there</s>"


@pytest.mark.parametrize(
    ("dialogue", "text"),
    [
        (single("hello", "ask R: or HR: today"), " today</s>"),
        # Learned from the first `context:` up to the last, and again behind the last `R:`.
        (single("the context: is R: odd", "hi"), " context: Q: the hi</s>"),
        # The last `context:` stands behind the last `R:`: nothing but the persona is ignored.
        (single("hello", "in context: yes"), " context: Q: hello R: in context: yes</s>"),
    ],
)
def test_marks_inside_a_text_move_the_mask(dialogue: Dialogue, text: str) -> None:
    assert learned(row_of(dialogue)) == text


def test_where_the_cut_takes_context_away_the_whole_row_is_learned() -> None:
    row = row_of(single("hello", "hi there"), max_length=20)
    assert learned(row) == shown(row.tokens)[1:]
    assert row.context_lengths.tolist() == [1]


def test_freezing_less_learns_more() -> None:
    dialogue = single("hello", "hi")
    assert learned(row_of(dialogue, freeze_persona=False)) == "given persona: i ski; hi</s>"
    assert learned(row_of(dialogue, freeze_context=False)) == " context: Q: hello R: hi</s>"
    neither = row_of(dialogue, freeze_persona=False, freeze_context=False)
    assert learned(neither) == shown(neither.tokens).removeprefix("<s>")


def test_an_empty_persona_leaves_its_place_empty() -> None:
    rows = official_rows([single("a", "b"), single("c", "d", [])], TOKENIZER, max_length=500)
    # Behaviour that we do not copy: their reader would go on with the first dialogue's persona and context here.
    assert shown(rows[1].tokens) == "<s>given persona: ; context: Q: c R: d</s>"


FOUR = tuple(Turn(f"q{i}", f"r{i}") for i in range(1, 5))


def test_max_turns_keeps_the_last_2n_minus_1_utterances() -> None:
    contexts = [turn.context for turn in official_turns(Dialogue(("p",), FOUR), max_turns=2)]
    assert contexts == [
        ("Q: q1",),
        ("Q: q1", "R: r1", "Q: q2"),
        ("Q: q2", "R: r2", "Q: q3"),
        ("Q: q3", "R: r3", "Q: q4"),
    ]


def test_last_turn_only_counts_the_response_among_the_kept_and_loses_the_last_dialogue() -> None:
    dialogue = Dialogue(("p",), FOUR)
    kept = {n: [turn.context for turn in official_turns(dialogue, max_turns=n, last_turn_only=True)] for n in (1, 2, 0)}
    assert kept[1] == [()]
    assert kept[2] == [("R: r3", "Q: q4")]
    assert kept[0] == [official_turns(dialogue)[-1].context]
    rows = official_rows([dialogue] * 3, TOKENIZER, max_length=500, last_turn_only=True)
    assert [(row.dialogue, row.turns.tolist()) for row in rows] == [(0, [3]), (1, [3])]


def test_a_persona_line_ends_at_its_second_colon_and_any_line_with_persona_is_one() -> None:
    told = (Turn("hi", "ho"), Turn("the persona: of R", "yes"), Turn("and", "so"))
    dialogue = Dialogue(("i love: tea", "i ski"), told, partner_persona=("i row",))
    first, second = official_turns(dialogue)
    assert first.persona == ("i love", "i ski", "i row")
    assert (first.turn, second.turn) == (0, 2)
    assert second.persona == ("i love", "i ski", "i row", "of R\tyes")
    assert second.context == ("Q: hi", "R: ho", "Q: and")
    ranked = replace(dialogue, turns=(*FOUR[:2], Turn("q", "r", ("a persona: x", "r"))))
    assert [turn.turn for turn in official_turns(ranked)] == [0, 1]
    last = official_turns(replace(dialogue, turns=told[:2]), last_turn_only=True)
    assert [turn.persona for turn in last] == [second.persona]


def test_a_line_break_is_the_two_characters_of_the_file() -> None:
    (turn,) = official_turns(single("one\ntwo", "three\nfour"))
    assert (turn.context, turn.target) == (("Q: one\\ntwo",), "three\\nfour")


def test_special_tokens_spelled_in_a_text_are_those_tokens_and_cut_it(shared_dir: Path) -> None:
    """Against sentencepiece itself: pieces between special tokens are encoded alone, each with Llama's space."""
    sentencepiece = pytest.importorskip("sentencepiece")
    path = shared_dir / "data" / "tokenizers" / "llama2" / "tokenizer.model"
    llama = Tokenizer(read_sentencepiece(path)[0], bos_id=1, eos_id=2, pad_id=2)
    row = row_of(single("so </s>well <unk> x", "yes<s>", ["i ski  twice", "café 😀"]), llama)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = ["given persona: i ski  twice café 😀; context: Q: so ", 2, "well ", 0, " x R: yes", 1]
    expected = [1, *(i for p in pieces for i in ([p] if isinstance(p, int) else model.encode(p))), 2]
    assert row.tokens.tolist() == expected
    assert prompt_of(row).tolist() == [1, *expected[1 : len(model.encode(pieces[0])) + 1], 2] + [
        i for p in ("well ", 0, " x R: ") for i in ([p] if isinstance(p, int) else model.encode(p))
    ]


def test_a_conversation_may_begin_with_the_personas_own_words() -> None:
    prompt = official_prompt(["i ski"], ["hello", "hi"], TOKENIZER, max_length=500)
    assert shown(prompt) == "<s>given persona: i ski; context: R: hello Q: hi R: "
    assert shown(official_prompt([], ["hello", "hi"], TOKENIZER, max_length=9)) == " Q: hi R: "[-9:]


def test_a_conversation_reads_as_the_same_turn_of_a_file() -> None:
    """Their reader cuts a persona's line at its second colon and takes a line break for two characters."""
    persona, query = "my motto: carpe diem", "hi\nthere "
    prompt = official_prompt([persona], [query], TOKENIZER, max_length=500)
    assert prompt.tolist() == prompt_of(row_of(single(query, "yes", [persona]), TOKENIZER)).tolist()


def test_a_conversation_needs_an_utterance() -> None:
    with pytest.raises(UserError, match="history is empty"):
        official_prompt([], [], TOKENIZER, max_length=9)


@pytest.mark.parametrize(
    ("dialogue", "options", "words"),
    [
        (single("a", "b"), {"max_length": 0}, "max_length is 0"),
        (single("a", "b"), {"max_turns": -1}, "max_turns is -1"),
        (single("a", "b"), {"last_turn_only": True}, "only one"),
        (Dialogue(("p",), (), source="chat.txt:7"), {}, r"chat\.txt:7 has no turns"),
    ],
)
def test_refusals_name_the_place_and_what_is_allowed(dialogue: Dialogue, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        row_of(dialogue, **options)


def test_a_tokenizer_that_cuts_context_in_pieces_is_refused() -> None:
    dialogue = replace(single("a", "b"), source="chat.txt:7")
    with pytest.raises(UserError, match=r"chat\.txt:7: turn 1 leaves nothing to learn .* cuts 'context' in pieces"):
        row_of(dialogue, small_tokenizer(words=["given", "persona"]))

"""hits@1: candidates behind a context that is read once equal a row of their own, and the figures made of them."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from spt_jax.data.dialogue import Dialogue, Turn
from spt_jax.data.few_shot import FewShot
from spt_jax.data.packing import Row, pack
from spt_jax.data.sources import read_dialogues
from spt_jax.data.template import PlainTemplate, Template, TextEncoder
from spt_jax.errors import UserError
from spt_jax.evaluation.candidate_scores import CandidateScores, score_candidates
from spt_jax.evaluation.candidates import RankedTurn, ranked_turns
from spt_jax.evaluation.hits import rank
from spt_jax.models.decoder import decode, embed, vocabulary_logits
from spt_jax.models.decoder_config import LayerKind
from spt_jax.models.tokenization.folder_tokenizer import tokenizer_of_folder
from spt_jax.parallel.mesh import make_mesh
from spt_jax.prompting.adapters import Prefixes, SoftPrompts
from spt_jax.prompting.prefixes import prefix_cache
from spt_jax.prompting.selective_lm import SelectiveLM, inference_conditions, without_prompt

pytestmark = pytest.mark.first_python

TEXTS = ("no", "i do not know what you mean", "", "ok", "at sea", "fine, and how are you today?", "no")
ENCODER = tiny.CharacterEncoder()


def with_candidates(dialogues=tiny.DIALOGUES) -> list[Dialogue]:
    """Two to eight candidates a turn, the response in any place; the second turn of each dialogue has none."""
    rng = np.random.default_rng(3)
    found = []
    for dialogue in dialogues:
        turns = []
        for t, turn in enumerate(dialogue.turns):
            texts = [str(text) for text in rng.choice(TEXTS, rng.integers(1, 8), replace=False)]
            texts.insert(int(rng.integers(len(texts) + 1)), turn.response)
            turns.append(dataclasses.replace(turn, candidates=() if t == 1 else tuple(texts)))
        found.append(dataclasses.replace(dialogue, turns=tuple(turns)))
    return found


DIALOGUES = with_candidates()
WANTED = [(d, t) for d, dialogue in enumerate(DIALOGUES) for t in range(len(dialogue.turns))]


def turns_of(rows: list[Row], template: Template | None = None, dialogues: list[Dialogue] = DIALOGUES):
    return ranked_turns(rows, dialogues, WANTED, template or PlainTemplate(), ENCODER)


def scored(
    model: SelectiveLM = tiny.MODEL,
    *,
    layout: str = "dialogue",
    rows: list[Row] | None = None,
    turns: list[RankedTurn] | None = None,
    mesh: int = 1,
    prompts: int = 3,
    seed: int = 0,
    **options,
) -> list[CandidateScores]:
    rows = list(pack(DIALOGUES, ENCODER, layout=layout, max_length=224).rows) if rows is None else rows
    turns = turns_of(rows) if turns is None else turns
    conditions = inference_conditions(model, tiny.params(model.decoder), trainable_of(model))
    selected = np.random.default_rng(seed).integers(0, prompts, len(turns)).tolist()
    options = {"batch_size": 4, "pad_id": 0, "max_buckets": 1} | options
    devices = make_mesh(mesh, 1, 1, devices=jax.devices()[:mesh])
    return score_candidates(model, conditions, rows, turns, selected, mesh=devices, **options)


def trainable_of(model: SelectiveLM):
    return model.init(jax.random.key(1))


@partial(jax.jit, static_argnums=0)
def _log_probabilities(config, params, chosen, tokens, length):
    """Of one row behind one condition, by the plain functions of the decoder."""
    text = embed(config, params, tokens)
    if chosen.ndim == 2:
        inputs, cache, front, first = jnp.concatenate([chosen.astype(text.dtype), text])[None], None, len(chosen), 0
    else:
        front = first = chosen.shape[2]
        inputs, cache = text[None], prefix_cache(config, chosen[None], front + len(tokens))
    places = jnp.arange(first, first + inputs.shape[1])[None]
    hidden, _ = decode(config, params, inputs, places, places < front + length, cache)
    return jax.nn.log_softmax(vocabulary_logits(config, params, hidden[0, front - first :]))


def from_scratch(
    model: SelectiveLM,
    turns: list[RankedTurn],
    selected: list[int],
    template: Template | None = None,
    start: int = 0,
    dialogues: list[Dialogue] = DIALOGUES,
    encoder: TextEncoder = ENCODER,
    length: int = 900,
) -> list[CandidateScores]:
    """Every candidate as the response of a row of its own, packed and scored alone."""
    params = tiny.params(model.decoder)
    bank = inference_conditions(model, params, trainable_of(model)).bank
    found = []
    for turn, prompt in zip(turns, selected, strict=True):
        nll, tokens = [], []
        for text in turn.texts:
            dialogue = dialogues[turn.dialogue]
            said = (*dialogue.turns[start : turn.turn], Turn(dialogue.turns[turn.turn].query, text))
            [*_, row] = pack(
                [dataclasses.replace(dialogue, turns=said)],
                encoder,
                layout="turn",
                max_length=length,
                template=template,
            ).rows
            padded = np.pad(row.tokens, (0, length - len(row)))
            log_probabilities = _log_probabilities(model.decoder, params, bank[prompt], padded, len(row))
            nll.append(-float(log_probabilities[row.target_positions, row.target_ids].sum()))
            tokens.append(len(row.target_ids))
        found.append(CandidateScores(np.asarray(nll), np.asarray(tokens)))
    return found


def assert_same(found: list[CandidateScores], expected: list[CandidateScores], tolerance: float = 1e-4) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.mean_nll, other.mean_nll, atol=tolerance, rtol=0)


WINDOWS = dataclasses.replace(
    tiny.CONFIG,
    layer_kinds=(LayerKind(tiny.CONFIG.layer_kinds[0].rope, 24), LayerKind(tiny.CONFIG.layer_kinds[0].rope, None)),
    layer_pattern=(0, 1),
    attention_softcap=20.0,
    logit_softcap=30.0,
)
LEARNED = dataclasses.replace(tiny.CONFIG, position_embedding="learned", position_offset=2)
WIDE = {"max_position_embeddings": 1024}
MODELS = {
    "bank": tiny.MODEL,
    "windows and soft caps": dataclasses.replace(tiny.MODEL, decoder=WINDOWS),
    "learned positions": dataclasses.replace(tiny.MODEL, decoder=dataclasses.replace(LEARNED, **WIDE)),
    "prefixes": SelectiveLM(tiny.CONFIG, Prefixes(3, 4, keys=True), tiny.MODEL.retriever_config, max_logit_rows=64),
    "one prompt": SelectiveLM(tiny.CONFIG, SoftPrompts(1, 4, stddev=0.5), None, max_logit_rows=64),
    "no prompt": without_prompt(tiny.MODEL),
}


@pytest.mark.parametrize("name", MODELS)
def test_candidates_score_as_rows_of_their_own(name: str) -> None:
    model = MODELS[name]
    prompts = model.num_prompts
    rows = list(pack(DIALOGUES, ENCODER, layout="dialogue", max_length=224).rows)
    turns = turns_of(rows)
    selected = np.random.default_rng(0).integers(0, prompts, len(turns)).tolist()
    assert prompts == 1 or len(set(selected)) > 1
    assert_same(scored(model, prompts=prompts), from_scratch(model, turns, selected))


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 64},
        {"max_buckets": 4},
        {"pad_id": 77},
        {"layout": "turn"},
        {"mesh": 8, "batch_size": 8},
    ],
    ids=str,
)
def test_batches_buckets_padding_layouts_and_devices_change_nothing(options) -> None:
    assert_same(scored(**options), scored(), tolerance=1e-5)


def test_a_context_that_lost_its_oldest_turns_is_the_one_that_candidates_follow() -> None:
    limit = 110
    rows = list(pack(DIALOGUES, ENCODER, layout="dialogue", max_length=limit).rows)
    turns = [turn for turn in turns_of(rows) if (turn.dialogue, turn.turn) == (2, 3)]
    whole = turns_of(list(pack(DIALOGUES, ENCODER, layout="turn", max_length=224).rows))
    assert turns[0].context_length < next(t.context_length for t in whole if (t.dialogue, t.turn) == (2, 3))
    found = scored(rows=rows, turns=turns, prompts=1)
    expected = {start: from_scratch(tiny.MODEL, turns, [0], start=start) for start in range(4)}
    lost = next(
        start
        for start in range(1, 4)
        if len(ENCODER.encode([context_of(2, 3, start)])[0]) + 1 == turns[0].context_length
    )
    assert_same(found, expected[lost])


class PlaceEncoder(tiny.CharacterEncoder):
    """A token depends on everything before it, as those of a tokenizer may."""

    def encode(self, texts):
        return [[(ord(character) + place) % 125 + 3 for place, character in enumerate(text)] for text in texts]


@pytest.mark.parametrize("limit", [110, 224])
def test_the_response_among_the_candidates_has_the_tokens_of_its_row(limit: int) -> None:
    rows = list(pack(DIALOGUES, PlaceEncoder(), layout="dialogue", max_length=limit).rows)
    turns = ranked_turns(rows, DIALOGUES, WANTED, PlainTemplate(), PlaceEncoder())
    assert len(turns) == len([turn for dialogue in DIALOGUES for turn in dialogue.turns if turn.candidates])
    for turn in turns:
        row = rows[turn.row]
        targets = row.target_ids[row.target_turns == row.turns.tolist().index(turn.turn)]
        assert [*turn.ids[turn.response], turn.end_id] == targets.tolist()


def context_of(dialogue: int, turn: int, start: int) -> str:
    said = DIALOGUES[dialogue].turns[start:turn]
    middle = "".join(f" Q: {t.query} R: {t.response}" for t in said)
    persona = " ".join(DIALOGUES[dialogue].persona)
    return f"given persona: {persona}; context:{middle} Q: {DIALOGUES[dialogue].turns[turn].query} R:"


def test_behind_demonstrations_too() -> None:
    others = tuple(
        Dialogue((f"I am number {n}.",), (Turn(f"who are you, {n}?", "a number"),), (), "") for n in range(3)
    )
    template = FewShot(PlainTemplate(), others, 2)
    rows = list(pack(DIALOGUES, ENCODER, layout="dialogue", max_length=900, template=template).rows)
    model = dataclasses.replace(tiny.MODEL, decoder=dataclasses.replace(tiny.CONFIG, **WIDE))
    turns = turns_of(rows, template)[:3]
    found = scored(model, rows=rows, turns=turns, prompts=1)
    assert_same(found, from_scratch(model, turns, [0] * 3, template))


def test_only_turns_whose_candidates_hold_the_response_are_ranked_and_equal_candidates_are_one() -> None:
    turns = (
        Turn("hi", "hello", ("bye", "hello", "bye", "hello")),
        Turn("so?", "yes", ("no", "maybe")),
        Turn("well", "ok"),
    )
    dialogues = [Dialogue(("I sail.",), turns)]
    rows = list(pack(dialogues, ENCODER, layout="dialogue", max_length=224).rows)
    [turn] = ranked_turns(rows, dialogues, [(0, 0), (0, 1), (0, 2)], PlainTemplate(), ENCODER)
    assert (turn.texts, turn.response, turn.turn) == (("bye", "hello"), 1, 0)
    assert turn.ids == tuple(tuple(ids) for ids in ENCODER.encode([" bye", " hello"]))


def test_a_candidate_beyond_the_lms_context_is_refused_by_its_turn() -> None:
    long = dataclasses.replace(
        DIALOGUES[3], turns=(dataclasses.replace(DIALOGUES[3].turns[0], candidates=("x" * 300,)),)
    )
    long = dataclasses.replace(
        long, turns=(dataclasses.replace(long.turns[0], candidates=("x" * 300, long.turns[0].response)),)
    )
    rows = list(pack([long], ENCODER, layout="dialogue", max_length=224).rows)
    turns = ranked_turns(rows, [long], [(0, 0)], PlainTemplate(), ENCODER)
    with pytest.raises(
        UserError, match=r"a candidate of turn 0 of dialogue 0 needs \d+ positions, but this LM has 256"
    ):
        scored(rows=rows, turns=turns, prompts=1)


def turn_with(response: int, count: int) -> RankedTurn:
    texts = tuple(f"text {n}" for n in range(count))
    return RankedTurn(0, 1, 0, 0, texts, response, tuple((1,) for _ in texts), 2)


def test_hits_by_hand_both_ways_and_the_first_among_equals() -> None:
    scores = [
        CandidateScores(np.asarray([4.0, 3.0, 9.0]), np.asarray([4, 1, 3])),  # means 1, 3, 3
        CandidateScores(np.asarray([4.0, 2.0, 2.0]), np.asarray([1, 1, 1])),  # a tie of 1 and 2
        CandidateScores(np.asarray([4.0, 2.0, 2.0]), np.asarray([1, 1, 1])),
        CandidateScores(np.asarray([1.0, 2.0]), np.asarray([1, 2])),  # a tie of the means alone
    ]
    found = rank([turn_with(0, 3), turn_with(1, 3), turn_with(2, 3), turn_with(1, 2)], scores)
    assert found.by_mean.tolist() == [True, True, False, False]
    assert found.by_total.tolist() == [False, True, False, False]
    assert found.tied.tolist() == [False, True, True, True]
    assert found.values == {"hits_1": 50.0, "hits_1_total": 25.0, "hits_turns": 4.0, "hits_ties": 3.0}
    assert rank([], []).values == {}


def test_a_model_that_knows_the_answers_always_hits() -> None:
    rows = list(pack(DIALOGUES, ENCODER, layout="dialogue", max_length=224).rows)
    turns = turns_of(rows)
    scores = [
        CandidateScores(np.where(np.arange(len(t.ids)) == t.response, 1.0, 2.0), np.ones(len(t.ids))) for t in turns
    ]
    assert rank(turns, scores).values["hits_1"] == 100.0


def test_convai2s_candidates_score_as_rows_of_their_own(shared_dir) -> None:
    """The published file, its 20 candidates a turn, in the tokens of a real LM; the weights are random."""
    dialogues = list(read_dialogues(str(shared_dir / "data/convai2/valid_self_original.txt.xz")).dialogues[:2])
    encoder = tokenizer_of_folder(shared_dir / "data/tokenizers/opt", "opt")
    decoder = dataclasses.replace(tiny.CONFIG, vocab_size=encoder.vocab_size, **WIDE)
    model = dataclasses.replace(tiny.MODEL, decoder=decoder)
    rows = list(pack(dialogues, encoder, layout="dialogue", max_length=512).rows)
    wanted = [(d, t) for d, dialogue in enumerate(dialogues) for t in range(len(dialogue.turns))]
    turns = ranked_turns(rows, dialogues, wanted, PlainTemplate(), encoder)
    assert [len(turn.texts) for turn in turns] == [20] * len(wanted)
    selected = np.random.default_rng(0).integers(0, 3, len(turns)).tolist()
    found, some = scored(model, rows=rows, turns=turns), slice(3, None, 6)
    alone = from_scratch(model, turns[some], selected[some], dialogues=dialogues, encoder=encoder, length=320)
    assert_same(found[some], alone)
    assert rank(turns, found).values["hits_turns"] == len(turns)

"""The section ``data`` reaches the rows, the texts and the batches of the official mode, each option by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from official_tokenizer import BOS, EOS, PAD, small_tokenizer

from spt_jax.config import Config, default_config, set_option
from spt_jax.data.dialogue import Dialogue, Turn
from spt_jax.data.official import official_rows
from spt_jax.data.packing import Row
from spt_jax.models.tokenization.tokenizer import Tokenizer
from spt_jax.parallel.mesh import make_mesh
from spt_jax.training.experiment import contrastive_texts, make_loader, pack_dialogues, pad_id_of

TOKENIZER = small_tokenizer()
"""It names no padding of its own."""

DIALOGUES = (
    Dialogue(("i ski", "my boat: red: fast"), (Turn("hi", "hello"), Turn("and ?", "so"), Turn("oh", "bye"))),
    Dialogue(("i row",), (Turn("the persona: of R", "yes"), Turn("who ?", "me"), Turn("ah", "no"))),
)


def config_of(options: dict[str, Any] | None = None) -> Config:
    config = default_config()
    for name, value in {"retriever.context": "official", "data.layout": "turn", **(options or {})}.items():
        set_option(config, name, value)
    return config


def as_lists(rows: Sequence[Row]) -> list[Any]:
    """All that a row holds."""
    fields = ("turns", "tokens", "target_positions", "target_ids", "inference_prompt", "context_lengths")
    return [[row.dialogue, *(np.asarray(getattr(row, name)).tolist() for name in fields)] for row in rows]


def packed(options: dict[str, Any], learning: bool = True) -> list[Any]:
    return as_lists(pack_dialogues(config_of(options), DIALOGUES, TOKENIZER, learning=learning).rows)


OPTIONS: list[tuple[str, Any, dict[str, Any]]] = [
    ("data.freeze_persona", False, {"freeze_persona": False}),
    ("data.freeze_context", False, {"freeze_context": False}),
    ("data.max_turns", 2, {"max_turns": 2}),
    ("data.last_turn_only", True, {"last_turn_only": True}),
    ("data.max_length", 40, {"max_length": 40}),
    ("data.official_pad", "bos", {"pad_id": BOS}),
]


@pytest.mark.parametrize(("option", "value", "argument"), OPTIONS, ids=[option for option, _, _ in OPTIONS])
def test_an_option_of_the_official_rows_is_honoured_alone(option, value, argument):
    plain = {"max_length": 512, "pad_id": EOS}
    assert packed({}) == as_lists(official_rows(DIALOGUES, TOKENIZER, **plain))
    expected = as_lists(official_rows(DIALOGUES, TOKENIZER, **plain | argument))
    assert packed({option: value}) == expected != packed({})


def test_every_turn_is_evaluated_where_the_last_alone_is_learned():
    assert packed({"data.last_turn_only": True}, learning=False) == packed({}, learning=False) == packed({})


def test_official_rows_learn_no_end_of_sequence_where_it_is_the_padding_and_else_do():
    for pad, learned in (("eos", False), ("bos", True)):
        rows = pack_dialogues(config_of({"data.official_pad": pad}), DIALOGUES, TOKENIZER).rows
        assert {EOS in row.target_ids for row in rows} == {learned}


def test_padding_is_the_tokenizers_own_where_it_names_one_and_else_what_the_option_says():
    own = Tokenizer(TOKENIZER.backend, BOS, EOS, PAD, own_pad_id=PAD)
    without_bos = Tokenizer(TOKENIZER.backend, None, EOS, PAD)
    for pad, found in (("eos", EOS), ("bos", BOS)):
        official = config_of({"data.official_pad": pad})
        assert [pad_id_of(official, t) for t in (TOKENIZER, own, without_bos)] == [found, PAD, EOS]
        assert pad_id_of(config_of({"data.official_pad": pad, "retriever.context": "context"}), TOKENIZER) == PAD


def test_the_texts_of_official_pairs_are_the_personas_as_the_authors_read_them():
    config = config_of()
    rows = pack_dialogues(config, DIALOGUES, TOKENIZER).rows
    texts = contrastive_texts(config, rows, DIALOGUES)
    # A persona line ends at its second colon; a turn with `persona:` is none, but persona of the turns behind it.
    assert texts == [["i ski my boat"]] * 3 + [["i row of R\tyes"]] * 2


def test_the_texts_of_pairs_are_contexts_where_that_is_asked_for_and_none_where_the_loss_is_off():
    config = config_of({"objective.pair_text": "context"})
    rows = pack_dialogues(config, DIALOGUES, TOKENIZER).rows
    texts = contrastive_texts(config, rows, DIALOGUES)
    assert texts is not None and len({text for row in texts for text in row}) == len(rows)
    assert contrastive_texts(config_of({"objective.contrastive_weight": 0.0}), rows, DIALOGUES) is None
    assert contrastive_texts(config_of({"method.kind": "prompt_tuning"}), rows, DIALOGUES) is None


@pytest.mark.parametrize("width", [150, 333])
def test_official_batches_hold_whole_rows_padded_to_the_limit(width):
    config = config_of({"data.max_length": width, "data.batch": 2, "seed": 3})
    rows = pack_dialogues(config, DIALOGUES, TOKENIZER)
    loader = make_loader(config, rows, DIALOGUES, make_mesh(1, devices=jax.devices()[:1]), PAD)
    batch = loader.batch(0)
    assert batch["retriever_tokens"].shape == (2, width)
    assert batch["retriever_widths"].tolist() == [width, width]
    tokens, lengths = batch["tokens"], batch["lengths"]
    for read, row, length in zip(batch["retriever_tokens"], tokens, lengths, strict=True):
        np.testing.assert_array_equal(read[:length], row[:length])
        assert (read[length:] == PAD).all()
    assert batch["similar"].shape == (2, 2)


def test_batches_of_the_paper_have_no_such_rows():
    config = config_of({"retriever.context": "context", "data.layout": "dialogue", "data.batch": 2})
    rows = pack_dialogues(config, DIALOGUES, TOKENIZER)
    loader = make_loader(config, rows, DIALOGUES, make_mesh(1, devices=jax.devices()[:1]), PAD)
    assert not [name for name in loader.batch(0) if name.startswith("retriever")]


def test_the_threshold_of_the_configuration_decides_which_pairs_are_similar():
    alike = [Dialogue((f"i love my small red {pet} a lot",), (Turn("hi", "ho"),)) for pet in ("cat", "dog")]
    found = []
    for threshold in (10.0, 90.0):
        config = config_of({"objective.bleu_threshold": threshold, "data.batch": 2})
        rows = pack_dialogues(config, alike, TOKENIZER)
        similar = make_loader(config, rows, alike, make_mesh(1, devices=jax.devices()[:1]), PAD).batch(0)["similar"]
        found.append(bool(similar[0, 1]))
    assert found == [True, False]

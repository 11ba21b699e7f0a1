from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import sacrebleu
from toy_encoders import WordEncoder

from spt_jax.data import (
    Dialogue,
    DialogueLoader,
    Row,
    Turn,
    pack,
    pair_texts,
    sequential_batches,
)
from spt_jax.errors import UserError

WORDS = ["i", "like", "to", "run", "and", "swim", "with", "my", "two", "dogs", "in", "the", "park", "every", "day"]
PAD = 2


def make_dialogues(count: int) -> list[Dialogue]:
    generator = np.random.default_rng(7)

    def say(most: int) -> str:
        return " ".join(generator.choice(WORDS, generator.integers(1, most)))

    return [
        Dialogue(
            tuple(say(8) for _ in range(3)),
            tuple(Turn(say(9), say(9)) for _ in range(generator.integers(1, 6))),
            source=f"f:{d}",
        )
        for d in range(count)
    ]


DIALOGUES = make_dialogues(45)


def rows_of(layout: str = "dialogue") -> list[Row]:
    return pack(DIALOGUES, WordEncoder(), layout=layout, max_length=999).rows


def loader_of(rows: list[Row], **options) -> DialogueLoader:
    return DialogueLoader(rows, **({"batch_size": 6, "pad_id": PAD, "seed": 3, "max_buckets": 3} | options))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def rows_in(batch: dict[str, np.ndarray]) -> list[tuple]:
    """Every real row of a batch with all that belongs to it, padding cut off."""
    result = []
    for place in np.flatnonzero(batch["lengths"]):
        turns, targets = batch["turn_mask"][place] > 0, batch["target_mask"][place] > 0
        result.append(
            (
                int(batch["dialogue_ids"][place]),
                tuple(batch["tokens"][place, : batch["lengths"][place]]),
                tuple(batch["context_lengths"][place, turns]),
                tuple(batch["turn_ids"][place, turns]),
                tuple(batch["target_positions"][place, targets]),
                tuple(batch["target_ids"][place, targets]),
                tuple(batch["target_turns"][place, targets]),
            )
        )
    return result


def as_tuple(row: Row) -> tuple:
    arrays = (row.tokens, row.context_lengths, row.turns, row.target_positions, row.target_ids, row.target_turns)
    return (row.dialogue, *map(tuple, arrays))


@pytest.mark.parametrize("layout", ["dialogue", "turn"])
@pytest.mark.parametrize("batch_size", [1, 6, 64])
def test_every_row_appears_exactly_once_an_epoch_whole_and_unchanged(layout, batch_size):
    rows = rows_of(layout)
    loader = loader_of(rows, batch_size=batch_size)
    for epoch in range(2):
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        seen = [row for step in steps for row in rows_in(loader.batch(step))]
        assert sorted(seen) == sorted(map(as_tuple, rows))


def test_padding_is_masked_and_marked():
    batch = loader_of(rows_of(), batch_size=64).batch(0)
    real = np.arange(batch["tokens"].shape[1]) < batch["lengths"][:, None]
    assert (batch["tokens"][~real] == PAD).all()
    empty = batch["lengths"] == 0
    assert empty.sum() == 64 - 45 and np.array_equal(empty, batch["dialogue_ids"] == -1)
    assert not batch["turn_mask"][empty].any() and not batch["target_mask"][empty].any()
    assert np.array_equal(batch["turn_mask"] == 0, batch["turn_ids"] == -1)
    assert np.array_equal(batch["turn_mask"] == 0, batch["context_lengths"] == 0)
    assert (batch["target_ids"][batch["target_mask"] == 0] == PAD).all()
    types = {key: array.dtype.name for key, array in batch.items()}
    assert {key for key, kind in types.items() if kind == "float32"} == {"turn_mask", "target_mask"}
    assert set(types.values()) == {"int32", "float32"}


def test_batches_have_the_announced_shapes_and_means():
    rows = rows_of()
    loader = loader_of(rows)
    total = dict.fromkeys(("turns", "tokens", "targets", "slots"), 0.0)
    for step in range(loader.steps_per_epoch):
        batch, shape = loader.batch(step), loader.shape(step)
        assert shape in loader.shapes
        assert batch["tokens"].shape == (6, shape.length)
        assert batch["target_ids"].shape == (6, shape.targets) and batch["turn_mask"].shape == (6, shape.turns)
        for name, amount in zip(
            total,
            (batch["turn_mask"].sum(), batch["lengths"].sum(), batch["target_mask"].sum(), batch["tokens"].size),
            strict=True,
        ):
            total[name] += amount
    steps = loader.steps_per_epoch
    assert loader.turns_per_step == pytest.approx(total["turns"] / steps)
    assert loader.tokens_per_step == pytest.approx(total["tokens"] / steps)
    assert loader.targets_per_step == pytest.approx(total["targets"] / steps)
    assert loader.padding_share == pytest.approx(1 - total["tokens"] / total["slots"])


def test_a_batch_is_a_function_of_seed_and_step_alone():
    rows = rows_of()
    first, second = loader_of(rows), loader_of(rows)
    steps = list(range(3 * first.steps_per_epoch))
    forward = {step: first.batch(step) for step in steps}
    assert all(same(forward[step], second.batch(step)) for step in reversed(steps))
    other = loader_of(rows, seed=4)
    assert not all(same(forward[step], other.batch(step)) for step in range(first.steps_per_epoch))
    assert not all(same(forward[step], forward[step + first.steps_per_epoch]) for step in range(first.steps_per_epoch))


@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_the_hosts_batches_side_by_side_are_the_single_hosts(hosts):
    rows = rows_of()
    texts = pair_texts(rows, DIALOGUES, "persona")
    alone = loader_of(rows, pair_texts=texts)
    shared = [loader_of(rows, pair_texts=texts, rows_here=part) for part in np.array_split(range(6), hosts)]
    for step in range(alone.steps_per_epoch):
        whole, parts = alone.batch(step), [loader.batch(step) for loader in shared]
        assert all(np.array_equal(part["similar"], whole["similar"]) for part in parts)
        joined = {key: np.concatenate([part[key] for part in parts]) for key in whole if key != "similar"}
        assert same(joined | {"similar": whole["similar"]}, whole)


@pytest.mark.parametrize("kind", ["persona", "context"])
def test_similar_is_sacrebleu_above_the_threshold_in_both_layouts(kind):
    dialogues = DIALOGUES[:12]
    found: list[dict] = []
    for layout in ("dialogue", "turn"):
        rows = pack(dialogues, WordEncoder(), layout=layout, max_length=999).rows
        texts = pair_texts(rows, dialogues, kind)
        text_of = {
            (row.dialogue, int(turn)): text
            for row, row_texts in zip(rows, texts, strict=True)
            for turn, text in zip(row.turns, row_texts, strict=True)
        }
        batch = loader_of(rows, batch_size=64, pair_texts=texts).batch(0)
        numbers = np.repeat(batch["dialogue_ids"], batch["turn_ids"].shape[1])
        keys = list(zip(numbers.tolist(), batch["turn_ids"].reshape(-1).tolist(), strict=True))
        present = batch["turn_mask"].reshape(-1) > 0
        similar = batch["similar"]
        assert similar.dtype == bool and similar.shape == (len(keys), len(keys))
        assert not similar[~present].any() and not similar[:, ~present].any()
        places = np.flatnonzero(present)
        found.append({(keys[i], keys[j]): bool(similar[i, j]) for i in places for j in places})
    assert found[0] == found[1]
    assert 0 < sum(found[0].values()) < len(found[0])
    for (a, b), answer in list(found[0].items())[::7]:
        assert answer == (sacrebleu.sentence_bleu(text_of[a], [text_of[b]]).score > 20)


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_iterating_is_batch_by_batch_from_any_step_and_silent(prefetch, capfd):
    rows = rows_of()
    loader = loader_of(rows, pair_texts=pair_texts(rows, DIALOGUES, "persona"), prefetch=prefetch)
    steps = []
    for step, batch in loader.iterate(5, 5 + 2 * loader.steps_per_epoch):
        assert same(batch, loader.batch(step))
        steps.append(step)
    assert steps == list(range(5, 5 + 2 * loader.steps_per_epoch))
    assert list(loader.iterate(4, 4)) == []
    assert capfd.readouterr() == ("", "")


def prefetching() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "prefetch" in thread.name]


def test_threads_end_when_the_iterator_is_dropped():
    iterator = loader_of(rows_of()).iterate(0, 1000)
    next(iterator)
    assert prefetching()
    del iterator
    deadline = time.monotonic() + 5
    while prefetching() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not prefetching()


def test_an_error_while_prefetching_reaches_the_caller():
    loader = loader_of(rows_of())
    loader._rows = []
    with pytest.raises(IndexError):
        next(loader.iterate(0, 5))


def test_sequential_batches_hold_every_row_once_and_say_which():
    rows = rows_of()
    seen = []
    for batch, indices in sequential_batches(rows, batch_size=4, pad_id=PAD, max_buckets=2):
        assert rows_in(batch) == [as_tuple(rows[i]) for i in indices if i >= 0]
        assert np.array_equal(indices < 0, batch["lengths"] == 0)
        seen += [i for i in indices if i >= 0]
    assert sorted(seen) == list(range(len(rows)))


def test_bad_arguments_are_one_sentence():
    rows = rows_of()
    for options, pattern in (
        ({"seed": -1}, "seed is -1"),
        ({"bleu_threshold": 101.0}, "threshold is 101"),
        ({"prefetch": -1}, "prefetch is -1"),
        ({"batch_size": 0}, "batch is 0"),
        ({"max_buckets": 0}, "max_buckets 0"),
        ({"pair_texts": [["a"]]}, "pair texts do not fit"),
    ):
        with pytest.raises(UserError, match=pattern):
            loader_of(rows, **options)
    with pytest.raises(UserError, match="no rows"):
        loader_of([])
    with pytest.raises(UserError, match="not -1"):
        loader_of(rows).batch(-1)
    with pytest.raises(UserError, match="not -1"):
        loader_of(rows).iterate(-1, 3)


@pytest.mark.first_python
def test_the_real_training_file_pads_less_than_a_tenth(train_rows):
    loader = DialogueLoader(train_rows, batch_size=8, pad_id=1, seed=0)
    slots = real = 0
    for _, batch in loader.iterate(0, loader.steps_per_epoch):
        slots += batch["tokens"].size
        real += int(batch["lengths"].sum())
    print(f"padding {1 - real / slots:.2%} with {len(loader.shapes)} shapes, {loader.turns_per_step:.1f} turns a step")
    assert 1 - real / slots < 0.1

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from tiny import layout_of

from spt_jax.errors import UserError
from spt_jax.generation import engine as engine_module
from spt_jax.generation.decode import begin, decode_loop, prefill, read_prompts
from spt_jax.generation.decoding import Decoding
from spt_jax.generation.engine import GenerationEngine
from spt_jax.models.frozen_tree import random_params
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import replicated, row_sharding

NEW = 9
GREEDY = Decoding()
SAMPLED = Decoding(1.3, top_k=20, top_p=0.95, repetition_penalty=1.2)
SEARCHED = Decoding(beams=3, no_repeat_ngram=2)


def make_engine(tiny, eos_ids=(), max_batch=4, length_multiple=40) -> GenerationEngine:
    return GenerationEngine(
        tiny.config, tiny.params, eos_ids=eos_ids, pad_id=0, max_batch=max_batch, length_multiple=length_multiple
    )


def test_greedy_batches_of_mixed_prompts_and_lengths_equal_full_forwards(tiny, contexts):
    engine = make_engine(tiny)
    for shift in range(3):
        selected = [(row + shift) % 3 for row in range(len(contexts))]
        batched = engine.generate(tiny.bank, contexts, selected, max_new_tokens=NEW)
        for row, (context, prompt) in enumerate(zip(contexts, selected, strict=True)):
            expected, margin = tiny.reference(tiny.bank[prompt], context, NEW)
            assert margin > 1e-4, "a near tie would make this comparison a coin toss"
            assert batched[row] == expected, f"row {row} behind prompt {prompt}"


def test_prompts_change_the_greedy_continuation(tiny, contexts):
    engine = make_engine(tiny)
    per_prompt = [engine.generate(tiny.bank, contexts, [k] * len(contexts), max_new_tokens=NEW) for k in range(3)]
    assert per_prompt[0] != per_prompt[1] != per_prompt[2]


def test_a_bank_without_tokens_is_the_lm_alone(tiny, contexts):
    bank = jnp.zeros((1, 0, tiny.config.hidden_size))
    batched = make_engine(tiny).generate(bank, contexts, [0] * len(contexts), max_new_tokens=NEW)
    for context, row in zip(contexts, batched, strict=True):
        assert row == tiny.reference(bank[0], context, NEW)[0]


@pytest.mark.parametrize(
    ("decoding", "max_batch", "length_multiple"),
    [
        (GREEDY, 1, 40),
        (GREEDY, 3, 16),
        (GREEDY, 16, 64),
        (SAMPLED, 3, 16),
        (SAMPLED, 16, 64),
        (SEARCHED, 1, 40),
        (SEARCHED, 16, 64),
    ],
)
def test_batch_size_and_padding_change_nothing(tiny, contexts, selected, decoding, max_batch, length_multiple):
    expected = make_engine(tiny).generate(tiny.bank, contexts, selected, max_new_tokens=NEW, decoding=decoding, seed=3)
    engine = make_engine(tiny, max_batch=max_batch, length_multiple=length_multiple)
    assert engine.generate(tiny.bank, contexts, selected, max_new_tokens=NEW, decoding=decoding, seed=3) == expected


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED, SEARCHED])
def test_layers_in_a_stack_and_apart_give_the_same(tiny, contexts, selected, decoding, monkeypatch):
    apart = make_engine(tiny, eos_ids=[7])
    monkeypatch.setattr(engine_module, "on_one_cpu", lambda params: False)
    stacked = make_engine(tiny, eos_ids=[7])
    found = [
        engine.generate(tiny.bank, contexts, selected, max_new_tokens=NEW, decoding=decoding)
        for engine in (apart, stacked)
    ]
    assert found[0] == found[1]
    assert isinstance(apart._prefill(tiny.bank, contexts, selected, [0], 1).context.key, tuple)
    assert not isinstance(stacked._prefill(tiny.bank, contexts, selected, [0], 1).context.key, tuple)


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED, SEARCHED])
def test_row_order_changes_nothing_when_rows_have_seeds(tiny, contexts, selected, decoding):
    engine = make_engine(tiny)
    seeds = list(range(len(contexts)))
    expected = engine.generate(tiny.bank, contexts, selected, max_new_tokens=NEW, decoding=decoding, seed=seeds)
    order = [4, 0, 8, 1, 6, 5, 2, 7, 3]
    mixed = engine.generate(
        tiny.bank,
        [contexts[row] for row in order],
        [selected[row] for row in order],
        max_new_tokens=NEW,
        decoding=decoding,
        seed=[seeds[row] for row in order],
    )
    assert mixed == [expected[row] for row in order]
    for row in (3, 7):
        options = {"max_new_tokens": NEW, "decoding": decoding, "seed": seeds[row]}
        assert engine.generate(tiny.bank, [contexts[row]], [selected[row]], **options) == [expected[row]]


def test_equal_rows_draw_differently_and_seeds_matter(tiny, contexts):
    engine = make_engine(tiny)

    def draw(seed: int) -> list[list[int]]:
        return engine.generate(tiny.bank, [contexts[0]] * 6, [0] * 6, max_new_tokens=NEW, decoding=SAMPLED, seed=seed)

    assert len({tuple(row) for row in draw(0)}) == 6
    assert draw(0) == draw(0) != draw(1)


def distribution(tiny, context: list[int], depth: int, decoding: Decoding) -> dict[tuple[int, ...], float]:
    """Of `depth` tokens behind prompt 0, top-k alone, by a full forward of each beginning."""
    found = {(): 1.0}
    for _ in range(depth):
        longer = {}
        for begun, share in found.items():
            logits = tiny.logits_after(tiny.bank[0], [*context, *begun]).astype(np.float64) / decoding.temperature
            best = np.argsort(logits)[-decoding.top_k :]
            weights = np.exp(logits[best] - logits[best].max())
            longer |= {(*begun, int(t)): share * w for t, w in zip(best, weights / weights.sum(), strict=True)}
        found = longer
    return found


def p_value(drawn: list[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    assert set(drawn) <= set(expected), "outside the support"
    counts = Counter(drawn)
    shares = np.array([*expected.values()])
    return float(stats.chisquare([counts[key] for key in expected], shares / shares.sum() * len(drawn)).pvalue)


def test_whole_replies_of_many_rows_follow_the_distribution_of_the_lm(tiny, contexts):
    decoding, rows = Decoding(8.0, top_k=3), 3000
    engine = make_engine(tiny, max_batch=300)
    drawn = engine.generate(tiny.bank, [contexts[0]] * rows, [0] * rows, max_new_tokens=3, decoding=decoding, seed=11)
    expected = distribution(tiny, contexts[0], 3, decoding)
    assert min(expected.values()) * rows > 5, "too rare for the test"
    assert p_value([tuple(row) for row in drawn], expected) > 1e-3


def test_samples_of_a_row_are_independent_of_one_another(tiny, contexts):
    decoding, rows = Decoding(8.0, top_k=3, samples=2), 2000
    engine = make_engine(tiny, max_batch=200)
    found = engine.continuations(
        tiny.bank, [contexts[0]] * rows, [0] * rows, max_new_tokens=1, decoding=decoding, seed=12
    )
    one = distribution(tiny, contexts[0], 1, decoding)
    pairs = {(*first, *second): one[first] * one[second] for first in one for second in one}
    assert p_value([tuple(continued.tokens[0] for continued in row) for row in found], pairs) > 1e-3


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED, SEARCHED])
def test_stream_equals_generate(tiny, contexts, selected, decoding):
    free_running = make_engine(tiny).generate(
        tiny.bank, contexts, selected, max_new_tokens=NEW, decoding=decoding, seed=2
    )
    engine = make_engine(tiny, eos_ids=[free_running[3][4]])
    for context, prompt in zip(contexts, selected, strict=True):
        whole = engine.generate(tiny.bank, [context], [prompt], max_new_tokens=NEW, decoding=decoding, seed=2)[0]
        assert list(engine.stream(tiny.bank, context, prompt, max_new_tokens=NEW, decoding=decoding, seed=2)) == whole


def test_a_row_ends_before_its_first_end_of_sequence_and_others_go_on(tiny, contexts, selected):
    free_running = make_engine(tiny).generate(tiny.bank, contexts, selected, max_new_tokens=NEW)
    eos_ids = [free_running[2][3], free_running[5][6]]
    rows = make_engine(tiny, eos_ids=eos_ids).generate(tiny.bank, contexts, selected, max_new_tokens=NEW)
    for free, row in zip(free_running, rows, strict=True):
        ends = [place for place, token in enumerate(free) if token in eos_ids]
        assert row == free[: ends[0] if ends else NEW]
    assert len({len(row) for row in rows}) > 1


def test_a_row_whose_first_token_ends_it_is_empty(tiny, contexts, selected):
    first = make_engine(tiny).generate(tiny.bank, contexts, selected, max_new_tokens=1)
    engine = make_engine(tiny, eos_ids=[first[4][0]])
    assert engine.generate(tiny.bank, contexts, selected, max_new_tokens=NEW)[4] == []
    assert list(engine.stream(tiny.bank, contexts[4], selected[4], max_new_tokens=NEW)) == []


def run_loop(tiny, lengths: list[int], eos_ids: list[int], max_new_tokens: int):
    size = len(lengths)
    tokens = np.arange(size * 5, dtype=np.int32).reshape(size, 5)
    prefixes = jnp.repeat(read_prompts(tiny.config, tiny.params, tiny.bank)[:1], size, axis=0)
    keys = jax.random.split(jax.random.key(0), size)[:, None]
    eos, real = np.asarray(eos_ids, np.int32), np.asarray(lengths) > 0
    rule = GREEDY.rule(eos_ids)
    context, logits = prefill(tiny.config, tiny.params, prefixes, tokens, np.asarray(lengths, np.int32))
    state = begin(tiny.config, logits, real, keys, eos, rule=rule, room=max_new_tokens)
    state = decode_loop(tiny.config, tiny.params, context, state, eos, jnp.int32(max_new_tokens), rule=rule)
    return state.tokens[:, 0], state.counts[:, 0], state


def test_the_loop_stops_when_every_row_has_ended(tiny):
    tokens, counts, state = run_loop(tiny, [5, 3], [], NEW)
    assert counts.tolist() == [NEW, NEW] and int(state.step) == NEW
    ends = [int(tokens[0, 2]), int(tokens[1, 4])]
    *_, counts, state = run_loop(tiny, [5, 3], ends, NEW)
    assert int(state.step) == int(counts.max()) + 1 < NEW


def test_padding_rows_of_a_batch_never_keep_the_loop_running(tiny):
    tokens, _, _ = run_loop(tiny, [5, 0], [], NEW)
    _, counts, state = run_loop(tiny, [5, 0], [int(tokens[0, 1])], NEW)
    assert counts[1] == 0
    assert int(state.step) == int(counts[0]) + 1 <= 2


def recorded(monkeypatch, module, name: str) -> list[tuple[int, ...]]:
    """The sizes of the first two arguments behind the LM, of every call of a function."""
    shapes, function = [], getattr(module, name)

    def recording(config, params, *arguments, **options):
        shapes.append(tuple(size for argument in arguments[:2] for size in np.shape(argument)))
        return function(config, params, *arguments, **options)

    monkeypatch.setattr(module, name, recording)
    return shapes


def test_a_call_compiles_once_a_width(tiny, monkeypatch):
    shapes = recorded(monkeypatch, engine_module, "prefill_on_one_cpu")
    engine = make_engine(tiny, max_batch=8, length_multiple=16)
    engine.generate(tiny.bank, [[1] * (1 + row % 40) for row in range(50)], [0] * 50, max_new_tokens=2)
    assert len(shapes) == 7
    assert set(shapes) == {(8, 2, 2, 4, 2, 4, 8, width) for width in (16, 32, 48)}


@pytest.mark.parametrize("placed", [False, True], ids=["where they fall", "on a mesh"])
def test_a_program_serves_every_part_of_a_reply_and_every_stream(tiny, contexts, placed):
    """With weights that nobody placed, and on a mesh of one device, where loaded ones lie."""
    if placed:
        mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        tiny = dataclasses.replace(tiny, params=jax.device_put(tiny.params, replicated(mesh)))
    engine = make_engine(tiny, max_batch=1)
    jax.clear_caches()
    engine.generate(tiny.bank, contexts[:1], [0], max_new_tokens=20)
    assert decode_loop._cache_size() == 1
    engine.generate(tiny.bank, contexts[:1], [0], max_new_tokens=20, ended=lambda ids: False)
    list(engine.stream(tiny.bank, contexts[0], 0, max_new_tokens=20))
    assert decode_loop._cache_size() == 1


def test_soft_prompts_are_read_once_and_again_when_the_bank_is_another(tiny, contexts, selected, monkeypatch):
    shapes = recorded(monkeypatch, engine_module, "read_prompts")
    engine = make_engine(tiny)
    for _ in range(3):
        engine.generate(tiny.bank, contexts, selected, max_new_tokens=2)
    list(engine.stream(tiny.bank, contexts[0], 1, max_new_tokens=2))
    assert shapes == [tiny.bank.shape]
    other = tiny.bank[::-1]
    rows = engine.generate(other, contexts, [2 - prompt for prompt in selected], max_new_tokens=NEW)
    assert len(shapes) == 2
    assert rows == make_engine(tiny).generate(tiny.bank, contexts, selected, max_new_tokens=NEW)


def test_a_bank_with_a_prompt_for_every_row_is_read_batch_by_batch(tiny, contexts, selected, monkeypatch):
    expected = make_engine(tiny).generate(tiny.bank, contexts, selected, max_new_tokens=NEW)
    shapes = recorded(monkeypatch, engine_module, "read_prompts")
    bank = jnp.concatenate([jnp.zeros((80, 4, 16)), tiny.bank[np.asarray(selected)]])
    assert make_engine(tiny).generate(bank, contexts, range(80, 89), max_new_tokens=NEW) == expected
    assert shapes == [(4, 4, 16)] * 3


def test_an_array_that_its_owner_may_change_is_not_kept(tiny, contexts):
    bank = np.array(tiny.bank)
    engine = make_engine(tiny)
    engine.generate(bank, contexts, [0] * 9, max_new_tokens=NEW)
    bank[0] = bank[1]
    expected = make_engine(tiny).generate(tiny.bank, contexts, [1] * 9, max_new_tokens=NEW)
    assert engine.generate(bank, contexts, [0] * 9, max_new_tokens=NEW) == expected


def test_the_prefixes_of_soft_prompts_give_what_the_prompts_give(tiny, contexts, selected):
    prefixes = read_prompts(tiny.config, tiny.params, tiny.bank)
    assert prefixes.shape == (3, 2, 2, 4, 2, 4)
    expected = make_engine(tiny).generate(tiny.bank, contexts, selected, max_new_tokens=NEW)
    assert make_engine(tiny).generate(prefixes, contexts, selected, max_new_tokens=NEW) == expected


def test_several_samples_of_a_row_are_its_first_and_others_from_one_reading(tiny, contexts, selected, monkeypatch):
    engine = make_engine(tiny)
    several = dataclasses.replace(SAMPLED, samples=5)
    arguments = {"max_new_tokens": NEW, "seed": 4}
    one = engine.generate(tiny.bank, contexts, selected, decoding=SAMPLED, **arguments)
    shapes = recorded(monkeypatch, engine_module, "prefill_on_one_cpu")
    rows = engine.continuations(tiny.bank, contexts, selected, decoding=several, **arguments)
    assert len(shapes) == 3
    assert (
        [row[0].tokens for row in rows]
        == one
        == engine.generate(tiny.bank, contexts, selected, decoding=several, **arguments)
    )
    assert all(len({tuple(sample.tokens) for sample in row}) == 5 for row in rows)
    fewer = engine.continuations(
        tiny.bank, contexts, selected, decoding=dataclasses.replace(SAMPLED, samples=3), **arguments
    )
    assert [row[:3] for row in rows] == fewer


def test_rows_stop_at_the_first_of_their_beginnings_that_has_ended(tiny, contexts, selected):
    """As if all had been generated and cut afterwards, whatever the batch; and the loop stops with the last row."""
    free = make_engine(tiny).generate(tiny.bank, contexts, selected, max_new_tokens=30)

    def ended(ids) -> bool:
        return sum(ids) > 250

    cut = [next((row[:n] for n in range(31) if ended(row[:n])), row) for row in free]
    assert len({len(row) for row in cut}) > 2
    assert max(map(len, cut)) < 20
    for decoding in (GREEDY, dataclasses.replace(SAMPLED, samples=2), SEARCHED):
        arguments = {"max_new_tokens": 30, "decoding": decoding}
        whole = make_engine(tiny).continuations(tiny.bank, contexts, selected, **arguments)
        expected = [
            [next((s.tokens[:n] for n in range(31) if ended(s.tokens[:n])), s.tokens) for s in r] for r in whole
        ]
        for size in (1, 4, 16):
            rows = make_engine(tiny, max_batch=size).continuations(
                tiny.bank, contexts, selected, ended=ended, **arguments
            )
            assert [[sample.tokens for sample in row] for row in rows] == expected


def test_nothing_is_decoded_long_after_the_last_row_has_ended(tiny, contexts, monkeypatch):
    asked: list[int] = []

    def ended(ids) -> bool:
        asked.append(len(ids))
        return len(ids) >= 3

    rows = make_engine(tiny).generate(tiny.bank, contexts[:4], [0] * 4, max_new_tokens=60, ended=ended)
    assert [len(row) for row in rows] == [3] * 4
    assert max(asked) <= 9


def test_batches_are_reported_until_all_rows_are_done(tiny, contexts, selected):
    heard: list[tuple[int, int]] = []
    make_engine(tiny).generate(
        tiny.bank, contexts, selected, max_new_tokens=1, on_batch=lambda done, total: heard.append((done, total))
    )
    assert heard == [(4, 9), (8, 9), (9, 9)]


def test_no_contexts_give_no_rows(tiny):
    assert make_engine(tiny).generate(tiny.bank, [], []) == []


def test_a_bfloat16_lm_with_a_float32_bank_generates(tiny, contexts, selected):
    config = dataclasses.replace(tiny.config, dtype="bfloat16")
    engine = GenerationEngine(config, random_params(config, jax.random.key(0)), eos_ids=[], pad_id=0)
    rows = engine.generate(tiny.bank, contexts, selected, max_new_tokens=3)
    assert [len(row) for row in rows] == [3] * 9


def test_parameters_spread_over_eight_devices_give_the_same_rows(tiny, contexts, selected):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def spread(leaf: jax.Array) -> jax.Array:
        axes = [None] * leaf.ndim
        if leaf.shape[-1] % 8 == 0:
            axes[-1] = "fsdp"
        return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*axes)))

    bank = jax.device_put(tiny.bank, jax.NamedSharding(mesh, jax.P()))
    engine = GenerationEngine(
        tiny.config, jax.tree.map(spread, tiny.params), eos_ids=[], pad_id=0, max_batch=4, length_multiple=40
    )
    expected = make_engine(tiny).generate(tiny.bank, contexts, selected, max_new_tokens=NEW)
    assert engine.generate(bank, contexts, selected, max_new_tokens=NEW) == expected
    assert list(engine.stream(bank, contexts[1], selected[1], max_new_tokens=NEW)) == expected[1]
    searched = make_engine(tiny).generate(tiny.bank, contexts, selected, max_new_tokens=NEW, decoding=SEARCHED)
    assert engine.generate(bank, contexts, selected, max_new_tokens=NEW, decoding=SEARCHED) == searched


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bank": np.zeros((3, 4, 7))}, r"\(3, 4, 7\).*M = 16"),
        ({"selected": [3]}, "row 0 selects prompt 3; this bank has prompts 0 to 2"),
        ({"selected": [-1]}, "row 0 selects prompt -1"),
        ({"selected": [0, 1]}, "1 contexts came with 2 selected"),
        ({"contexts": [[]]}, "context of row 0 is empty"),
        ({"contexts": [[61]]}, "outside the LM's vocabulary of 61"),
        ({"contexts": [[1] * 90]}, "row 0 needs 96 positions|row 0 needs 99 positions"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"decoding": Decoding(min_new_tokens=6)}, r"min_new_tokens is 6; allowed: up to max_new_tokens \(5\)"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": [1, 2]}, "1 contexts came with 2 seeds"),
    ],
)
def test_arguments_that_do_not_fit_are_named(tiny, change, sentence):
    arguments = {"bank": tiny.bank, "contexts": [[1, 2]], "selected": [0], "max_new_tokens": 5} | change
    with pytest.raises(UserError, match=sentence):
        make_engine(tiny).generate(**arguments)


def test_engine_sizes_below_one_are_refused(tiny):
    with pytest.raises(UserError, match="max_batch is 0"):
        make_engine(tiny, max_batch=0)
    with pytest.raises(UserError, match="length_multiple is 0"):
        make_engine(tiny, length_multiple=0)


def test_padding_of_the_vocabulary_is_never_generated(tiny, contexts) -> None:
    free = make_engine(tiny).generate(tiny.bank, contexts, [0] * len(contexts), max_new_tokens=8)
    limit = max(max(row) for row in free)  # forbids the highest token that the LM would have said
    engine = GenerationEngine(
        tiny.config, tiny.params, eos_ids=[], pad_id=0, vocab_size=limit, max_batch=4, length_multiple=40
    )
    rows = engine.generate(tiny.bank, contexts, [0] * len(contexts), max_new_tokens=8)
    assert max(max(row) for row in rows) < limit
    for before, after in zip(free, rows, strict=True):
        same = next((i for i, token in enumerate(before) if token >= limit), len(before))
        assert after[:same] == before[:same]
    assert list(engine.stream(tiny.bank, contexts[2], 0, max_new_tokens=8)) == rows[2]


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED, SEARCHED], ids=["greedy", "sampled", "searched"])
@pytest.mark.parametrize("axes", [(4, 1, 1), (2, 2, 1), (2, 1, 2)])
def test_rows_spread_over_devices_become_what_they_become_on_one(tiny, contexts, selected, decoding, axes):
    mesh = make_mesh(*axes, devices=jax.devices()[: axes[0] * axes[1] * axes[2]])
    params, bank = jax.device_put((tiny.params, tiny.bank), replicated(mesh))
    spread = GenerationEngine(
        tiny.config, params, eos_ids=[7], pad_id=0, max_batch=4, length_multiple=40, row_sharding=row_sharding(mesh)
    )
    options = {"max_new_tokens": NEW, "decoding": decoding, "seed": 5}
    wanted = make_engine(tiny, eos_ids=[7]).generate(tiny.bank, contexts, selected, **options)
    assert spread.generate(bank, contexts, selected, **options) == wanted
    batch = spread._prefill(bank, contexts, selected, range(4), 4)
    held = {shard.data.shape[1] for shard in batch.context.key.addressable_shards}
    assert held == {4 // (axes[0] * axes[1])}, "every device holds the contexts of its rows alone"


@pytest.mark.parametrize("axes", [(4, 1, 1), (2, 2, 1), (2, 1, 2), (8, 1, 1)])
def test_a_program_serves_every_part_of_a_reply_on_several_devices(tiny, contexts, selected, axes, request):
    """Also where the rows, 4 of them, cannot be spread."""
    mesh = make_mesh(*axes, devices=jax.devices()[: math.prod(axes)])
    params = jax.device_put(tiny.params, layout_of(tiny.config, mesh))
    engine = GenerationEngine(
        tiny.config, params, eos_ids=[7], pad_id=0, max_batch=4, length_multiple=40, row_sharding=row_sharding(mesh)
    )
    compiled = []

    def listen(event: str, _: float, fun_name: str = "", **__: object) -> None:
        if event.endswith("backend_compile_duration") and "decode_loop" in fun_name:
            compiled.append(fun_name)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    request.addfinalizer(lambda: jax.monitoring.unregister_event_duration_listener(listen))
    options = {"max_new_tokens": 20, "ended": lambda ids: False}
    rows = engine.generate(tiny.bank, contexts[:4], selected[:4], **options)
    assert len(compiled) == 1
    assert rows == make_engine(tiny, eos_ids=[7]).generate(tiny.bank, contexts[:4], selected[:4], **options)

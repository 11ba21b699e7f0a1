"""The benchmarks that count and time parts of a step: what they print adds up."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, ModuleType]]:
    """The programs, which find their parts beside themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        # One of them asks for eight devices when it is imported, which these tests have; the rest stays as it was.
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
        yield {name: importlib.import_module(name) for name in ("scaling", "step_parts", "step_means")}


@pytest.mark.first_python
def test_products_grow_as_the_prompts_do_and_a_device_has_its_share(programs, monkeypatch, capsys):
    scaling = programs["scaling"]
    monkeypatch.setattr(scaling, "CURVES", {"prompts": ((1, 2, 4), "1"), "devices": ((1, 2, 4), "-1")})
    full_size = scaling.decoder_of
    small = {"vocab_size": 300, "num_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    small |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    monkeypatch.setattr(scaling, "decoder_of", lambda point: dataclasses.replace(full_size(point), **small))
    scaling.main([])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for curve, slope in {"prompts": 1, "devices": -1}.items():
        assert found[curve]["slopes"]["products"] == pytest.approx(slope, abs=0.03)


def test_a_slope_is_that_of_the_upper_half(programs):
    values = [1, 2, 4, 8]
    assert programs["scaling"].slope(values, [7.0, 7.0, 4.0**1.5, 8.0**1.5]) == pytest.approx(1.5)


def test_longer_dialogues_are_the_same_dialogue_again_and_again(programs):
    batch = programs["scaling"].draw_batch(2, 300)
    twice = programs["scaling"].longer(batch, 2)
    length, slots = batch["tokens"].shape[1], batch["turn_mask"].shape[1]
    for field, shift in {"target_positions": length, "target_turns": slots, "context_lengths": length}.items():
        np.testing.assert_array_equal(twice[field], np.concatenate([batch[field], batch[field] + shift], axis=1))
    np.testing.assert_array_equal(twice["target_ids"], np.tile(batch["target_ids"], (1, 2)))
    assert twice["similar"].shape == (4 * slots, 4 * slots)


PROGRAM = """
HloModule jit_step

%added (p.0: f32[4], p.1: f32[4]) -> f32[4] {
  %p.0 = f32[4]{0} parameter(0)
  %p.1 = f32[4]{0} parameter(1)
  ROOT %sum = f32[4]{0} add(%p.0, %p.1), metadata={op_name="jit(step)/jvp(Decoder)/while/body/layers/add"}
}

%body (carry: (s32[], f32[4])) -> (s32[], f32[4]) {
  %carry = (s32[], f32[4]{0}) parameter(0)
  %number = s32[] get-tuple-element(%carry), index=0
  %values = f32[4]{0} get-tuple-element(%carry), index=1
  %fused = f32[4]{0} fusion(%values, %values), kind=kLoop, calls=%added
  %counted = s32[] copy(%number)
  ROOT %out = (s32[], f32[4]{0}) tuple(%counted, %fused)
}

%condition (carry.1: (s32[], f32[4])) -> pred[] {
  %carry.1 = (s32[], f32[4]{0}) parameter(0)
  ROOT %more = pred[] constant(false)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %zero = s32[] constant(0)
  %copied = f32[4]{0} copy(%x)
  %begun = (s32[], f32[4]{0}) tuple(%zero, %copied)
  %loop = (s32[], f32[4]{0}) while(%begun), condition=%condition, body=%body, metadata={op_name="jit(step)/vocabulary"}
  %left = f32[4]{0} get-tuple-element(%loop), index=1
  ROOT %updated = f32[4]{0} negate(%left), metadata={op_name="jit(step)/optimizer/neg" stack_frame_id=3}
}
"""


def test_an_instruction_of_the_compiler_belongs_to_what_it_calls_or_is_used_by_or_to_its_loop(programs):
    found = programs["step_parts"].scopes(PROGRAM)
    assert found["updated"] == found["left"] == "jit(step)/optimizer/neg"
    assert found["fused"] == found["values"] == found["sum"] == "jit(step)/jvp(Decoder)/while/body/layers/add"
    assert found["copied"] == found["begun"] == found["counted"] == found["more"] == "jit(step)/vocabulary"


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ("jit(step)/transpose(jvp(Decoder))/while/body/closed_call/layers/mlp_norm/mul", "blocks"),
        ("jit(step)/jvp(Decoder)/while/body/jit(dynamic_index_in_dim)/dynamic_slice", "blocks"),
        ("jit(step)/jvp(vocabulary)/while/body/closed_call/cond/branch_1_fun/jvp()/exp", "vocabulary"),
        ("jit(step)/jvp(Decoder)/final_norm/mul", "embedding, positions, last norm"),
        ("jit(step)/transpose(jvp(Retriever))/mul", "retriever"),
        ("", "bank, targets, weights"),
    ],
)
def test_a_scope_is_of_one_part(programs, scope, part):
    assert programs["step_parts"].part_of(scope) == part


def test_an_event_has_the_time_that_no_event_within_it_has(programs):
    events = [("inner", 2, 5), ("loop", 0, 10), ("inner", 6, 9), ("innermost", 3, 4), ("next", 10, 12)]
    found: dict[str, float] = {}
    for name, spent in programs["step_parts"].self_seconds((n, b * 10**9, e * 10**9) for n, b, e in events):
        found[name] = found.get(name, 0.0) + spent
    assert found == {"inner": 5.0, "innermost": 1.0, "loop": 4.0, "next": 2.0}


# jaxlib makes the types of its profile as they are needed, of which Python 3.13 warns; an error there is an abort.
@pytest.mark.filterwarnings(r"ignore:builtin type event_\w+ has no __module__ attribute:DeprecationWarning")
def test_the_parts_of_a_step_and_what_is_in_none_are_the_whole(programs, capsys):
    programs["step_parts"].main(["--shape=tiny", "--rows=1", "--rounds=1", "--top=3"])
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    parts = found["seconds"]
    assert list(parts) == [*programs["step_parts"].PARTS, "outside instructions"]
    assert min(spent for part, spent in parts.items() if part != "outside instructions") > 0
    assert sum(parts.values()) == pytest.approx(found["traced"])
    rest = found["traced"] - parts["blocks"] - parts["vocabulary"]
    assert found["rest_share"] == pytest.approx(rest / found["traced"])
    assert sum("jit(step)" in line for line in table) >= 2


def test_each_means_is_one_change_of_the_step_and_all_stand_beside_it(programs, capsys):
    program = programs["step_means"]
    program.main(["--shape=tiny", "--rows=1", "--rounds=1", "--means", "state not donated", "remat full", "bfloat16"])
    *_, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)["means"]
    assert list(found) == ["as it is", "state not donated", "remat full", "bfloat16"]
    assert all(figures["seconds"] > 0 for figures in found.values())
    memory = {name: figures["memory"] for name, figures in found.items()}
    assert memory["state not donated"] > memory["as it is"] > memory["remat full"]

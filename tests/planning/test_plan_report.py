"""Plans without a compiler: what fits, what is advised where it does not, the search; on GPUs that are absent."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from spt_jax.commands.main import main
from spt_jax.config import Config, default_config
from spt_jax.errors import UserError
from spt_jax.models.loading import open_lm
from spt_jax.planning.advice import advice
from spt_jax.planning.chips import CHIPS
from spt_jax.planning.convai2 import CONVAI2
from spt_jax.planning.estimated_traffic import EstimatedTraffic, estimated_traffic
from spt_jax.planning.memory import estimated_memory
from spt_jax.planning.plan import Plan, mesh_of, plan_training
from spt_jax.planning.programs import train_step
from spt_jax.planning.report import Request, report
from spt_jax.planning.roofline import Roofline
from spt_jax.planning.search import candidates, search
from spt_jax.planning.topology import Topology
from spt_jax.planning.workload import Workload
from spt_jax.training.remat import SHARE

pytestmark = pytest.mark.first_python

WORK = Workload()
CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"


def config_of(source: str, batch: int = 8, **options: Any) -> Config:
    config = default_config()
    config.model.source, config.model.dtype, config.data.batch = source, "bfloat16", batch
    for name, value in options.items():
        section, option = name.split("__")
        config[section][option] = value
    return config


def planned(config: Config, topology: str, slices: int = 1) -> Plan:
    return plan_training(config, decoder_of(config), Topology.parse(topology, slices), WORK)


def decoder_of(config: Config) -> Any:
    m = config.model
    return open_lm(m.source, dtype=m.dtype, quantization=m.quantization, weights=False).config


def test_the_fastest_policy_that_fits_is_planned():
    found = planned(config_of("shape:smollm2-135m"), "h100:1")
    assert found.fits and found.remat == "none" and found.attention == "cudnn"
    assert found.mean is not None and found.longest is not None
    assert found.mean.seconds < found.longest.seconds
    assert found.rows_per_second == pytest.approx(8 / found.mean.seconds)
    larger = planned(config_of("shape:llama2-7b", 64), "h100:8")
    assert larger.remat in ("dots", "full")


def test_the_attention_of_a_plan_is_that_of_the_chips_it_is_for():
    wide = config_of("shape:smollm2-135m", model__dtype="float32")
    assert planned(config_of("shape:smollm2-135m", model__attention="cudnn"), "a100:1").attention == "cudnn"
    assert planned(config_of("shape:smollm2-135m", model__attention="xla"), "h100:1").attention == "xla"
    assert planned(wide, "h100:1").attention == "xla"
    for attention, words in (("cudnn", "type is float32"), ("splash", "the device is h100; splash attention needs")):
        wide.model.attention = attention
        with pytest.raises(UserError, match=f"model.attention is {attention}, but .*{words}"):
            planned(wide, "h100:1")


def test_auto_leaves_free_what_training_leaves_free(monkeypatch):
    config = config_of("shape:smollm2-135m")
    needed = planned(config_of("shape:smollm2-135m", model__remat="none"), "h100:1").needed
    for filled, policy in ((0.99 * SHARE, "none"), (1.01 * SHARE, "dots")):
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", str(needed / filled / CHIPS["h100"].memory))
        found = planned(config, "h100:1")
        assert found.fits and found.remat == policy


def test_more_of_everything_takes_more_and_shards_take_less():
    base = planned(config_of("shape:llama2-7b", 8, model__remat="full", mesh__fsdp=1), "h100:1").memory
    prompts = planned(config_of("shape:llama2-7b", 8, model__remat="full", bank__num_prompts=8), "h100:1").memory
    kept = planned(config_of("shape:llama2-7b", 8, model__remat="dots"), "h100:1").memory
    eight_bits = planned(config_of("shape:llama2-7b", 8, model__remat="full", model__quantization="int8"), "h100:1")
    sharded = planned(config_of("shape:llama2-7b", 8, model__remat="full", mesh__fsdp=8), "h100:8").memory
    parts = planned(config_of("shape:llama2-7b", 8, model__remat="full", optimizer__micro_batches=4), "h100:1").memory
    assert base is not None and prompts is not None and kept is not None and sharded is not None
    assert eight_bits.memory is not None and parts is not None
    # 6.74 G parameters of 2 bytes; one byte for all but embeddings and head.
    assert base.frozen == pytest.approx(2 * 6.738e9, rel=1e-3)
    assert eight_bits.memory.frozen == pytest.approx(6.738e9 + 2 * 32_000 * 4096, rel=2e-3)
    assert sharded.frozen == pytest.approx(base.frozen / 8, rel=1e-3)
    assert sharded.kept == base.kept / 8 and parts.kept == base.kept / 4
    assert 1.99 * base.kept < prompts.kept < 2.01 * base.kept
    assert base.kept < kept.kept


def test_weights_that_are_learned_are_read_and_gathered_as_frozen_ones_are():
    def moved(kind: str) -> EstimatedTraffic:
        config = config_of("shape:smollm2-135m", 8, model__dtype="float32", method__kind=kind, mesh__fsdp=4)
        mesh = mesh_of(config, Topology.parse("h100:4"))
        step = train_step(config, decoder_of(config), mesh, WORK.longest_shape, "full")
        return estimated_traffic(step, dataclasses.replace(estimated_memory(step), kept=0.0, layer=0.0))

    learned, frozen = moved("full"), moved("prompt_tuning")
    assert learned.hbm == frozen.hbm > 0
    assert learned.sent > frozen.sent


@pytest.mark.parametrize(("quantization", "packed"), [("int8", 2), ("int4", 3.2)])
def test_quantised_kernels_are_read_packed_and_gathered_in_the_type_of_the_arithmetic(quantization, packed):
    def moved(fsdp: int, **options: str) -> EstimatedTraffic:
        config = config_of("shape:llama2-7b", 8, model__dtype="bfloat16", mesh__fsdp=fsdp, **options)
        mesh = mesh_of(config, Topology.parse(f"h100:{fsdp}"))
        step = train_step(config, decoder_of(config), mesh, WORK.longest_shape, "full")
        return estimated_traffic(step, dataclasses.replace(estimated_memory(step), kept=0.0, layer=0.0))

    assert moved(4, model__quantization=quantization) == moved(4)
    assert moved(1, model__quantization=quantization).hbm == pytest.approx(moved(1).hbm / packed, rel=0.01)


def test_advice_names_changes_that_fit_when_they_are_made():
    config = config_of("shape:llama2-70b", 8, model__remat="full", mesh__data=1, mesh__fsdp=2)
    plan = planned(config, "h100:2")
    assert not plan.fits
    found = advice(config, decoder_of(config), plan, WORK)
    assert [each.needed for each in found] == sorted(each.needed for each in found)
    assert all(each.needed < plan.needed for each in found)
    int4 = next(each for each in found if each.change == "--config.model.quantization=int4")
    changed = planned(
        config_of("shape:llama2-70b", 8, model__remat="full", mesh__fsdp=2, model__quantization="int4"), "h100:2"
    )
    assert int4.fits and changed.fits
    assert int4.needed == pytest.approx(changed.needed, rel=1e-6)
    larger = next(each for each in found if each.change.startswith("--topology=h100:4"))
    assert larger.change == "--topology=h100:4 --config.mesh.data=1 --config.mesh.fsdp=4"


def test_machines_are_advised_to_be_larger_ones_that_share_rows_alone():
    config = config_of("shape:llama2-70b", 8, model__remat="full", mesh__data=2, mesh__fsdp=2)
    found = advice(config, decoder_of(config), planned(config, "h100:2", slices=2), WORK)
    larger = next(each for each in found if each.change.startswith("--topology=h100:4"))
    assert larger.change == "--topology=h100:4 --config.mesh.data=2 --config.mesh.fsdp=4"


def test_advice_moves_what_the_compiler_found_by_the_difference_of_the_estimates():
    config = config_of("shape:smollm2-135m", 8, model__remat="full")
    plan = planned(config, "h100:1")
    compiled = dataclasses.replace(plan, needed=2 * plan.needed)
    of = [{each.change: each.needed for each in advice(config, decoder_of(config), p, WORK)} for p in (plan, compiled)]
    assert "--config.data.batch=4" in of[0] and of[0].keys() == of[1].keys()
    assert all(of[1][change] == pytest.approx(of[0][change] + plan.needed) for change in of[0])


def test_the_search_tries_every_mesh_and_stops_where_the_estimates_are_right():
    config = config_of("shape:llama2-13b", 8)
    topology, decoder = Topology.parse("h100:8"), decoder_of(config)
    found = candidates(config, decoder, topology, WORK, (8, 16))
    meshes = {(c.config.mesh.data, c.config.mesh.fsdp, c.config.mesh.tensor) for c in found}
    assert meshes == {(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if 8 % (d * f) == 0}
    assert {c.config.data.batch for c in found} == {8, 16}
    assert {c.config.model.remat for c in found} == {"none", "dots", "full"}
    rates = [c.rows_per_second for c in found]
    assert rates == sorted(rates, reverse=True)
    plans = search(config, decoder, topology, WORK, (8, 16), tries=50)
    assert plans[-1].fits and not any(plan.fits for plan in plans[:-1])
    assert config.mesh.fsdp == 1 and config.data.batch == 8, "the caller's configuration stays"


@pytest.mark.parametrize(
    ("slower", "tried"),
    [
        ([1.0], 1),  # the estimate was right
        ([1.01], 1),  # or nearly
        ([10.0, 1.0], 2),  # the first is slower than the second's estimate, which is right
        ([10.0, 10.0, 10.0, 10.0], 4),  # all are slower than the next one's: as many as may be
    ],
)
def test_a_search_goes_on_while_the_next_estimate_promises_more_than_what_was_compiled(slower, tried, monkeypatch):
    config = config_of("shape:llama2-13b", 8)
    factors = iter(slower)

    def slowed(times: Roofline, factor: float) -> Roofline:
        return Roofline(*(factor * seconds for seconds in dataclasses.astuple(times)))

    def compiled(*arguments: Any) -> Plan:
        plan, factor = plan_training(*arguments), next(factors)
        assert plan.mean is not None and plan.longest is not None
        longest, mean = slowed(plan.longest, factor), slowed(plan.mean, factor)
        return dataclasses.replace(plan, needed=1.0, longest=longest, mean=mean)

    monkeypatch.setattr("spt_jax.planning.search.plan_training", compiled)
    facts, lines, shortfall = report(Request(config, CONVAI2, "h100:8", search=True, rows=("8", "16"), tries=4))
    assert shortfall == "" and len(facts["tried"]) == tried - 1
    fastest = min(facts["tried"], key=lambda other: other["mean"]["seconds"] / other["rows"], default=facts)
    assert facts["mean"]["seconds"] / facts["rows"] <= fastest["mean"]["seconds"] / fastest["rows"]
    assert len(lines[: lines.index("")]) == tried + 1 if tried > 1 else "" not in lines


def test_a_search_for_gpus_takes_the_first_choice_that_fits_by_the_estimate():
    # The fastest choice needs 1.14 of the memory by the estimate.
    config = runpy.run_path(str(CONFIGS / "convai2_llama2_7b.py"))["get_config"]()
    config.model.source = "shape:llama2-7b"
    _, _, shortfall = report(Request(config, CONVAI2, "h100:1", search=True, tries=1))
    assert shortfall == ""


def test_a_search_in_which_nothing_fits_says_what_would_need_less():
    request = Request(config_of("shape:llama2-70b"), CONVAI2, "h100:1", search=True)
    facts, lines, shortfall = report(request)
    assert "GiB more than" in shortfall
    assert "What would need less, by the estimate:" in lines
    changes = [advised["change"] for advised in facts["advice"]]
    assert "--config.model.quantization=int4" in changes
    assert any(change.startswith("--topology=h100:2") for change in changes)


def test_many_rows_are_planned_without_being_made():
    # Which turns are similar would be 784 GiB.
    _, _, shortfall = report(Request(config_of("shape:smollm2-135m", 65_536), CONVAI2, "h100:8"))
    assert "more than the 55.88 GiB of h100" in shortfall


def test_a_search_that_nothing_goes_with_says_so():
    config = config_of("shape:llama2-7b", 8, optimizer__micro_batches=3)
    with pytest.raises(UserError, match="no mesh of h100:8 shares 8 rows in 3 micro-batches"):
        candidates(config, decoder_of(config), Topology.parse("h100:8"), WORK, (8,))


def test_the_official_mode_is_planned_with_a_turn_a_row():
    config = config_of("shape:smollm2-135m", 16, data__layout="turn", retriever__context="official")
    facts, _, shortfall = report(Request(config, CONVAI2, "h100:1"))
    assert shortfall == "" and facts["steps"] == -(-131_438 // 16)


def test_epoch_and_facts_are_those_of_the_request():
    config = config_of("shape:smollm2-135m", 16)
    facts, lines, shortfall = report(Request(config, {**CONVAI2, "dialogues": 161, "turns": 1184}, "h100:1"))
    assert shortfall == "" and facts["fits"] and facts["steps"] == 11
    json.dumps(facts)
    assert any("11 steps" in line for line in lines)
    assert lines[0] == (
        "shape:smollm2-135m on h100:1 (1 devices: data 1 × fsdp 1 × tensor 1), 16 rows behind 4 prompts, remat none, "
        "cudnn attention"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"what": "generate"}, "allowed: --what=train"),
        (
            {
                "what": "generate",
                "topology": "v5e:1x1",
                "config": config_of("shape:smollm2-135m", generation__beams=10),
            },
            "generation.beams is 10; allowed: --config.generation.beams=1",
        ),
        ({"rows": ["8", "x"], "search": True}, "--rows is '8,x'; allowed: whole numbers"),
        ({"workload": {**CONVAI2, "turns": 3}}, "--turns is 3; allowed: --dialogues"),
        ({"workload": {**CONVAI2, "turns": 10**12}}, "--turns is 1000000000000; allowed: up to 4827060, for a turn"),
        ({"workload": {**CONVAI2, "mean_targets": 10**9}}, "--mean_targets is 1000000000; allowed: up to 512"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, words):
    request = dataclasses.replace(Request(config_of("shape:smollm2-135m"), CONVAI2, "h100:1"), **options)
    with pytest.raises(UserError, match=words):
        report(request)


def test_the_door_prints_a_plan_and_refuses_what_does_not_fit(capsys, monkeypatch):
    monkeypatch.setattr("spt_jax.commands.plan._prepare_jax", lambda *_: None)
    arguments = ["plan", "--config.model.source=shape:llama2-70b", "--config.model.dtype=bfloat16"]
    assert main([*arguments, "--topology=h100:8", "--config.mesh.fsdp=8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    assert main([*arguments, "--topology=h100:1", "--config.model.remat=full"]) == 2
    said = capsys.readouterr()
    assert "GiB too much" in said.out and "What would need less, by the estimate:" in said.out
    assert said.err.startswith("spt-jax plan: the train step needs ") and said.err.count("\n") == 1
    assert " GiB more than the 55.88 GiB of h100" in said.err


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--slices=1", "--topology is missing; give CHIP:SIZES"),
        ("--topology=h101:8", "there is no chip 'h101'"),
        ("--what=trian", "--what is 'trian'; allowed: train, generate. Did you mean 'train'?"),
        ("--dialogues=0", "--dialogues is '0'; allowed: a whole number, 1 or more"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(flag, words, capsys, monkeypatch):
    monkeypatch.setattr("spt_jax.commands.plan._prepare_jax", lambda *_: None)
    assert main(["plan", "--config.model.source=shape:smollm2-135m", flag]) == 2
    assert words in capsys.readouterr().err

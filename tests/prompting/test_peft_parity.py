"""LoRA, prefix, prompt and P-tuning against PEFT on random small models: logits, gradients, and one step of AdamW.

Our side is the trainer's own: what the configuration describes, its conditions, its optimizer and its train step.

What differs, and how the comparison is made nevertheless:

- GPT-2 and its like fuse query, key and value into one matrix. PEFT's update of it has one `down` for the three; ours
  has one for each. These targets are skipped there; the output projection and the MLP are compared.
- PEFT's prefix tuning gives the model no position ids. transformers counts them from the length of the cache, so that
  the text starts at P, where ours starts. For grouped queries PEFT makes the prefix G heads wide, as ours is.
- PEFT ignores position ids for soft prompts, and counts them from the attention mask or from the row's start: with
  padding on the right both are ours.
- A first AdamW step of the usual ε = 1e-8 is the gradient's sign, and so the sign of a rounding error where a gradient
  is as small as ε. A larger ε shows the gradient's size; both are run.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models.parity import TOLERANCE, VOCABULARY, random_model, save

from spt_jax.config import Config, default_config, set_option, validate
from spt_jax.models.decoder import decode, embed, vocabulary_logits
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.loading import LanguageModel, load_lm
from spt_jax.parallel.mesh import make_mesh
from spt_jax.prompting.lora import lora_targets
from spt_jax.prompting.prefixes import prefix_cache
from spt_jax.prompting.selective_lm import SelectiveLM, join
from spt_jax.training.description import describe, objective_of
from spt_jax.training.optimizer import make_optimizer
from spt_jax.training.step import init_state, make_train_step

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft", reason="peft is not installed; the extra test-torch holds it")
pytestmark = pytest.mark.torch

P, RANK, ALPHA, WIDTH = 4, 3, 6.0, 24
LENGTHS, T = (15, 9, 12), 15
DECAY = 0.1
SMALL, LARGE = (1e-8, 1e-2), (3e-2, 0.5)
"""ε and learning rate; the second moves parameters by as much as they measure, and shows the gradient's size."""

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT": ("OPTForCausalLM", {"ffn_dim": 112}),
    "Llama": ("LlamaForCausalLM", {"intermediate_size": 112, "num_key_value_heads": 2}),
    "GPT-2": ("GPT2LMHeadModel", {}),
}
MODULES = {
    "OPT": {"o_proj": "out_proj", "up_proj": "fc1", "down_proj": "fc2"},
    "Llama": {},
    "GPT-2": {"o_proj": "attn.c_proj", "up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"},
}
"""How PEFT knows our projections, where it has another name."""

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")

Tree = Any


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train, on both sides.

    Attributes:
        settings: PEFT's configuration.
        options: Ours.
        read: Reads our tree out of a mapping from PEFT's names of parameters to their values (or to their gradients).
    """

    settings: Any
    options: dict[str, Any]
    read: Callable[[dict[str, np.ndarray]], Tree]


def lora(config: DecoderConfig, family: str, targets: tuple[str, ...]) -> Method:
    shapes, names = lora_targets(config), MODULES[family]
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[names.get(name, name) for name in targets],
        fan_in_fan_out=family == "GPT-2",
    )

    def read(values: dict[str, np.ndarray]) -> Tree:
        def stacked(name: str, which: str, shape: tuple[int, ...]) -> jax.Array:
            ends = f".{names.get(name, name)}.lora_{which}.default.weight"
            layers = [value.T.reshape(shape) for key, value in values.items() if key.endswith(ends)]
            assert len(layers) == config.num_layers
            return jnp.stack(layers)

        return {
            "lora": {
                name: {
                    "down": stacked(name, "A", (*shapes[name].inputs, RANK)),
                    "up": stacked(name, "B", (RANK, *shapes[name].outputs)),
                }
                for name in targets
            }
        }

    ours = {"method.kind": "lora", "lora.rank": RANK, "lora.alpha": ALPHA, "lora.targets": targets}
    return Method(settings, ours, read)


def prompt_tuning(config: DecoderConfig) -> Method:
    return Method(
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
        {"method.kind": "prompt_tuning"},
        lambda values: {"bank": {"prompts": values["prompt_encoder.default.embedding.weight"][None]}},
    )


def linear(values: dict[str, np.ndarray], name: str) -> Tree:
    return {"kernel": values[f"{name}.weight"].T, "bias": values[f"{name}.bias"]}


def p_tuning(config: DecoderConfig) -> Method:
    def read(values: dict[str, np.ndarray]) -> Tree:
        layers = {f"lin_{i}": linear(values, f"prompt_encoder.default.mlp_head.{2 * i}") for i in range(3)}
        return {"prompt_encoder": {"embedding": values["prompt_encoder.default.embedding.weight"], **layers}}

    settings = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, encoder_hidden_size=WIDTH)
    return Method(settings, {"method.kind": "p_tuning", "method.hidden_size": WIDTH}, read)


def prefix_tuning(config: DecoderConfig) -> Method:
    def read(values: dict[str, np.ndarray]) -> Tree:
        flat = values["prompt_encoder.default.embedding.weight"]
        split = flat.reshape(P, config.num_layers, 2, config.num_key_value_heads, config.head_dim)
        return {"bank": {"prefixes": jnp.asarray(split.transpose(1, 2, 0, 3, 4))[None]}}

    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    return Method(settings, {"method.kind": "prefix_tuning"}, read)


def prefix_encoder(config: DecoderConfig) -> Method:
    def read(values: dict[str, np.ndarray]) -> Tree:
        layers = {
            f"lin_{ours}": linear(values, f"prompt_encoder.default.transform.{i}")
            for ours, i in (("in", 0), ("out", 2))
        }
        return {"prefix_encoder": {"embedding": values["prompt_encoder.default.embedding.weight"][None], **layers}}

    settings = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=WIDTH
    )
    return Method(settings, {"method.kind": "prefix_tuning", "method.hidden_size": WIDTH}, read)


METHODS: dict[str, Callable[[DecoderConfig, str], Method]] = {
    "LoRA, attention": lambda config, family: lora(config, family, ATTENTION),
    "LoRA, output projection": lambda config, family: lora(config, family, ("o_proj",)),
    "LoRA, MLP": lambda config, family: lora(config, family, tuple(n for n in MLP if n in lora_targets(config))),
    "prefix tuning": lambda config, family: prefix_tuning(config),
    "prefix tuning, encoder": lambda config, family: prefix_encoder(config),
    "prompt tuning": lambda config, family: prompt_tuning(config),
    "P-tuning": lambda config, family: p_tuning(config),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A family's name, a folder with a random model, and that model as we load it."""
    architecture, fields = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    save(random_model(architecture, fields), folder)
    return request.param, folder, load_lm(str(folder))


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Tokens ``[B, T]`` and validity, rows of unequal lengths padded on the right."""
    tokens = np.random.default_rng(3).integers(3, VOCABULARY, (len(LENGTHS), T))
    return tokens, np.arange(T) < np.array(LENGTHS)[:, None]


def adapted(folder: Path, settings: Any) -> Any:
    """The model of a folder in PEFT's clothes, its trained parameters random and none of them 0."""
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, settings).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3, generator=generator)
    return model


def peft_logits(model: Any) -> Any:
    """PEFT's logits ``[B, T, V]`` of the text."""
    tokens, valid = batch()
    given = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(valid.astype(np.int64))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**given).logits[:, -T:]


def trained(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def values_of(parameters: dict[str, Any], of: Callable[[Any], Any] = lambda p: p) -> dict[str, np.ndarray]:
    return {name: of(parameter).detach().numpy().copy() for name, parameter in parameters.items()}


def peft_loss(logits: Any) -> Any:
    tokens, valid = batch()
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), torch.tensor(tokens[:, 1:]), reduction="none"
    )
    return nll[torch.tensor(valid[:, 1:])].mean()


def configuration(method: Method, eps: float, rate: float) -> Config:
    """Ours for a method, with PEFT's AdamW."""
    config = default_config()
    theirs = {"learning_rate": rate, "eps": eps, "weight_decay": DECAY, "clip_norm": 0.0}
    options = {"bank.prompt_length": P, **method.options, **{f"optimizer.{name}": x for name, x in theirs.items()}}
    for name, value in options.items():
        set_option(config, name, value)
    validate(config)
    return config


@functools.partial(jax.jit, static_argnums=0)
def our_logits(model: SelectiveLM, params: Any, tree: Tree) -> jax.Array:
    """Our logits ``[B, T, V]`` of the text, under the conditions that the tree makes."""
    tokens, valid = map(jnp.asarray, batch())
    params, prompts, prefixes = model.adapter.conditions(model.decoder, params, tree)
    x = join(prompts, embed(model.decoder, params, tokens))
    front, first, cache = prompts.shape[1], 0, None
    if prefixes is not None:
        first, cache = P, prefix_cache(model.decoder, jnp.repeat(prefixes, len(tokens), axis=0), P + T)
    positions = first + jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    seen = jnp.pad(valid, ((0, 0), (front, 0)), constant_values=True)
    hidden, _ = decode(model.decoder, params, x, positions, seen, cache)
    return vocabulary_logits(model.decoder, params, hidden[:, front:])


def our_batch() -> dict[str, np.ndarray]:
    """The texts as the trainer gets them: each row a turn, of which every token but the first is learned."""
    tokens, valid = batch()
    rows = np.arange(len(tokens), dtype=np.int32)
    return {
        "tokens": tokens.astype(np.int32),
        "lengths": np.asarray(LENGTHS, np.int32),
        "context_lengths": np.ones((len(tokens), 1), np.int32),
        "turn_mask": np.ones((len(tokens), 1), np.float32),
        "target_positions": np.broadcast_to(np.arange(T - 1, dtype=np.int32), (len(tokens), T - 1)),
        "target_ids": tokens[:, 1:].astype(np.int32),
        "target_turns": np.zeros((len(tokens), T - 1), np.int32),
        "target_mask": valid[:, 1:].astype(np.float32),
        "dialogue_ids": rows,
        "turn_ids": np.zeros((len(tokens), 1), np.int32),
    }


def our_step(method: Method, lm: LanguageModel, start: Tree, eps: float, rate: float) -> tuple[float, Tree, Tree]:
    """Loss, gradients and the tree after one of our train steps."""
    config = configuration(method, eps, rate)
    mesh = make_mesh(1, devices=jax.devices()[:1])
    # A trace without memory passes the gradients on as they are, and keeps them.
    optimizer = optax.chain(optax.trace(0.0), make_optimizer(config.optimizer, 1))
    step = make_train_step(describe(config, lm.config), objective_of(config), optimizer, mesh)
    state, metrics = step(init_state(start, optimizer, mesh), lm.params, our_batch())
    return float(metrics["loss/total"]), state.optimizer[0].trace, state.trainable


def difference(ours: Any, theirs: Any) -> float:
    """max |a − b| / max |b| of each array, the largest over a tree."""
    leaves, shape = jax.tree.flatten(ours)
    others, other_shape = jax.tree.flatten(theirs)
    assert shape == other_shape
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(leaves, others, strict=True)]
    assert all(a.shape == b.shape for a, b in pairs)
    return float(np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in pairs]))


@pytest.mark.parametrize("name", METHODS)
def test_logits_gradients_and_a_step_of_adamw_equal_peft(family, name, record_property):
    kind, folder, lm = family
    if kind == "GPT-2" and name == "LoRA, attention":
        pytest.skip("GPT-2 fuses query, key and value: PEFT's update shares one `down` among the three")
    method = METHODS[name](lm.config, kind)
    model = adapted(folder, method.settings)
    parameters = trained(model)
    start = method.read(values_of(parameters))
    ours = describe(configuration(method, *LARGE), lm.config)
    fresh = jax.eval_shape(lambda: ours.init(jax.random.key(0)))
    assert jax.tree.map(np.shape, start) == jax.tree.map(lambda x: x.shape, fresh)
    assert sum(x.size for x in jax.tree.leaves(start)) == sum(p.numel() for p in parameters.values())

    expected = peft_logits(model)
    loss = peft_loss(expected)
    loss.backward()
    expected, loss = expected.detach().numpy(), float(loss.detach())
    valid, logits = batch()[1], our_logits(ours, lm.params, start)
    our_value, gradients, after_large = our_step(method, lm, start, *LARGE)
    worst = {
        "logits": difference(np.asarray(logits)[valid], expected[valid]),
        "loss": abs(our_value - loss) / loss,
        "gradients": difference(gradients, method.read(values_of(parameters, lambda p: p.grad))),
    }
    with model.disable_adapter(), torch.no_grad():
        tokens = {"input_ids": torch.tensor(batch()[0]), "attention_mask": torch.tensor(valid.astype(np.int64))}
        bare = model.get_base_model()(**tokens).logits.numpy()
    assert difference(bare[valid], expected[valid]) > 0.1, "the adapter must matter"

    before = values_of(parameters)
    optimizer = make_optimizer(configuration(method, *SMALL).optimizer, 1)
    updates, _ = optimizer.update(gradients, optimizer.init(start), start)
    after_small = optax.apply_updates(start, updates)
    for (eps, rate), stepped in ((SMALL, after_small), (LARGE, after_large)):
        with torch.no_grad():
            for parameter_name, parameter in parameters.items():
                parameter.copy_(torch.tensor(before[parameter_name]))
        torch.optim.AdamW(parameters.values(), lr=rate, betas=(0.9, 0.999), eps=eps, weight_decay=DECAY).step()
        after = method.read(values_of(parameters))
        worst[f"parameters, ε {eps:.0e}"] = difference(stepped, after)
    moves = jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), after, start)
    assert all(np.abs(move).max() > 0.1 * rate for move in jax.tree.leaves(moves))

    for what, value in worst.items():
        record_property(what, value)
    print(f"\n| {kind} | {name} | " + " | ".join(f"{what} {value:.1e}" for what, value in worst.items()) + " |")
    assert np.max(list(worst.values())) <= TOLERANCE, worst


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("MistralForCausalLM", {"sliding_window": 7}),
        ("Gemma3ForCausalLM", {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
    ids=["Mistral", "Gemma 3"],
)
def test_windows_count_the_prefix_as_they_do_under_peft(architecture, fields, tmp_path):
    save(random_model(architecture, {**FAMILIES["Llama"][1], "head_dim": 16, **fields}), tmp_path)
    lm = load_lm(str(tmp_path))
    method, valid = prefix_tuning(lm.config), batch()[1]
    model = adapted(tmp_path, method.settings)
    ours = describe(configuration(method, *SMALL), lm.config)
    logits = our_logits(ours, lm.params, method.read(values_of(trained(model))))
    assert difference(np.asarray(logits)[valid], peft_logits(model).detach().numpy()[valid]) <= TOLERANCE

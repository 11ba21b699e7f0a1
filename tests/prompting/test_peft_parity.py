"""LoRA, prefix, prompt and P-tuning against PEFT on random small models: logits, gradients, and one step of AdamW.

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

from spt_jax.models.attention import KVCache
from spt_jax.models.decoder import decode, embed, vocabulary_logits
from spt_jax.models.decoder_config import DecoderConfig
from spt_jax.models.loading import load_lm
from spt_jax.prompting.lora import init_lora, lora_targets, with_lora
from spt_jax.prompting.p_tuning import PromptEncoder
from spt_jax.prompting.prefixes import PrefixEncoder, init_prefixes, prefix_cache
from spt_jax.prompting.selective_lm import join

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft", reason="peft is not installed; the extra test-torch holds it")
pytestmark = pytest.mark.torch

P, RANK, ALPHA, WIDTH = 4, 3, 6.0, 24
LENGTHS, T = (15, 9, 12), 15
DECAY = 0.1
STEPS = {1e-8: 1e-2, 3e-2: 0.5}
"""Learning rates by ε; the second moves parameters by as much as they measure, and shows the gradient's size."""

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
Forward = Callable[[DecoderConfig, Any, Tree, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train, on both sides.

    Attributes:
        settings: PEFT's configuration.
        read: Reads our tree out of a mapping from PEFT's names of parameters to their values (or to their gradients).
        forward: Our logits ``[B, T, V]`` of the text for decoder, frozen tree, tree, tokens and validity.
        fresh: Our tree as we start it.
    """

    settings: Any
    read: Callable[[dict[str, np.ndarray]], Tree]
    forward: Forward
    fresh: Callable[[jax.Array], Tree]


def positions_from(start: int, valid: jax.Array) -> jax.Array:
    return start + jnp.broadcast_to(jnp.arange(valid.shape[1]), valid.shape)


def text_logits(config: DecoderConfig, params: Any, x: jax.Array, start: int, valid: jax.Array, cache: Any = None):
    hidden, _ = decode(config, params, x, positions_from(start, valid), valid, cache)
    return vocabulary_logits(config, params, hidden)


def behind_prompt(config: DecoderConfig, params: Any, prompts: jax.Array, tokens: jax.Array, valid: jax.Array):
    x = join(prompts, embed(config, params, tokens))
    seen = jnp.pad(valid, ((0, 0), (P, 0)), constant_values=True)
    return text_logits(config, params, x, 0, seen)[:, P:]


def behind_prefix(config: DecoderConfig, params: Any, prefixes: jax.Array, tokens: jax.Array, valid: jax.Array):
    cache: KVCache = prefix_cache(config, jnp.repeat(prefixes, len(tokens), axis=0), P + T)
    return text_logits(config, params, embed(config, params, tokens), P, valid, cache)


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
            name: {
                "down": stacked(name, "A", (*shapes[name].inputs, RANK)),
                "up": stacked(name, "B", (RANK, *shapes[name].outputs)),
            }
            for name in targets
        }

    def forward(config: DecoderConfig, params: Any, tree: Tree, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        joined = with_lora(params, tree, ALPHA / RANK)
        return text_logits(config, joined, embed(config, joined, tokens), 0, valid)

    return Method(settings, read, forward, lambda key: init_lora(config, key, RANK, targets))


def prompt_tuning(config: DecoderConfig) -> Method:
    return Method(
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
        lambda values: values["prompt_encoder.default.embedding.weight"][None],
        behind_prompt,
        lambda key: jnp.zeros((1, P, config.hidden_size)),
    )


def linear(values: dict[str, np.ndarray], name: str) -> Tree:
    return {"kernel": values[f"{name}.weight"].T, "bias": values[f"{name}.bias"]}


def p_tuning(config: DecoderConfig) -> Method:
    encoder = PromptEncoder(P, config.hidden_size, WIDTH)

    def read(values: dict[str, np.ndarray]) -> Tree:
        layers = {f"lin_{i}": linear(values, f"prompt_encoder.default.mlp_head.{2 * i}") for i in range(3)}
        return {"embedding": values["prompt_encoder.default.embedding.weight"], **layers}

    def forward(config: DecoderConfig, params: Any, tree: Tree, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        return behind_prompt(config, params, jnp.asarray(encoder.apply({"params": tree})), tokens, valid)

    settings = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, encoder_hidden_size=WIDTH)
    return Method(settings, read, forward, lambda key: encoder.init(key)["params"])


def prefix_tuning(config: DecoderConfig) -> Method:
    def read(values: dict[str, np.ndarray]) -> Tree:
        flat = values["prompt_encoder.default.embedding.weight"]
        split = flat.reshape(P, config.num_layers, 2, config.num_key_value_heads, config.head_dim)
        return jnp.asarray(split.transpose(1, 2, 0, 3, 4))[None]

    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    return Method(settings, read, behind_prefix, lambda key: init_prefixes(config, key, 1, P))


def prefix_encoder(config: DecoderConfig) -> Method:
    encoder = PrefixEncoder(config, P, WIDTH)

    def read(values: dict[str, np.ndarray]) -> Tree:
        layers = {
            f"lin_{ours}": linear(values, f"prompt_encoder.default.transform.{i}")
            for ours, i in (("in", 0), ("out", 2))
        }
        return {"embedding": values["prompt_encoder.default.embedding.weight"][None], **layers}

    def forward(config: DecoderConfig, params: Any, tree: Tree, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        return behind_prefix(config, params, jnp.asarray(encoder.apply({"params": tree})), tokens, valid)

    settings = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=WIDTH
    )
    return Method(settings, read, forward, lambda key: encoder.init(key)["params"])


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


@functools.partial(jax.jit, static_argnums=(0, 1))
def our_loss(forward: Forward, config: DecoderConfig, params: Any, tree: Tree) -> Any:
    """Mean cross-entropy and its gradient, and the logits."""
    tokens, valid = map(jnp.asarray, batch())

    def loss(tree: Tree) -> Any:
        logits = forward(config, params, tree, tokens, valid)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(nll * valid[:, 1:]) / jnp.sum(valid[:, 1:]), logits

    return jax.value_and_grad(loss, has_aux=True)(tree)


def difference(ours: Any, theirs: Any) -> float:
    """max |a − b| / max |b| of each array, the largest over a tree."""
    leaves, shape = jax.tree.flatten(ours)
    others, other_shape = jax.tree.flatten(theirs)
    assert shape == other_shape
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(leaves, others, strict=True)]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


@pytest.mark.parametrize("name", METHODS)
def test_logits_gradients_and_a_step_of_adamw_equal_peft(family, name, record_property):
    kind, folder, lm = family
    if kind == "GPT-2" and name == "LoRA, attention":
        pytest.skip("GPT-2 fuses query, key and value: PEFT's update shares one `down` among the three")
    method = METHODS[name](lm.config, kind)
    model = adapted(folder, method.settings)
    parameters = trained(model)
    start = method.read(values_of(parameters))
    assert jax.tree.map(np.shape, start) == jax.tree.map(np.shape, method.fresh(jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(start)) == sum(p.numel() for p in parameters.values())

    expected = peft_logits(model)
    loss = peft_loss(expected)
    loss.backward()
    expected, loss = expected.detach().numpy(), float(loss.detach())
    (our_value, logits), gradients = our_loss(method.forward, lm.config, lm.params, start)
    valid = batch()[1]
    worst = {
        "logits": difference(np.asarray(logits)[valid], expected[valid]),
        "loss": abs(float(our_value) - loss) / loss,
        "gradients": difference(gradients, method.read(values_of(parameters, lambda p: p.grad))),
    }
    with model.disable_adapter(), torch.no_grad():
        tokens = {"input_ids": torch.tensor(batch()[0]), "attention_mask": torch.tensor(valid.astype(np.int64))}
        bare = model.get_base_model()(**tokens).logits.numpy()
    assert difference(bare[valid], expected[valid]) > 0.1, "the adapter must matter"

    before = values_of(parameters)
    for eps, rate in STEPS.items():
        with torch.no_grad():
            for parameter_name, parameter in parameters.items():
                parameter.copy_(torch.tensor(before[parameter_name]))
        torch.optim.AdamW(parameters.values(), lr=rate, betas=(0.9, 0.999), eps=eps, weight_decay=DECAY).step()
        optimizer = optax.adamw(rate, b1=0.9, b2=0.999, eps=eps, weight_decay=DECAY)
        updates, _ = optimizer.update(gradients, optimizer.init(start), start)
        after = method.read(values_of(parameters))
        worst[f"parameters, ε {eps:.0e}"] = difference(optax.apply_updates(start, updates), after)
    moves = jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), after, start)
    assert all(np.abs(move).max() > 0.1 * rate for move in jax.tree.leaves(moves))

    for what, value in worst.items():
        record_property(what, value)
    print(f"\n| {kind} | {name} | " + " | ".join(f"{what} {value:.1e}" for what, value in worst.items()) + " |")
    assert max(worst.values()) <= TOLERANCE, worst


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
    (_, logits), _ = our_loss(method.forward, lm.config, lm.params, method.read(values_of(trained(model))))
    assert difference(np.asarray(logits)[valid], peft_logits(model).detach().numpy()[valid]) <= TOLERANCE

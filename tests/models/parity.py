"""Random small models of every family, saved by transformers, and what its torch code says they compute.

The reference gets explicit position ids: the soft prompt is 0…P-1, the text follows, padding never counts.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_files import write_tokenizer

from spt_jax.models.attention import KVCache
from spt_jax.models.decoder import decode, embed, vocabulary_logits
from spt_jax.models.loading import LanguageModel, load_lm

TOLERANCE = 1e-4
VOCABULARY = 261
PROMPT = 4  # P
CONTEXTS, NEW = (24, 12, 19), 6  # each row's tokens before the cached steps, soft prompt included, and the steps
WIDTH = max(CONTEXTS) + NEW
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Differences:
    """The largest absolute difference of two logits, by what was run."""

    text: float
    right: float
    left: float
    cached: float

    @property
    def worst(self) -> float:
        return float(np.max(dataclasses.astuple(self)))


def random_model(architecture: str, fields: Fields, seed: int = 11) -> Any:
    """A torch model whose every parameter is random, norms and biases too, and whose logits spread by about one.

    Args:
        architecture: A class of transformers, ``"LlamaForCausalLM"``.
        fields: Its configuration, on top of `SIZES` where it is not made of several.
        seed: Of the parameters.
    """
    torch = pytest.importorskip("torch")
    import transformers

    kind = getattr(transformers, architecture)
    sizes = {} if "text_config" in fields else SIZES
    config = kind.config_class(**{**sizes, **fields})
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    centre = 0.0 if architecture.startswith("Gemma") else 1.0  # of a norm's weight w: Gemma multiplies by 1 + w
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15, generator=generator)
            elif name.endswith("weight"):
                parameter.uniform_(centre - 0.5, centre + 0.5, generator=generator)
            else:
                parameter.normal_(0, 0.3, generator=generator)
    return model


def save(model: Any, folder: Path, *, dtype: str = "float32", shards: bool = False) -> Any:
    """Saves a model and a tokenizer; returns the model as transformers reads it back, in float32."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="60KB" if shards else "5GB")
    write_tokenizer(folder)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == shards
    return reread(type(model), folder)


def reread(kind: Any, folder: Path) -> Any:
    """The model of a folder as transformers reads it, in float32, with its plainest attention."""
    return kind.from_pretrained(folder, dtype="float32", attn_implementation="eager").eval()


def reference_embeddings(model: Any, tokens: np.ndarray) -> np.ndarray:
    """What enters the reference's first block before positions, ``[..., T, M]``.

    Gemma's embedding modules scale by √M themselves; OPT-350m projects outside of its embedding module.
    """
    import torch

    with torch.no_grad():
        embeddings = model.get_input_embeddings()(torch.tensor(tokens))
        if (project := _project_in(model)) is not None:
            embeddings = project(embeddings)
        return embeddings.numpy()


def text_parameters(model: Any) -> list[np.ndarray]:
    """The reference's parameters, tied ones once, the parts that see images left out."""
    images = ("vision_tower", "multi_modal_projector")
    named = [(n, p) for n, p in model.named_parameters() if not any(part in n for part in images)]
    return [parameter.detach().float().numpy() for _, parameter in named]


def numbers(arrays: list[Any]) -> np.ndarray:
    """Every number in some arrays, in ascending order: what is left when names and layouts are taken away."""
    return np.sort(np.concatenate([np.asarray(array, np.float32).ravel() for array in arrays]))


def _project_in(model: Any) -> Any:
    return getattr(getattr(getattr(model, "model", None), "decoder", None), "project_in", None)


def _without_projection(model: Any) -> None:
    """Makes OPT-350m take embeddings of width M, which it would otherwise project once more."""
    import torch

    if _project_in(model) is not None:
        model.model.decoder.project_in = torch.nn.Identity()


def reference_logits(
    model: Any, positions: np.ndarray, valid: np.ndarray, *, tokens: Any = None, embeddings: Any = None
) -> np.ndarray:
    """The reference's logits ``[B, T, V]`` for tokens or for embeddings."""
    import torch

    assert "position_ids" in inspect.signature(model.forward).parameters
    given: dict[str, Any] = {"input_ids": torch.tensor(tokens)} if embeddings is None else {}
    if embeddings is not None:
        given = {"inputs_embeds": torch.tensor(embeddings)}
    with torch.no_grad():
        return model(
            **given,
            attention_mask=torch.tensor(valid.astype(np.int64)),
            position_ids=torch.tensor(positions, dtype=torch.int64),
            use_cache=False,
        ).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, embeddings, positions, valid, cache=None):
    """Our logits ``[B, T, V]`` and the cache."""
    hidden, cache = decode(config, params, embeddings, positions, valid, cache)
    return vocabulary_logits(config, params, hidden), cache


def padded(rows: list[np.ndarray], width: int, side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of embeddings ``[t, M]`` on one side of a batch, with positions and validity."""
    batch = np.zeros((len(rows), width, rows[0].shape[-1]), np.float32)
    positions, valid = np.zeros(batch.shape[:2], np.int32), np.zeros(batch.shape[:2], bool)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        batch[i, place], positions[i, place], valid[i, place] = row, np.arange(len(row)), True
    return batch, positions, valid


def compare(model: Any, lm: LanguageModel) -> Differences:
    """Our logits against the reference's: text, soft prompts and text padded on either side, and through the cache.

    Args:
        model: The reference; an OPT-350m loses its input projection here.
        lm: The same model as we load it.
    """
    generator = np.random.default_rng(5)
    text = generator.integers(3, VOCABULARY, (len(CONTEXTS), WIDTH))
    embeddings = reference_embeddings(model, text)
    prompts = generator.normal(0, max(0.3, embeddings.std()), (len(CONTEXTS), PROMPT, 64)).astype(np.float32)

    steps = np.tile(np.arange(WIDTH, dtype=np.int32), (len(CONTEXTS), 1))
    expected = reference_logits(model, steps, steps >= 0, tokens=text)
    assert expected.std() > 0.3, "logits this small would prove nothing"
    ours = embed(lm.config, lm.params, jnp.asarray(text))
    found, _ = run(lm.config, lm.params, ours, steps, steps >= 0)
    differences = {"text": np.abs(found - expected).max()}

    _without_projection(model)
    lengths = [context + NEW - PROMPT for context in CONTEXTS]
    rows = [np.concatenate([p, e[:n]]) for p, e, n in zip(prompts, embeddings, lengths, strict=True)]
    for side in ("left", "right"):
        batch, positions, valid = padded(rows, WIDTH, side)
        expected = reference_logits(model, positions, valid, embeddings=batch)
        found, _ = run(lm.config, lm.params, batch, positions, valid)
        differences[side] = np.abs(np.asarray(found) - expected)[valid].max()
    return Differences(**differences, cached=_cached_difference(lm, rows, expected))


def _cached_difference(lm: LanguageModel, rows: list[np.ndarray], expected: np.ndarray) -> float:
    """Contexts of unequal lengths side by side in the cache, then a token a step: padding lies between the two."""
    contexts = [row[:-NEW] for row in rows]
    cache = KVCache.empty(lm.config, len(rows), WIDTH)
    found, cache = run(lm.config, lm.params, *padded(contexts, max(CONTEXTS), "right"), cache)
    shared = np.asarray(found) - expected[:, : max(CONTEXTS)]
    worst = np.max([np.abs(shared[i, : len(context)]).max() for i, context in enumerate(contexts)])
    for step in range(NEW):
        positions = np.array([[len(context) + step] for context in contexts], np.int32)
        new = np.stack([row[p] for row, p in zip(rows, positions, strict=True)])
        found, cache = run(lm.config, lm.params, new, positions, positions >= 0, cache)
        new = np.asarray(found) - np.take_along_axis(expected, positions[..., None], 1)
        worst = np.maximum(worst, np.abs(new).max())
    return float(worst)


def check_parity(
    family: str, variant: str, model: Any, folder: Path, record_property: Any, context_length: int = 0
) -> None:
    """Loads `folder`, compares it with `model`, and records and prints a row of the parity table."""
    lm = load_lm(str(folder), context_length=context_length)
    np.testing.assert_array_equal(
        numbers(jax.tree.leaves(lm.params)), numbers(text_parameters(model)), "the file's numbers, each once"
    )
    differences = compare(model, lm)
    for what, difference in dataclasses.asdict(differences).items():
        record_property(what, float(difference))
    cells = " | ".join(f"{difference:.1e}" for difference in dataclasses.astuple(differences))
    print(f"\n| {family} | {variant} | {cells} |")
    assert differences.worst <= TOLERANCE, f"{family}, {variant}: {differences}"

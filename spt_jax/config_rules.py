"""What every option of the configuration may be, and which values go together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from spt_jax.metric_groups import EVERYDAY, GROUPS

METHODS = ("spt", "prompt_tuning", "prefix_tuning", "p_tuning", "lora", "full", "zero_shot", "few_shot")
"""What `method.kind` may be."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value must satisfy, and the same in words."""

    holds: Callable[[Any], bool]
    allowed: str


def one_of(*names: str) -> Rule:
    """One of the given names."""
    return Rule(lambda value: value in names, "one of " + ", ".join(names))


# `inf` and `nan` are floats to Python, but no option means them.
AT_LEAST_0 = Rule(lambda value: 0 <= value < math.inf, "0 or more")
AT_LEAST_1 = Rule(lambda value: 1 <= value < math.inf, "1 or more")
POSITIVE = Rule(lambda value: 0 < value < math.inf, "more than 0")
SHARE = Rule(lambda value: 0 < value <= 1, "more than 0, up to 1")
FINITE = Rule(math.isfinite, "a finite number")
OR_THE_REST = Rule(lambda value: value == -1 or value >= 1, "1 or more, or -1 for the rest")
FRACTION = Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")

RULES: dict[str, Rule] = {
    "seed": Rule(lambda value: 0 <= value < 2**32, f"0 to {2**32 - 1}"),  # of what JAX makes a key
    "model.source": Rule(bool, "a folder, a hub id, a .gguf file, package:NAME or shape:NAME"),
    "model.dtype": one_of("float32", "bfloat16"),
    "model.quantization": one_of("none", "int8", "int4"),
    "model.context_length": AT_LEAST_0,
    "model.dropout": FRACTION,
    "model.remat": one_of("auto", "none", "dots", "full"),
    "model.attention": one_of("auto", "xla", "cudnn", "splash"),
    "model.max_logit_rows": AT_LEAST_1,
    "method.kind": one_of(*METHODS),
    "method.hidden_size": AT_LEAST_0,
    "method.shots": AT_LEAST_1,
    "lora.rank": AT_LEAST_1,
    "lora.alpha": POSITIVE,
    "lora.dropout": FRACTION,
    "lora.targets": Rule(lambda value: bool(value) and all(isinstance(n, str) for n in value), "names of projections"),
    "bank.kind": one_of("prompts", "prefixes"),
    "bank.num_prompts": AT_LEAST_1,
    "bank.prompt_length": AT_LEAST_1,
    "bank.init": one_of("vocabulary", "normal", "text", "file", "peft", "clusters"),
    "bank.init_stddev": POSITIVE,
    "bank.init_text": Rule(lambda value: all(isinstance(text, str) for text in value), "texts"),
    "retriever.kind": one_of("linear", "transformer"),
    "retriever.sides": one_of("both", "prompts", "contexts", "none"),
    "retriever.context": one_of("context", "official"),
    "retriever.layers": AT_LEAST_1,
    "retriever.heads": AT_LEAST_1,
    "retriever.feed_forward": AT_LEAST_1,
    "retriever.dropout": FRACTION,
    "retriever.activation": one_of("softplus", "relu", "leaky_relu"),
    "objective.lm_weight": AT_LEAST_0,
    "objective.gold_noise": AT_LEAST_0,
    "objective.annealing": AT_LEAST_0,
    "objective.annealing_min": AT_LEAST_0,
    "objective.annealing_max": POSITIVE,
    "objective.balance_weight": AT_LEAST_0,
    "objective.prompts_per_step": AT_LEAST_0,
    "objective.selection_weight": AT_LEAST_0,
    "objective.contrastive_weight": AT_LEAST_0,
    "objective.fusion_weight": AT_LEAST_0,
    "objective.gold_temperature": POSITIVE,
    "objective.score_temperature": POSITIVE,
    "objective.bleu_threshold": Rule(lambda value: 0 <= value <= 100, "0 to 100"),
    "objective.pair_text": one_of("persona", "context"),
    "objective.pairs": one_of("across", "all"),
    "data.train": Rule(bool, "a file, a folder, hf:NAME or builtin:train"),
    "data.format": one_of("auto", "parlai", "jsonl", "datasets"),
    "data.development_dialogues": AT_LEAST_1,
    "data.test_dialogues": AT_LEAST_1,
    "data.on_error": one_of("raise", "skip"),
    "data.limit": AT_LEAST_0,
    "data.fraction": SHARE,
    "data.template": one_of("plain", "chat"),
    "data.task": one_of("response", "persona"),
    "data.official_pad": one_of("eos", "bos"),
    "data.layout": one_of("dialogue", "turn"),
    "data.batch": AT_LEAST_1,
    "data.max_length": Rule(lambda value: value >= 16, "16 or more"),
    "data.max_turns": AT_LEAST_0,
    "data.max_buckets": AT_LEAST_1,
    "data.prefetch": AT_LEAST_1,
    "optimizer.learning_rate": POSITIVE,
    "optimizer.retriever_factor": AT_LEAST_0,
    "optimizer.schedule": one_of("constant", "cosine"),
    "optimizer.warmup_steps": AT_LEAST_0,
    "optimizer.final_fraction": Rule(lambda value: 0 <= value <= 1, "0 to 1"),
    "optimizer.weight_decay": AT_LEAST_0,
    "optimizer.b1": FRACTION,
    "optimizer.b2": FRACTION,
    "optimizer.eps": POSITIVE,
    "optimizer.clip_norm": AT_LEAST_0,
    "optimizer.micro_batches": AT_LEAST_1,
    "train.epochs": AT_LEAST_1,
    "train.steps": AT_LEAST_0,
    "train.log_every": AT_LEAST_1,
    "train.evaluate_every": AT_LEAST_1,
    "train.save_every": AT_LEAST_1,
    "train.keep_latest": AT_LEAST_1,
    "train.keep_best": AT_LEAST_1,
    "train.max_bad_steps": AT_LEAST_1,
    "train.profile_steps": AT_LEAST_0,
    # With less, float32's logits would not fit.
    "generation.temperature": Rule(lambda value: value == 0 or 1e-30 <= value < math.inf, "0, or 1e-30 or more"),
    "generation.top_k": AT_LEAST_0,
    "generation.top_p": SHARE,
    "generation.min_p": Rule(lambda value: 0 <= value <= 1, "0 to 1"),
    "generation.typical_p": SHARE,
    "generation.repetition_penalty": POSITIVE,
    "generation.presence_penalty": FINITE,
    "generation.no_repeat_ngram": AT_LEAST_0,
    "generation.min_new_tokens": AT_LEAST_0,
    "generation.stop": Rule(lambda value: all(isinstance(text, str) and text for text in value), "texts, none empty"),
    "generation.beams": AT_LEAST_1,
    "generation.length_penalty": FINITE,
    "generation.early_stopping": one_of("false", "true", "never"),
    "generation.samples": AT_LEAST_1,
    "evaluation.batch": AT_LEAST_1,
    "evaluation.max_new_tokens": AT_LEAST_1,
    "evaluation.seed": Rule(lambda value: -1 <= value < 2**31, f"0 to {2**31 - 1}, or -1 for the run's"),
    "evaluation.selection": one_of("hard", "soft"),
    "evaluation.selection_noise": AT_LEAST_0,
    "evaluation.metrics": Rule(
        lambda value: bool(value) and all(name in (EVERYDAY, *GROUPS) for name in value),
        "names of " + ", ".join((EVERYDAY, *GROUPS)),
    ),
    "evaluation.bertscore_layers": AT_LEAST_0,
    "evaluation.replies": AT_LEAST_0,
    "evaluation.samples": AT_LEAST_0,
    "mesh.data": OR_THE_REST,
    "mesh.fsdp": OR_THE_REST,
    "mesh.tensor": OR_THE_REST,
    "mesh.slices": Rule(lambda value: value == -1 or value >= 1, "1 or more, or -1 for those that are there"),
}

WHOLE_NUMBERS = 2**31
"""Every whole number is below it, the seed aside: the step's are of 32 bits."""

UNRULED: dict[str, str] = {
    "model.revision": "the hub knows its revisions",
    "bank.init_file": "read, and checked against K, P and M, when bank.init is file or peft",
    "data.last_turn_only": "true or false",
    "data.freeze_persona": "true or false",
    "data.freeze_context": "true or false",
    "evaluation.bertscore": "empty, or an encoder that bert-score loads",
    "evaluation.nli": "empty, or a classifier that transformers loads",
    "retriever.share": "true or false",
    "data.development": "empty, or a source like data.train",
    "data.test": "empty, or a source like data.train",
    "data.split": "the data set knows its splits",
    "data.columns.persona": "the data set knows its columns",
    "data.columns.history": "the data set knows its columns",
    "data.columns.response": "the data set knows its columns",
    "data.columns.turns": "the data set knows its columns",
    "tracking.tensorboard": "true or false",
    "tracking.wandb": "true or false",
    "tracking.project": "any name",
}
"""Options of which every value of the right type is allowed here, and why."""


CUTS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
"""The options of decoding that cut a draw, and the value of each that cuts nothing."""


def decoding_relations(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One sentence for every option of decoding that does not go with another.

    Args:
        values: The options of the section ``generation`` by name, each allowed by itself.
        prefix: Stands before their names.
    """
    cuts = [name for name, nothing in CUTS.items() if values[name] != nothing]
    problems = []
    if values["temperature"] == 0 and cuts:
        problems.append(
            f"{' and '.join(prefix + name for name in cuts)} would cut a draw, but {prefix}temperature is 0 (greedy); "
            "give a temperature above 0"
        )
    if values["temperature"] > 0 and values["beams"] > 1:
        problems.append(
            f"{prefix}beams is {values['beams']} and {prefix}temperature {values['temperature']}; a beam search draws "
            "nothing: give one of them"
        )
    if values["samples"] > 1 and values["temperature"] == 0 and values["beams"] < values["samples"]:
        problems.append(
            f"{prefix}samples is {values['samples']}; allowed with temperature 0: up to beams ({values['beams']}), "
            "since greedy samples are all the same"
        )
    return problems


def relations(config: Any) -> list[str]:
    """One sentence for every value that does not go with another, of a config whose values are each allowed."""
    problems = []
    if config.data.batch % config.optimizer.micro_batches:
        problems.append(
            f"optimizer.micro_batches is {config.optimizer.micro_batches}; allowed: a divisor of data.batch "
            f"({config.data.batch})"
        )
    if config.data.max_turns and config.data.layout != "turn":
        problems.append(f"data.max_turns is {config.data.max_turns}, which needs data.layout = turn")
    if config.bank.init in ("file", "peft") and not config.bank.init_file:
        wanted = "a .npy, .npz or .safetensors file" if config.bank.init == "file" else "folders of PEFT adapters"
        problems.append(f"bank.init is {config.bank.init!r}, so bank.init_file must name {wanted}")
    if "nli" in config.evaluation.metrics and not config.evaluation.nli:
        problems.append("evaluation.metrics has nli, so evaluation.nli must name a classifier of entailment")
    if config.bank.init == "text" and not any(config.bank.init_text):
        problems.append("bank.init is 'text', so bank.init_text must hold a text, or one for each prompt")
    least, most = config.generation.min_new_tokens, config.evaluation.max_new_tokens
    if least > most:
        problems.append(f"generation.min_new_tokens is {least}; allowed: up to evaluation.max_new_tokens ({most})")
    problems += decoding_relations(config.generation, "generation.")
    return problems + _method_relations(config) + _official_relations(config)


def _needs(config: Any, name: str, wanted: tuple[Any, ...], because: str) -> list[str]:
    """A sentence unless the option `name` is one of `wanted`."""
    section, option = name.split(".")
    value = config[section][option]
    allowed = " or ".join(str(choice) for choice in wanted)
    return [] if value in wanted else [f"{name} is {value!r}; allowed with {because}: {allowed}"]


def _method_relations(config: Any) -> list[str]:
    o, problems = config.objective, []
    spt = config.method.kind == "spt"
    if config.data.task == "persona":
        problems += _needs(config, "data.template", ("plain",), "data.task = persona")
        problems += _needs(config, "method.kind", tuple(m for m in METHODS if m != "few_shot"), "data.task = persona")
    if config.method.kind == "few_shot":
        problems += _needs(config, "data.template", ("plain",), "method.kind = few_shot")
    if config.method.kind == "full":
        problems += _needs(config, "model.quantization", ("none",), "method.kind = full")
    if config.bank.init not in ("vocabulary", "normal") and config.method.kind not in ("spt", "prompt_tuning"):
        problems += _needs(config, "bank.init", ("vocabulary", "normal"), f"method.kind = {config.method.kind}")
    if not spt:
        problems += _needs(config, "bank.kind", ("prompts",), f"method.kind = {config.method.kind}")
    if config.method.kind not in ("p_tuning", "prefix_tuning"):
        problems += _needs(config, "method.hidden_size", (0,), f"method.kind = {config.method.kind}")
    if config.model.dropout and config.method.kind in ("zero_shot", "few_shot"):
        problems.append(f"model.dropout is {config.model.dropout}; {config.method.kind} trains nothing")
    if o.annealing and o.annealing_min > o.annealing_max:
        problems.append(
            f"objective.annealing_min is {o.annealing_min}; allowed: up to objective.annealing_max ({o.annealing_max})"
        )
    if spt and config.bank.kind == "prefixes":
        problems += _needs(config, "bank.init", ("normal",), "bank.kind = prefixes")
        problems += _needs(config, "evaluation.selection", ("hard",), "bank.kind = prefixes")
    # With m = 1 of several only favourites would learn: weights of 1 / chance cannot stand for prompts never drawn.
    some = 2 <= o.prompts_per_step < config.bank.num_prompts
    if spt and not some and o.prompts_per_step not in (0, config.bank.num_prompts):
        problems.append(
            f"objective.prompts_per_step is {o.prompts_per_step}; allowed: 0 for all, or 2 up to bank.num_prompts "
            f"({config.bank.num_prompts})"
        )
    if spt and 0 < o.prompts_per_step < config.bank.num_prompts:
        # The fusion loss scales a subset's scores by their sum, which must not come near 0.
        problems += _needs(config, "retriever.activation", ("softplus", "relu"), "objective.prompts_per_step")
    terms = ("lm_weight", "selection_weight", "contrastive_weight", "fusion_weight")
    if spt and not any(o[term] for term in terms):
        problems.append("every weight of the section objective is 0, so there is nothing to learn")
    return problems


def _official_relations(config: Any) -> list[str]:
    if config.retriever.context != "official":
        because = f"retriever.context = {config.retriever.context}"
        theirs = {"data.freeze_persona": True, "data.freeze_context": True, "data.official_pad": "eos"}
        return [problem for name, value in theirs.items() for problem in _needs(config, name, (value,), because)]
    because = "retriever.context = official"
    return [
        problem
        for name, wanted in (
            ("method.kind", ("spt",)),
            ("bank.kind", ("prompts",)),
            ("data.layout", ("turn",)),
            ("data.template", ("plain",)),
            ("data.task", ("response",)),
            ("retriever.share", (True,)),
            ("evaluation.selection", ("hard",)),
            ("objective.prompts_per_step", (0,)),
        )
        for problem in _needs(config, name, wanted, because)
    ]

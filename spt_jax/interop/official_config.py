"""From the config file of a run of the authors' program to a configuration here, in the official mode.

The values are those that their program really used: it passes over a number without a point where it looks for one with
a point, takes learning rate and batch from its command line (DeepSpeed's own record of them stands in the checkpoint),
and writes some of the command line's numbers into the name of the run's folder.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spt_jax.config import Config, default_config, validate
from spt_jax.errors import UserError
from spt_jax.interop.official_yaml import OfficialFields, flat_values, read_config_file

ACTIVATIONS = ("softplus", "relu", "leaky_relu")
ENCODER = "transformer_encoder"
ENCODER_DROPOUT = 0.1
"""Of ``torch.nn.TransformerEncoderLayer``, where their program leaves it."""

_DTYPES = {32: "float32", 16: "float32", "bf16": "bfloat16"}
_SIDES = {(True, True): "both", (True, False): "prompts", (False, True): "contexts", (False, False): "none"}
_RATIO = "--training_ratio"
"""Of their command line; no key of a config file."""

_IN_FOLDER_NAME = {
    "SLW": "training.selective_loss_weight",
    "CTRW": "training.contrastive_weight",
    "NOISE": "training.adding_noise",
    "PTRAIN": _RATIO,
}
_NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"


@dataclasses.dataclass(frozen=True)
class OfficialRun:
    """A run of the authors' program, described here.

    Attributes:
        config: A valid configuration in the official mode.
        model_name: The LM as their config file has it.
        notes: Lines for the user: what is ignored, and what was really used.
    """

    config: Config
    model_name: str
    notes: tuple[str, ...]


def read_official_run(path: Path, source: str, engine: Mapping[str, Any], *, folder_name: str = "") -> OfficialRun:
    """Describes the run of a config file.

    Args:
        path: The YAML file.
        source: The LM, as ``model.source``.
        engine: What DeepSpeed wrote into the checkpoint (`OfficialTensors.engine`).
        folder_name: Name of the run's folder, which their program makes from its command line.

    Raises:
        UserError: The file cannot be read, or asks for what is not carried over; names the key and what is allowed.
    """
    values = read_config_file(path)
    overrides = _from_folder_name(folder_name)
    fields = OfficialFields(values | overrides, str(path))
    for name, value in overrides.items():
        fields.note(f"{name} is {value}, as the folder's name {folder_name} says of the command line")
    config = default_config()
    config.model.source = source
    _model(config, fields)
    _retriever(config, fields)
    _objective(config, fields)
    _data(config, fields, path.absolute().parent)
    _optimizer(config, fields, engine)
    run = OfficialRun(config, str(fields.get("model.model_name") or ""), ())
    for name, value in fields.unread().items():
        fields.note(f"{name} is ignored ({value!r})")
    try:
        validate(config)
    except UserError as error:
        problems = "; ".join(str(error).splitlines())
        raise UserError(f"{path} gives a run that is not possible here: {problems}") from error
    return dataclasses.replace(run, notes=tuple(fields.notes))


def _from_folder_name(name: str) -> dict[str, float]:
    found = {key: re.search(rf"_{key}={_NUMBER}(?=_|$)", name) for key in _IN_FOLDER_NAME}
    return {_IN_FOLDER_NAME[key]: float(match[1]) for key, match in found.items() if match}


def _model(config: Config, fields: OfficialFields) -> None:
    fields.one_of("model.model_type", ("selective_pt",))
    fields.one_of("model.peft_type", ("prompt_tuning",))
    fields.one_of("training.mode", ("causal",))
    fields.one_of("training.task_type", ("generate_response",))
    if fields.truth("training.all_tunable"):
        raise fields.refuse("training.all_tunable", "false: the LM's own weights would be needed too")
    load_bit = fields.one_of("model.load_bit", tuple(_DTYPES))
    config.model.dtype = _DTYPES[load_bit]
    if load_bit == 16:
        fields.note("model.load_bit is 16: their program ran the LM in float16, here it runs in float32")
    config.bank.num_prompts = fields.whole("model.K", 1)
    config.bank.prompt_length = fields.whole("model.peft_config.num_virtual_tokens", 1)
    config.bank.init = "normal"
    config.data.official_pad = "bos" if fields.get("model.pad_token") == "bos" else "eos"


def _retriever(config: Config, fields: OfficialFields) -> None:
    r = config.retriever
    r.context = "official"
    activation = fields.get("model.score_activation")
    if activation not in ACTIVATIONS:
        if activation is not None:
            fields.note(f"model.score_activation is {activation!r}, for which their program used softplus")
        activation = "softplus"
    r.activation = activation
    normalizer = fields.get("model.normalizer")
    if isinstance(normalizer, str) and normalizer != "linear":
        raise fields.refuse("model.normalizer", "linear, or none at all")
    kind = fields.get("model.retriever.retriever_type")
    sides = fields.get("model.retriever.retriever_on")
    normalized = fields.get("model.normalizer_on")
    if kind == ENCODER:
        r.kind, r.dropout = "transformer", ENCODER_DROPOUT
        r.heads, r.layers = fields.whole("model.retriever.n_head", 1), fields.whole("model.retriever.num_layers", 1)
        sides = sides if isinstance(sides, list) else ["extra"]
        r.sides = _SIDES["extra" in sides, "lm" in sides]
        return
    if kind is not None:
        fields.note(f"model.retriever.retriever_type is {kind!r}, which their program passes over: no {ENCODER}")
    if isinstance(normalized, str) and "prompt" in normalized:
        raise fields.refuse(
            "model.normalizer_on", "a list of prompt and lm; their program maps prompts twice for a text"
        )
    if not isinstance(normalized, list):
        normalized = ["prompt", "lm"] if isinstance(normalized, str) and "lm" in normalized else ["prompt"]
    r.sides = _SIDES["prompt" in normalized, "lm" in normalized] if normalizer == "linear" else "none"


def _objective(config: Config, fields: OfficialFields) -> None:
    o = config.objective
    o.pairs, o.pair_text = "all", "persona"
    o.gold_temperature = fields.number("training.tau_gold", positive=True)
    o.score_temperature = fields.number("training.tau_sim", positive=True)
    selection = fields.floating("training.selective_loss_weight", 1.0, "1.0")
    o.gold_noise = abs(fields.floating("training.adding_noise", 0.0, "no noise"))
    o.fusion_weight = 1.0 if fields.get("training.ensemble") else 0.0
    metric = fields.get("training.contrastive_metric")
    threshold = fields.floating("training.contrastive_threshold", 0.0, "0.0")
    weight = fields.number("training.contrastive_weight") if isinstance(metric, str) else 0.0
    if isinstance(metric, str) and metric != "bleu":
        fields.note(f"training.contrastive_metric is {metric!r}, for which their program had no contrastive loss")
        weight = 0.0
    if weight:
        o.bleu_threshold = threshold
    o.contrastive_weight = weight
    o.selection_weight = selection
    annealing = [f"training.annealing_{name}" for name in ("scalar", "min", "max")]
    if fields.truth("training.annealing_nll"):
        o.annealing = fields.number(annealing[0], positive=True)
        o.annealing_min, o.annealing_max = fields.number(annealing[1]), fields.number(annealing[2])
    no_selection = fields.get("training.selective_loss") is False
    if no_selection:
        o.selection_weight = 0.0
    if fields.truth("training.disable_nll") and not no_selection:
        o.lm_weight = 0.0
    only_nll, skipped = fields.truth("training.only_nll"), fields.truth("training.skip_retrieval")
    if skipped and not only_nll:
        raise fields.refuse("training.skip_retrieval", "false, or true with only_nll: else their program fails")
    if skipped:
        fields.note("training.skip_retrieval concerns training alone: at test their program scores all the same")
    if only_nll:
        o.lm_weight, o.annealing = 1.0, 0.0
        o.selection_weight = o.contrastive_weight = o.fusion_weight = o.gold_noise = 0.0


def _data(config: Config, fields: OfficialFields, folder: Path) -> None:
    d = config.data
    d.layout = "turn"
    d.max_length = fields.whole("dataset.max_token_length", 16)
    turns = fields.get("dataset.max_context_turns")
    if type(turns) is not int or not (turns == -1 or turns >= 1):
        raise fields.refuse("dataset.max_context_turns", "-1 for all, or 1 or more")
    d.max_turns = max(turns, 0)
    d.last_turn_only = bool(fields.get("training.only_longest"))
    d.freeze_persona = fields.truth("training.freeze_persona")
    d.freeze_context = fields.truth("training.freeze_context")
    valid, test = fields.get("dataset.valid"), fields.get("dataset.test")
    sources = {"train": fields.get("dataset.train"), "development": valid}
    sources["test"] = test if isinstance(test, str) else valid
    for name, source in sources.items():
        if isinstance(source, str) and source:
            d[name] = _found(source, folder)
            if not Path(d[name]).exists():
                fields.note(f"{source} is not here; data.{name} names it all the same")
    if not d.test:
        fields.note("dataset.valid is missing: name the dialogues to score with --data")
    if any(Path(source).suffix == "" for source in sources.values() if isinstance(source, str)):
        d.format = "parlai"
    ratio = fields.get(_RATIO)
    if ratio is not None and 0 < ratio < 1:
        d.fraction = ratio
        fields.note("their training_ratio takes the first turns of the file, data.fraction draws dialogues by the seed")
    # Theirs has no epochs where neither the command line nor this key gives them; it never reads num_epochs.
    config.train.epochs = fields.whole("training.num_epoch", 1) if fields.get("training.num_epoch") else 1


def _found(source: str, folder: Path) -> str:
    """A path of the config file, from where the command runs or from the file's own folder; as it stands if absent."""
    places = [place for place in (Path(source), folder / source) if place.exists()]
    return str(places[0].absolute()) if places else source


def _optimizer(config: Config, fields: OfficialFields, engine: Mapping[str, Any]) -> None:
    o = config.optimizer
    recorded = engine.get("ds_config")
    ds = flat_values(recorded) if isinstance(recorded, dict) else {}
    rate, batch = fields.get("training.learning_rate"), fields.get("training.batch_size")
    parameters = {name.removeprefix("optimizer.params."): value for name, value in ds.items()}
    if _is_number(parameters.get("lr")):
        o.learning_rate = float(parameters["lr"])
        if rate is not None and fields.number("training.learning_rate") != o.learning_rate:
            fields.note(f"the learning rate was {o.learning_rate:g}, as the checkpoint says (config file: {rate})")
    elif rate is not None:
        o.learning_rate = fields.number("training.learning_rate", positive=True)
    rows = [ds.get("train_micro_batch_size_per_gpu"), ds.get("gradient_accumulation_steps", 1)]
    rows.append(engine.get("dp_world_size", 1))
    if all(type(factor) is int and factor > 0 for factor in rows):
        config.data.batch = rows[0] * rows[1] * rows[2]
        if batch is not None and batch != config.data.batch:
            fields.note(f"the batch was {config.data.batch} turns, as the checkpoint says (config file: {batch})")
    elif batch is not None:
        config.data.batch = fields.whole("training.batch_size", 1)
    o.clip_norm = float(ds["gradient_clipping"]) if _is_number(ds.get("gradient_clipping")) else 0.0
    if _is_number(parameters.get("weight_decay")):
        o.weight_decay = float(parameters["weight_decay"])
    if _is_number(parameters.get("eps")):
        o.eps = float(parameters["eps"])
    betas = parameters.get("betas")
    if isinstance(betas, list | tuple) and len(betas) == 2 and all(map(_is_number, betas)):
        o.b1, o.b2 = map(float, betas)
    if isinstance(recorded, dict) and recorded.get("scheduler"):
        fields.note(
            "the learning rate's schedule in the checkpoint's ds_config is not carried over: here it is constant"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

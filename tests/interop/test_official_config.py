"""The authors' config files become configurations: what their program really used, and nothing silently."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from spt_jax.config import default_config, flatten
from spt_jax.errors import UserError
from spt_jax.interop.official_config import OfficialRun, read_official_run
from spt_jax.interop.official_yaml import find_config_file

THEIRS: dict[str, Any] = {
    "exp_name": "opt125m",
    "model": {
        "model_type": "selective_pt",
        "model_name": "facebook/opt-125m",
        "load_bit": 32,
        "peft_type": "prompt_tuning",
        "K": 4,
        "peft_config": {"num_virtual_tokens": 8},
        "normalizer": "linear",
        "normalizer_on": ["prompt", "lm"],
        "score_activation": "softplus",
    },
    "training": {
        "mode": "causal",
        "task_type": "generate_response",
        "only_longest": False,
        "contrastive": True,
        "ensemble": True,
        "selective_loss_weight": 0.4,
        "contrastive_metric": "bleu",
        "contrastive_threshold": 20.0,
        "contrastive_weight": 0.4,
        "freeze_persona": True,
        "freeze_context": True,
        "tau_gold": 1.0,
        "tau_sim": 1.0,
    },
    "dataset": {"train": "train.txt", "valid": "valid.txt", "max_context_turns": -1, "max_token_length": 512},
}
DELETE = object()


def described(folder: Path, changes: dict[str, Any], engine: Any = None, folder_name: str = "") -> OfficialRun:
    fields = copy.deepcopy(THEIRS)
    for name, value in changes.items():
        *sections, key = name.split(".")
        section = fields
        for part in sections:
            section = section.setdefault(part, {})
        if value is DELETE:
            del section[key]
        else:
            section[key] = value
    path = folder / "opt.yml"
    path.write_text(yaml.safe_dump(fields))
    return read_official_run(path, "lm", engine or {}, folder_name=folder_name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_text("1 your persona: x .\n2 hi\thello\n")
    return tmp_path


def test_the_plain_config_is_the_papers_in_the_official_mode(folder: Path) -> None:
    run = described(folder, {})
    expected = flatten(default_config()) | {
        "model.source": "lm",
        "bank.init": "normal",
        "retriever.context": "official",
        "objective.pairs": "all",
        "data.layout": "turn",
        "data.train": str(folder / "train.txt"),
        "data.development": str(folder / "valid.txt"),
        "data.test": str(folder / "valid.txt"),
        "optimizer.clip_norm": 0.0,
    }
    assert flatten(run.config) == expected
    assert run.model_name == "facebook/opt-125m" and run.config.data.official_pad == "eos"
    assert run.notes == ("exp_name is ignored ('opt125m')", "training.contrastive is ignored (True)")


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"model.K": 2, "model.peft_config.num_virtual_tokens": 1}, {"bank.num_prompts": 2, "bank.prompt_length": 1}),
    ({"model.load_bit": "bf16"}, {"model.dtype": "bfloat16"}),
    ({"model.normalizer_on": ["prompt"]}, {"retriever.sides": "prompts"}),
    ({"model.normalizer_on": ["lm"]}, {"retriever.sides": "contexts"}),
    ({"model.normalizer_on": []}, {"retriever.sides": "none"}),
    ({"model.normalizer_on": DELETE}, {"retriever.sides": "prompts"}),
    ({"model.normalizer_on": "lm"}, {"retriever.sides": "both"}),
    ({"model.normalizer": DELETE}, {"retriever.sides": "none"}),
    ({"model.score_activation": "relu"}, {"retriever.activation": "relu"}),
    ({"model.score_activation": "leaky_relu"}, {"retriever.activation": "leaky_relu"}),
    ({"model.score_activation": DELETE}, {"retriever.activation": "softplus"}),
    (
        {"model.retriever": {"retriever_type": "transformer_encoder", "n_head": 8, "num_layers": 3}},
        {
            "retriever.kind": "transformer",
            "retriever.heads": 8,
            "retriever.layers": 3,
            "retriever.sides": "prompts",
            "retriever.dropout": 0.1,
        },
    ),
    (
        {
            "model.retriever": {
                "retriever_type": "transformer_encoder",
                "n_head": 4,
                "num_layers": 2,
                "retriever_on": ["extra", "lm"],
            }
        },
        {"retriever.kind": "transformer", "retriever.sides": "both", "retriever.dropout": 0.1},
    ),
    ({"training.ensemble": False}, {"objective.fusion_weight": 0.0}),
    ({"training.selective_loss": False}, {"objective.selection_weight": 0.0}),
    ({"training.disable_nll": True}, {"objective.lm_weight": 0.0}),
    ({"training.disable_nll": True, "training.selective_loss": False}, {"objective.selection_weight": 0.0}),
    (
        {"training.only_nll": True, "training.skip_retrieval": True, "training.annealing_nll": False},
        {f"objective.{name}_weight": 0.0 for name in ("selection", "contrastive", "fusion")},
    ),
    ({"training.contrastive_metric": DELETE}, {"objective.contrastive_weight": 0.0}),
    ({"training.contrastive_metric": "rouge"}, {"objective.contrastive_weight": 0.0}),
    ({"training.contrastive_weight": 1}, {"objective.contrastive_weight": 1.0}),
    ({"training.tau_gold": 0.5, "training.tau_sim": 1}, {"objective.gold_temperature": 0.5}),
    ({"training.adding_noise": 0.3}, {"objective.gold_noise": 0.3}),
    (
        {
            "training.annealing_nll": True,
            "training.annealing_scalar": 2,
            "training.annealing_min": 0.05,
            "training.annealing_max": 1.0,
        },
        {"objective.annealing": 2.0, "objective.annealing_min": 0.05, "objective.annealing_max": 1.0},
    ),
    ({"training.freeze_persona": False}, {"data.freeze_persona": False}),
    ({"training.freeze_context": DELETE}, {"data.freeze_context": False}),
    ({"training.only_longest": True}, {"data.last_turn_only": True}),
    ({"training.num_epoch": 3, "training.num_epochs": 7}, {"train.epochs": 3}),
    ({"training.num_epochs": 7}, {"train.epochs": 1}),
    ({"training.training_ratio": 0.5}, {"data.fraction": 1.0}),
    ({"training.tau_gold": DELETE, "training.tau_sim": DELETE}, {"objective.gold_temperature": 1.0}),
    ({"training.ensemble": DELETE}, {"objective.fusion_weight": 0.0}),
    ({"training.task_type": DELETE, "training.only_longest": DELETE}, {"data.last_turn_only": False}),
    (
        {"dataset": DELETE},
        {
            "data.train": "data_file/ConvAI2/train_self_original_no_cands.txt",
            "data.development": "data_file/ConvAI2/valid_self_original_no_cands.txt",
            "data.test": "data_file/ConvAI2/valid_self_original_no_cands.txt",
            "data.max_length": 512,
        },
    ),
    ({"dataset.max_token_length": DELETE, "dataset.max_context_turns": DELETE}, {"data.max_length": 512}),
    (
        {"training.learning_rate": "1e-5", "training.batch_size": 32},
        {"optimizer.learning_rate": 1e-5, "data.batch": 32},
    ),
    ({"dataset.max_context_turns": 3, "dataset.max_token_length": 256}, {"data.max_turns": 3, "data.max_length": 256}),
    ({"dataset.test": "else.txt"}, {"data.test": "else.txt"}),
    ({"dataset.train": "convai", "dataset.valid": "valid.txt"}, {"data.train": "convai", "data.format": "parlai"}),
    # Numbers without a point, where their program looks for one with a point.
    ({"training.selective_loss_weight": 2}, {"objective.selection_weight": 1.0}),
    ({"training.contrastive_threshold": 20}, {"objective.bleu_threshold": 0.0}),
    ({"training.adding_noise": 1}, {"objective.gold_noise": 0.0}),
]


@pytest.mark.parametrize(("changes", "expected"), OPTIONS)
def test_an_option_becomes_what_their_program_did_with_it(
    changes: dict[str, Any], expected: dict[str, Any], folder: Path
) -> None:
    plain, found = flatten(described(folder, {}).config), flatten(described(folder, changes).config)
    assert {name: found[name] for name in expected} == expected
    assert {name for name in found if found[name] != plain[name]} <= set(expected)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"training.selective_loss_weight": 2}, r"selective_loss_weight is 2, .*passes over.*: it used 1.0"),
        ({"training.contrastive_threshold": 20}, r"contrastive_threshold is 20, .*: it used 0.0"),
        ({"training.adding_noise": "1e-1"}, r"adding_noise is '1e-1', .*: it used no noise"),
        ({"training.only_nll": 1}, "only_nll is 1, which their program passes over"),
        ({"training.foo": 3}, r"training.foo is ignored \(3\)"),
        ({"model.peft_config.prompt_tuning_init": "TEXT"}, r"prompt_tuning_init is ignored \('TEXT'\)"),
        ({"model.score_activation": "tanh"}, "'tanh', for which their program used softplus"),
        ({"model.retriever": {"retriever_type": "bert"}}, "retriever_type is 'bert', which their program passes over"),
        ({"model.load_bit": 16}, "ran the LM in float16"),
        ({"training.contrastive_metric": "rouge"}, "'rouge', for which their program had no contrastive loss"),
        ({"training.only_nll": True, "training.skip_retrieval": True}, "skip_retrieval concerns training alone"),
        ({"dataset.test": "else.txt"}, "else.txt is not here; data.test names it all the same"),
        ({"dataset.valid": DELETE}, r"ConvAI2/valid_self_original_no_cands.txt is not here; data.test names"),
        ({"dataset.valid": ""}, "name the dialogues to score with --data"),
        ({"training.num_epochs": 7}, r"training.num_epochs is ignored \(7\)"),
        ({"training.training_ratio": 0.5}, r"training.training_ratio is ignored \(0.5\)"),
    ],
)
def test_what_is_not_used_as_written_is_told_in_one_line(changes: dict[str, Any], note: str, folder: Path) -> None:
    told = set(described(folder, changes).notes) - set(described(folder, {}).notes)
    assert len([line for line in told if re.search(note, line)]) == 1
    assert all("\n" not in line for line in told)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"training.all_tunable": True}, "training.all_tunable is True; allowed: false"),
        ({"training.mode": "normal"}, "training.mode is 'normal'; allowed: causal"),
        ({"training.task_type": "generate_persona"}, "'generate_persona'; allowed: generate_response"),
        ({"model.peft_type": "prefix_tuning"}, "model.peft_type is 'prefix_tuning'; allowed: prompt_tuning"),
        ({"model.model_type": "llm_chat"}, "model.model_type is 'llm_chat'; allowed: selective_pt"),
        ({"model.load_bit": 8}, "model.load_bit is 8; allowed: 32, 16, bf16"),
        ({"model.K": DELETE}, "model.K is missing; allowed: a whole number, 1 or more"),
        ({"model.K": True}, "model.K is True; allowed: a whole number"),
        ({"model.K": 2.0}, "model.K is 2.0; allowed: a whole number"),
        ({"model.normalizer": "mlp"}, "model.normalizer is 'mlp'; allowed: linear"),
        ({"model.normalizer_on": "prompt"}, "model.normalizer_on is 'prompt'; allowed: a list"),
        ({"model.peft_config": None}, "num_virtual_tokens is missing"),
        ({"model.peft_config": {"num_virtual_token": 3}}, "Did you mean 'model.peft_config.num_virtual_token'"),
        ({"training.tau_gold": "x"}, "training.tau_gold is 'x'; allowed: a number above 0"),
        ({"training.mode": DELETE}, "training.mode is 'normal'; allowed: causal"),
        ({"training.tau_sim": 0}, "training.tau_sim is 0; allowed: a number above 0"),
        ({"training.selective_loss_weight": float("nan")}, "selective_loss_weight is nan; allowed: a number"),
        ({"training.selective_loss_weight": -0.5}, "opt.yml gives a run .* objective.selection_weight is -0.5"),
        ({"training.contrastive_weight": DELETE}, "training.contrastive_weight is missing"),
        ({"training.annealing_nll": True}, "training.annealing_scalar is missing"),
        ({"training.skip_retrieval": True}, "training.skip_retrieval is True; allowed: false"),
        ({"dataset.max_context_turns": 0}, "max_context_turns is 0; allowed: -1 for all, or 1 or more"),
        ({"dataset.max_token_length": 8}, "max_token_length is 8; allowed: a whole number, 16 or more"),
        ({"model.retriever": {"retriever_type": "transformer_encoder"}}, "model.retriever.n_head is missing"),
    ],
)
def test_what_is_not_carried_over_is_refused_by_name(changes: dict[str, Any], sentence: str, folder: Path) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        described(folder, changes)
    assert "opt.yml" in str(caught.value) and "\n" not in str(caught.value)


def test_deepspeeds_own_record_says_the_optimizer_and_the_batch(folder: Path) -> None:
    parameters = {"lr": 3e-4, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.01}
    engine = {
        "dp_world_size": 3,
        "ds_config": {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 4,
            "gradient_clipping": 1,
            "optimizer": {"type": "Adam", "params": parameters},
            "scheduler": {"type": "WarmupDecayLR", "params": {}},
        },
    }
    run = described(folder, {"training.learning_rate": "1e-5", "training.batch_size": 32}, engine)
    o = run.config.optimizer
    assert (o.learning_rate, o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm) == (3e-4, 0.8, 0.9, 1e-6, 0.01, 1.0)
    assert run.config.data.batch == 24
    told = " ".join(run.notes)
    for sentence in ("the learning rate was 0.0003", "the batch was 24 turns", "schedule"):
        assert sentence in told
    for odd in ({"ds_config": "ds.json"}, {"ds_config": {"optimizer": {"params": {"lr": "auto", "betas": 1}}, 3: 4}}):
        run = described(folder, {"training.learning_rate": "1e-5", "training.batch_size": 32}, odd)
        assert (run.config.optimizer.learning_rate, run.config.data.batch) == (1e-5, 32)


def test_the_folders_name_tells_what_the_command_line_changed(folder: Path) -> None:
    name = "opt_LR=0.0001_SLW=1.0_CTRW=2.5_NOISE=1e-05_PTRAIN=0.5_2024-01-02-0304"
    run = described(folder, {"training.selective_loss_weight": 7}, folder_name=name)
    o = run.config.objective
    assert (o.selection_weight, o.contrastive_weight, o.gold_noise) == (1.0, 2.5, 1e-5)
    assert run.config.data.fraction == 0.5
    assert sum("as the folder's name" in note for note in run.notes) == 4
    assert described(folder, {}, folder_name="SLW=x_theirs").config.objective.selection_weight == 0.4


def test_the_config_file_lies_with_the_run_or_beside_the_checkpoint(tmp_path: Path) -> None:
    best = tmp_path / "run" / "ds_ckpt" / "best"
    best.mkdir(parents=True)
    (tmp_path / "run" / "a.yaml").write_text("x")
    (best / "states.pt").write_text("x")
    for place in (tmp_path / "run", best.parent, best, best / "states.pt"):
        assert find_config_file(place) == tmp_path / "run" / "a.yaml"
    (best / "b.yml").write_text("x")
    assert find_config_file(best) == best / "b.yml"
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"there is no YAML file in .*other"):
        find_config_file(tmp_path / "other")


def test_every_golden_config_is_taken(shared_dir: Path, tmp_path: Path) -> None:
    for manifest in sorted((shared_dir / "golden").glob("*/manifest.json")):
        fields = json.loads(manifest.read_text())["config"]
        path = tmp_path / "opt.yml"
        path.write_text(yaml.safe_dump(fields))
        run = read_official_run(path, "lm", {})
        assert run.config.bank.num_prompts == fields["model"]["K"]
        assert run.config.retriever.context == "official"
        assert not any("passes over" in note for note in run.notes), manifest


def test_a_file_as_they_publish_it_leaves_the_rest_to_their_defaults(folder: Path) -> None:
    """Their own configs for ConvAI2 name neither temperatures nor an activation."""
    silent = ("model.score_activation", "training.tau_gold", "training.tau_sim")
    published = {"training.learning_rate": "1e-5", "training.batch_size": 32, "training.num_epochs": 1}
    found = flatten(described(folder, published | dict.fromkeys(silent, DELETE)).config)
    changed = {"optimizer.learning_rate": 1e-5, "data.batch": 32}
    assert found == flatten(described(folder, {}).config) | changed

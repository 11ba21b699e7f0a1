"""``spt-jax inspect``: true figures from metadata alone, and the loader's own words for what it refuses."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import pytest
from hub_server import MAIN, HubServer, running_hub
from huggingface_hub import constants
from llama_files import random_llama, write_tokenizer
from tiny_run import walk, write_config, write_dialogues

from spt_jax.commands.main import main
from spt_jax.errors import UserError
from spt_jax.models.files.gguf_file import GGUFFile
from spt_jax.models.files.safetensors_file import SafetensorsFolder
from spt_jax.models.loading import load_lm
from spt_jax.models.shapes import shape_fields
from spt_jax.prompting.adapters import SoftPrompts
from spt_jax.prompting.retriever import RetrieverConfig
from spt_jax.prompting.selective_lm import SelectiveLM

pytestmark = pytest.mark.first_python

SMALL = random_llama().fields
LLAMA2_7B = shape_fields("shape:llama2-7b")


@pytest.fixture
def facts(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The JSON object that the door prints."""

    def read(*arguments: str) -> dict[str, Any]:
        assert main(["inspect", *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return read


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads a tensor fails."""

    def read(self: Any, name: str) -> None:
        raise AssertionError(f"the tensor {name} was read")

    monkeypatch.setattr(SafetensorsFolder, "read", read)
    monkeypatch.setattr(GGUFFile, "read", read)


def headers_alone(folder: Path, fields: dict[str, Any], changes: dict[str, list[int] | None] | None = None) -> Path:
    """A Llama's folder whose weight file has a header, and nothing on the disk behind it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    write_tokenizer(folder)
    width, inner, keys = fields["hidden_size"], fields["intermediate_size"], fields["num_key_value_heads"]
    keys = keys * (width // fields["num_attention_heads"])
    shapes: dict[str, Any] = {"model.embed_tokens.weight": [fields["vocab_size"], width], "model.norm.weight": [width]}
    shapes["lm_head.weight"] = [fields["vocab_size"], width]
    for layer in range(fields["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{block}.{name}.weight"] = [width]
        for name, shape in {
            "self_attn.q_proj": [width, width],
            "self_attn.k_proj": [keys, width],
            "self_attn.v_proj": [keys, width],
            "self_attn.o_proj": [width, width],
            "mlp.gate_proj": [inner, width],
            "mlp.up_proj": [inner, width],
            "mlp.down_proj": [width, inner],
        }.items():
            shapes[f"{block}.{name}.weight"] = shape
    shapes = {name: shape for name, shape in {**shapes, **(changes or {})}.items() if shape is not None}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)
    return folder


def test_a_folder_of_thirteen_gigabytes_is_described_from_its_header(
    facts: Callable[..., dict[str, Any]], no_weights: None, tmp_path: Path
) -> None:
    folder = headers_alone(tmp_path / "llama", LLAMA2_7B)
    assert (folder / "model.safetensors").stat().st_blocks * 512 < 1_000_000  # the file is a hole
    seen = facts(str(folder))
    assert (seen["family"], seen["kind"], seen["path"]) == ("Llama", "folder", str(folder))
    assert seen["parameters"] == {
        "total": 6_738_415_616,
        "embedding": 131_072_000,
        "positions": 0,
        "head": 131_072_000,
        "blocks": 6_738_415_616 - 2 * 131_072_000 - 4096,
        "block": 202_383_360,
    }
    assert seen["memory_bytes"]["float32"] == 4 * 6_738_415_616
    assert seen["memory_bytes"]["bfloat16"] == 2 * 6_738_415_616
    assert seen["cache_bytes_per_token"] == 2 * 32 * 4096 * 4
    assert seen["tensor_types"] == {"BF16": 291}
    assert seen["files"] == {"model.safetensors": (folder / "model.safetensors").stat().st_size}
    assert seen["tokenizer"]["bos"] == {"id": 1, "text": "<s>"}
    assert seen["tokenizer"]["eos"] == {"id": 2, "text": "</s>"}
    assert seen["tokenizer"]["chat_template"] is False


@pytest.mark.parametrize("name", ["shape:opt-66b", "shape:qwen3-32b"])
def test_int8_takes_about_half_of_bfloat16_and_int4_about_a_quarter(
    facts: Callable[..., dict[str, Any]], name: str
) -> None:
    memory = facts(name)["memory_bytes"]
    assert 0.5 < memory["int8"] / memory["bfloat16"] < 0.6
    assert 0.25 < memory["int4"] / memory["bfloat16"] < 0.4


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("gpt2", [{"layers": 12, "window": None, "rope_theta": None, "rope_scaling": None, "rotary_dim": None}]),
        ("pythia-70m", [{"layers": 6, "window": None, "rope_theta": 1e4, "rope_scaling": None, "rotary_dim": 16}]),
        ("mistral-7b", [{"layers": 32, "window": 4096, "rope_theta": 1e4, "rope_scaling": None, "rotary_dim": 128}]),
        (
            "smollm3-3b",
            [
                {"layers": 27, "window": None, "rope_theta": 5e6, "rope_scaling": None, "rotary_dim": 128},
                {"layers": 9, "window": None, "rope_theta": None, "rope_scaling": None, "rotary_dim": None},
            ],
        ),
        (
            "gemma3-4b",
            [
                {"layers": 29, "window": 1024, "rope_theta": 1e4, "rope_scaling": None, "rotary_dim": 256},
                {"layers": 5, "window": None, "rope_theta": 1e6, "rope_scaling": "linear", "rotary_dim": 256},
            ],
        ),
    ],
)
def test_kinds_of_attention_are_counted(
    facts: Callable[..., dict[str, Any]], name: str, attention: list[dict[str, Any]]
) -> None:
    assert facts(f"shape:{name}")["attention"] == attention


def test_soft_caps_ties_and_the_context_are_told(facts: Callable[..., dict[str, Any]]) -> None:
    seen = facts("shape:gemma2-2b")
    assert (seen["decoder"]["attention_softcap"], seen["decoder"]["logit_softcap"]) == (50.0, 30.0)
    assert seen["decoder"]["tie_word_embeddings"] is True
    assert seen["context"] == {"trained": 8192, "longest_row": 8192}
    assert "window" not in seen["features"]["dialogue packing"]["note"]
    windowed = facts("shape:gemma3-1b", "--config.data.max_length=600")
    assert "window of 512" in windowed["features"]["dialogue packing"]["note"]


def test_the_trainable_parameters_are_those_of_the_configuration(facts: Callable[..., dict[str, Any]]) -> None:
    assert facts("shape:opt-125m")["trainable"] == {
        "num_prompts": 4,
        "prompt_length": 8,
        "bank": 4 * 8 * 768,
        "retriever": 768 * 768 + 768,
        "total": 615_168,
    }
    changed = facts("shape:opt-125m", "--config.bank.num_prompts=3", "--noconfig.retriever.share")["trainable"]
    assert (changed["bank"], changed["retriever"]) == (3 * 8 * 768, 2 * (768 * 768 + 768))
    import jax

    decoder = load_lm("shape:opt-125m?layers=1").config
    tree = SelectiveLM(decoder, SoftPrompts(4, 8), RetrieverConfig()).init(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == 615_168


def test_a_configuration_that_is_too_long_for_the_lm_is_told(facts: Callable[..., dict[str, Any]]) -> None:
    assert facts("shape:gpt2")["features"]["row and reply fit"]["applies"] is True
    seen = facts("shape:gpt2", "--config.data.max_length=1000")["features"]["row and reply fit"]
    assert seen == {"applies": False, "note": "soft prompt, data.max_length and reply take 1040 tokens of 1024"}


def test_a_gguf_file_is_described_without_reading_a_tensor(
    facts: Callable[..., dict[str, Any]], no_weights: None, tmp_path: Path
) -> None:
    model = random_llama()
    path = model.write_gguf(tmp_path / "m.gguf", quantisation="Q8_0")
    data = gguf.GGUFReader(path).tensors[0].data_offset
    seen = facts(f"--source={path}")
    assert (seen["kind"], seen["family"]) == ("gguf", "Llama")
    assert seen["parameters"]["total"] == sum(tensor.size for tensor in model.tensors.values())
    assert seen["files"] == {"m.gguf": path.stat().st_size}
    assert seen["tensor_types"]["Q8_0"] == 16
    blank = bytearray(path.read_bytes())
    blank[data:] = bytes(len(blank) - data)
    path.write_bytes(blank)
    assert facts(str(path)) == seen


def test_lm_and_inspection_agree(facts: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    import jax

    folder = random_llama(tie_word_embeddings=True).write_folder(tmp_path / "m", shards=3)
    seen, lm = facts(str(folder)), load_lm(str(folder), dtype="bfloat16")
    assert seen["memory_bytes"]["bfloat16"] == sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
    assert seen["tokenizer"]["fingerprint"] == lm.tokenizer.fingerprint
    assert len(seen["files"]) == 3


@pytest.mark.parametrize(
    "broken",
    [
        lambda folder: (folder / "config.json").write_text('{"model_type": "mamba"}'),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: os.truncate(folder / "model.safetensors", 1000),
        lambda folder: headers_alone(folder, SMALL, {"model.norm.weight": None}),
        lambda folder: headers_alone(folder, SMALL, {"model.norm.weight": [63]}),
        lambda folder: headers_alone(folder, SMALL, {"model.surprise": [3]}),
        lambda folder: headers_alone(folder, {**SMALL, "hidden_act": "sine"}),
        lambda folder: headers_alone(folder, {**SMALL, "rope_scaling": {"type": "spiral", "factor": 2.0}}),
        lambda folder: headers_alone(folder, {**SMALL, "vocab_size": 100}),
    ],
)
def test_what_loading_refuses_is_refused_in_the_same_words(
    broken: Callable[[Path], Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = headers_alone(tmp_path / "m", SMALL)
    assert main(["inspect", str(folder)]) == 0
    broken(folder)
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 2
    with pytest.raises(UserError) as told:
        load_lm(str(folder))
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"spt-jax inspect: {told.value}\n")


def test_people_get_the_same_figures_as_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "shape:gemma2-2b", "--config.model.dtype=bfloat16"]) == 0
    out = capsys.readouterr().out
    for text in (
        "Gemma 2 decoder",
        "2,614,341,888",
        "window of 4096, RoPE base 10,000, soft cap 50",
        "10.5 GB",
        "106,496 bytes a token",
        "0 '<s>'",
        "chat template            no",
    ):
        assert text in out
    assert max(len(line) for line in out.splitlines()) < 120


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["shape:gpt2", "shape:opt-125m"], "inspect takes one SOURCE, and 'shape:opt-125m' is another"),
        (["--source=shape:gpt2", "shape:gpt2"], "inspect takes one SOURCE, and 'shape:gpt2' is another"),
        (["shape:gtp2"], "Did you mean 'gpt2'?"),
        (["shape:gpt2", "--revison=x"], "there is no flag --revison for inspect. Did you mean '--revision'?"),
        (["shape:gpt2", "--revision=x"], "revision 'x' is given, but model source 'shape:gpt2' is not a hub id"),
        (["shape:gpt2", "--config.model.dtype=int3"], "model.dtype is 'int3'; allowed: one of float32, bfloat16"),
        (["shape:gpt2", "--config.model.context_length=9999"], "a context of 9999 tokens"),
        (["shape:gpt2", "--config="], "--config is missing; give a config file"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *arguments]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_without_a_source_the_model_of_the_configuration_is_inspected(
    facts: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    text = "from spt_jax.config import default_config\ndef get_config():\n    c = default_config()\n"
    (tmp_path / "c.py").write_text(
        text + "    c.model.source = 'shape:gpt2'\n    c.bank.num_prompts = 2\n    return c\n"
    )
    seen = facts(f"--config={tmp_path / 'c.py'}")
    assert (seen["source"], seen["trainable"]["num_prompts"]) == ("shape:gpt2", 2)
    assert facts("--config.model.source=shape:gpt2")["source"] == "shape:gpt2"
    assert facts("shape:gpt2-medium", f"--config={tmp_path / 'c.py'}")["source"] == "shape:gpt2-medium"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub() as server:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


def test_of_a_hub_id_headers_are_fetched_and_no_weights(
    hub: HubServer, facts: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = random_llama().write_folder(tmp_path / "m")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.repositories["some/llama"] = {MAIN: files}
    seen = facts("some/llama", "--revision=main")
    size = len(files["model.safetensors"])
    header = 8 + int.from_bytes(files["model.safetensors"][:8], "little")
    assert (seen["kind"], seen["revision"], seen["files"]["model.safetensors"]) == ("hub", MAIN, size)
    assert seen["tensor_types"] == {"F32": 21}
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
    sent = sum(count for name, count, _ in hub.served if name == "model.safetensors")
    assert header <= sent <= max(header, 100_001)  # huggingface_hub asks for this much at first
    local = facts(str(folder))
    for same in ("parameters", "attention", "tokenizer", "memory_bytes", "tensor_types", "features"):
        assert seen[same] == local[same]


def test_training_and_replies_run_on_a_shape_without_any_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write_dialogues(tmp_path / "train.txt")
    config = write_config(tmp_path / "tiny.py", Path("shape:pythia-70m?layers=1"), data, data)
    run = tmp_path / "run"
    quick = {"mesh.fsdp": 8, "train.steps": 1, "train.evaluate_every": 9, "data.max_length": 256}
    walk("train", f"--config={config}:2", f"--workdir={run}", *(f"--config.{k}={v}" for k, v in quick.items()))
    saved = json.loads((run / "config.json").read_text())
    assert "shape:pythia-70m?layers=1" in json.dumps(saved)
    context = {"persona": ["i bake bread."], "history": ["hi"]}
    (tmp_path / "in.jsonl").write_text(json.dumps(context) + "\n")
    walk("generate", f"--workdir={run}", f"--input={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out.jsonl'}")
    reply = json.loads((tmp_path / "out.jsonl").read_text())
    assert {**reply, **context} == reply
    assert reply["selected"] in (0, 1)
    capsys.readouterr()


def test_a_stored_head_that_is_tied_is_told_by_its_shape_alone(
    facts: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = random_llama(tie_word_embeddings=True)
    files.tensors["lm_head.weight"] = files.tensors["model.embed_tokens.weight"].copy()
    seen = facts(str(files.write_folder(tmp_path / "same")))
    assert seen["decoder"]["tie_word_embeddings"] and seen["parameters"]["head"] == 0
    files.tensors["lm_head.weight"] = files.tensors["lm_head.weight"][:-1]
    assert main(["inspect", str(files.write_folder(tmp_path / "other"))]) == 2
    assert "lm_head.weight and model.embed_tokens.weight differ" in capsys.readouterr().err

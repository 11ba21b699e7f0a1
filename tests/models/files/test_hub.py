"""Models of the hub: the right files once, pinned to a commit, and one sentence for all that can go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hub_server import MAIN, OLD, HubServer, running_hub
from huggingface_hub import constants, errors
from safetensors.numpy import save

from spt_jax.errors import UserError
from spt_jax.models.files.hub import hub_folder, hub_metadata
from spt_jax.models.files.sources import resolve_source
from spt_jax.models.loading import load_lm

SMALL = {"config.json": b'{"model_type": "opt"}', "tokenizer.json": b'{"version": "1.0"}'}
WEIGHTS = save({"a": np.arange(60_000, dtype=np.float32), "b": np.ones((2, 3), np.float16)})
CHUNK = 4096


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    sleep = time.sleep
    with running_hub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))  # between its tries
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


def publish(hub: HubServer, files: dict[str, bytes], name: str = "some/model", commit: str = MAIN) -> None:
    hub.repositories.setdefault(name, {})[commit] = {**SMALL, **files}


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is gone: nobody listens at the hub's address."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def refused(*words: str, source: str = "some/model", ask: Callable[..., Any] = hub_folder, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        ask(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in (repr(source), *words):
        assert word in message, message
    return message


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def index_of(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"t{i}": shard for i, shard in enumerate(shards)}}).encode()


def test_safetensors_are_fetched_and_nothing_else_of_weights(hub: HubServer) -> None:
    tokenizer = {
        name: name.encode()
        for name in [
            "generation_config.json",
            "tokenizer_config.json",
            "tokenizer.model",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.json",
            "merges.txt",
            "chat_template.jinja",
        ]
    }
    others = {"pytorch_model.bin": b"bin", "tf_model.h5": b"h5", "README.md": b"x", "onnx/model.safetensors": b"y"}
    publish(hub, {**tokenizer, **others, "model.safetensors": WEIGHTS, "model.fp16.safetensors": b"z"})
    folder = hub_folder("some/model")
    assert names(folder) == {*SMALL, *tokenizer, "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_without_safetensors_the_bin_files_are_fetched(hub: HubServer) -> None:
    publish(hub, {"pytorch_model.bin": b"bin", "flax_model.msgpack": b"x", "tf_model.h5": b"y"})
    assert names(hub_folder("some/model")) == {*SMALL, "pytorch_model.bin"}


@pytest.mark.parametrize(("stem", "kind"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_an_index_decides_which_shards_are_fetched(stem: str, kind: str, hub: HubServer) -> None:
    shards = [f"{stem}-0000{i}-of-00002.{kind}" for i in (1, 2)]
    index = f"{stem}.{kind}.index.json"
    publish(hub, {index: index_of(*shards), **{s: s.encode() for s in shards}, f"{stem}-old.{kind}": b"x"})
    assert names(hub_folder("some/model")) == {*SMALL, index, *shards}
    del hub.repositories["some/model"][MAIN][shards[1]]
    hub.repositories["some/other"] = hub.repositories["some/model"]
    refused("names", shards[1], "not there", source="some/other")


def test_a_tokenizer_alone_needs_no_weights(hub: HubServer) -> None:
    publish(hub, {"model.safetensors": WEIGHTS, "model.safetensors.index.json": index_of("model.safetensors")})
    source = resolve_source("some/model", weights=False)
    assert (source.kind, source.name, source.revision) == ("folder", "some/model", MAIN)
    assert names(source.path) == set(SMALL)


def test_branch_tag_and_commit_are_resolved_to_a_commit(hub: HubServer) -> None:
    publish(hub, {"model.safetensors": b"new"})
    publish(hub, {"model.safetensors": b"old"}, commit=OLD)
    for revision, commit, content in (
        ("", MAIN, b"new"),
        ("main", MAIN, b"new"),
        ("v1", OLD, b"old"),
        (OLD, OLD, b"old"),
    ):
        source = resolve_source("some/model", revision)
        assert source.revision == commit
        assert (source.path / "model.safetensors").read_bytes() == content
    hub.revisions["main"] = OLD
    assert resolve_source("some/model").revision == OLD


def test_an_id_without_a_namespace_works_and_follows_its_move(hub: HubServer) -> None:
    publish(hub, {"model.safetensors": WEIGHTS}, name="gpt2")
    assert resolve_source("gpt2").revision == MAIN
    publish(hub, {"model.safetensors": WEIGHTS}, name="openai-community/gpt2-large")
    hub.moved["gpt2-large"] = "openai-community/gpt2-large"
    assert (resolve_source("gpt2-large").path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_model_of_the_hub_loads_and_carries_its_commit(
    hub: HubServer, make_llama: Callable[..., Any], tmp_path: Path
) -> None:
    folder = make_llama().write_folder(tmp_path / "local")
    publish(hub, {file.name: file.read_bytes() for file in folder.iterdir()})
    identity = load_lm("some/model", revision="main").identity
    assert (identity.name, identity.revision) == ("some/model", MAIN)
    assert identity.sha256 == load_lm(str(folder)).identity.sha256


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_is_refused_unless_its_copy_is_whole(status: int, hub: HubServer) -> None:
    publish(hub, {"model.safetensors": WEIGHTS})
    hub.refusals["some/model"] = (status, "GatedRepo")
    refused("gated", "403", "hf auth login")
    hub.refusals.clear()
    whole = hub_folder("some/model")
    hub.refusals["some/model"] = (status, "GatedRepo")
    assert hub_folder("some/model") == whole


def test_unknown_models_and_revisions_are_refused(hub: HubServer) -> None:
    publish(hub, {"model.safetensors": WEIGHTS})
    refused("does not exist here", "does not know it", "401", source="some/modell")
    refused("no revision 'v9'", revision="v9")
    refused("no revision", revision="c" * 40)
    refused("neither exists here nor is a valid hub id", source="some/--model")


def test_a_repository_without_config_or_readable_weights_is_refused(hub: HubServer) -> None:
    publish(hub, {"tf_model.h5": b"x", "model.gguf": b"y"})
    refused("no weights that can be read", "it has model.gguf, tf_model.h5", "model.safetensors", "pytorch_model.bin")
    hub.repositories["no/config"] = {MAIN: {"model.safetensors": WEIGHTS}}
    refused("no config.json", source="no/config")


@pytest.mark.parametrize("way", ["switched off", "no network"])
def test_offline_a_whole_copy_serves_and_anything_less_is_a_sentence(
    way: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, {"model.safetensors": WEIGHTS})
    publish(hub, {"model.safetensors": WEIGHTS}, name="some/tokenizer")
    whole = hub_folder("some/model", "main")
    hub_folder("some/tokenizer", weights=False)
    if way == "switched off":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        unreachable(monkeypatch)
    hub.asked.clear()
    assert hub_folder("some/model") == hub_folder("some/model", "main") == hub_folder("some/model", MAIN) == whole
    assert names(hub_folder("some/tokenizer", weights=False)) == set(SMALL)
    message = refused("incomplete", "no weights", "cannot be fetched", source="some/tokenizer")
    assert ("HF_HUB_OFFLINE" in message) == (way == "switched off")
    refused("not in the local Hugging Face cache", "offline", source="some/absent")
    refused("at revision 'v1'", "not in the local Hugging Face cache", revision="v1")
    assert hub.asked == []


def test_a_broken_connection_is_taken_up_where_it_broke(hub: HubServer) -> None:
    publish(hub, {"model.safetensors": WEIGHTS})
    hub.cuts["model.safetensors"] = [100_000, 50_000]
    assert (hub_folder("some/model") / "model.safetensors").read_bytes() == WEIGHTS
    parts = [(start, sent) for name, sent, start in hub.served if name == "model.safetensors"]
    assert len(parts) == 3
    assert parts[0][0] == 0 and parts[1][0] >= 100_000 - CHUNK and parts[2][0] > parts[1][0]
    assert sum(sent for _, sent in parts) <= len(WEIGHTS) + 2 * CHUNK


def test_a_download_that_fails_is_a_sentence_and_the_next_fetches_only_the_rest(hub: HubServer) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": WEIGHTS[i:] for i in (1, 2)}
    publish(hub, {"model.safetensors.index.json": index_of(*shards), **shards})
    last = "model-00002-of-00002.safetensors"
    hub.cuts[last] = [0] * 50
    refused("could not be fetched from the Hugging Face hub", "trying again fetches the others alone")
    hub.cuts.clear()
    hub.served.clear()
    folder = hub_folder("some/model")
    assert hub.fetched() == [last]
    assert {name: (folder / name).read_bytes() for name in shards} == shards


def test_missing_and_damaged_files_of_the_cache_are_fetched_again(
    hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = {f"model-0000{i}-of-00003.safetensors": WEIGHTS[i:] for i in (1, 2, 3)}
    publish(hub, {"model.safetensors.index.json": index_of(*shards), **shards})
    folder = hub_folder("some/model")
    one, two, three = (folder / name for name in shards)
    one.unlink()
    two.resolve().unlink()
    three.resolve().write_bytes(b"short")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        refused("incomplete", one.name, two.name, "HF_HUB_OFFLINE")
    hub.served.clear()
    assert hub_folder("some/model") == folder
    assert {name: (folder / name).read_bytes() for name in shards} == shards
    assert set(hub.fetched()) <= set(shards) and {two.name, three.name} <= set(hub.fetched())


def test_a_file_of_another_size_than_promised_is_refused(hub: HubServer) -> None:
    publish(hub, {"model.safetensors": WEIGHTS})
    hub.listed_sizes["model.safetensors"] = len(WEIGHTS) + 1
    refused("model.safetensors", f"{len(WEIGHTS)} bytes", f"promised {len(WEIGHTS) + 1}")


def test_a_full_disk_is_told(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub, {"model.safetensors": WEIGHTS})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    refused("the disk of", str(cache), "is full", "HF_HOME")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError, ("gated", "403", "hf auth login")),
        (errors.RepositoryNotFoundError, ("does not exist here", "401", "hf auth login")),
        (errors.RevisionNotFoundError, ("no revision 'v9'",)),
        (errors.LocalEntryNotFoundError, ("not in the local Hugging Face cache", "offline")),
        (errors.OfflineModeIsEnabled, ("not in the local Hugging Face cache", "offline")),
        (errors.HfHubHTTPError, ("could not be fetched", "said the hub")),
        (ConnectionResetError, ("could not be fetched", "said the hub")),
    ],
)
def test_each_failure_of_the_library_is_one_sentence(
    error: type[Exception], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raised = error.__new__(error)
        raised.args = ("said the hub\nin two lines",)
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(*words, revision="v9", ask=resolve_source)


def test_metadata_takes_headers_alone(hub: HubServer) -> None:
    shards = {
        "model-00001-of-00002.safetensors": WEIGHTS,
        "model-00002-of-00002.safetensors": save({"c": np.zeros(90_000, np.float64)}),
    }
    publish(hub, {"model.safetensors.index.json": index_of(*shards), **shards, "README.md": b"x"})
    known = hub_metadata("some/model", "main")
    assert known.config == {"model_type": "opt"} and known.revision == MAIN
    assert known.shapes == {"a": ("F32", (60_000,)), "b": ("F16", (2, 3)), "c": ("F64", (90_000,))}
    assert known.weight_files == tuple(shards)
    assert known.files == {
        name: len(content) for name, content in hub.repositories["some/model"][MAIN].items() if name != "README.md"
    }
    assert not names(known.folder) & set(shards)
    assert sum(sent for name, sent, _ in hub.served if name in shards) < 210_000 < sum(map(len, shards.values()))
    folder = hub_folder("some/model")
    hub.served.clear()
    assert hub_metadata("some/model").shapes == known.shapes and hub.served == []
    assert folder == known.folder


def test_metadata_of_bin_files_has_no_shapes(hub: HubServer) -> None:
    publish(hub, {"pytorch_model.bin": b"x" * 1000})
    known = hub_metadata("some/model")
    assert known.shapes is None and known.files["pytorch_model.bin"] == 1000
    assert "pytorch_model.bin" not in hub.fetched()


def test_metadata_that_does_not_parse_is_refused(hub: HubServer) -> None:
    publish(hub, {"model.safetensors": b"\xff" * 2000})
    refused("could not be fetched", ask=hub_metadata)
    publish(hub, {"model.safetensors": WEIGHTS, "config.json": b"{"}, name="bad/config")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        hub_metadata("bad/config")


def test_two_processes_share_one_download(hub: HubServer, tmp_path: Path) -> None:
    publish(hub, {"model.safetensors": WEIGHTS})
    hub.held["model.safetensors"] = 2  # the first waits until the second is about to fetch the same file
    program = "from spt_jax.models.files.hub import hub_folder; print(hub_folder('some/model'))"
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    runs = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = {run.communicate(timeout=60)[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    (folder,) = folders
    assert (Path(folder) / "model.safetensors").read_bytes() == WEIGHTS
    assert [name for name, _, _ in hub.served].count("model.safetensors") == 1

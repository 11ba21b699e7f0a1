"""A folder to a stand-in of the hub, and one sentence for all that can go wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import MAIN, HubServer, running_hub
from huggingface_hub import constants

from spt_jax.errors import UserError
from spt_jax.interop.hub_upload import check_upload, upload_folder

FILES = {
    "README.md": b"---\nlibrary_name: peft\n---\n\n# A card\n",
    "prompt_0/adapter_config.json": b"{}",
    "prompt_0/adapter_model.safetensors": bytes(range(256)),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    sleep = time.sleep
    with running_hub() as server:
        server.writers, server.readers = ("writer",), ("reader",)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))  # between its tries
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", "writer")
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
    return tmp_path / "out"


def test_every_file_arrives_in_a_new_repository(hub, folder):
    check_upload("me/adapters")
    assert upload_folder(folder, "me/adapters") == f"{hub.endpoint}/me/adapters"
    assert hub.repositories["me/adapters"][MAIN] == FILES
    assert hub.private == []


def test_a_private_repository_is_private_and_an_old_one_is_added_to(hub, folder):
    upload_folder(folder, "me/adapters", private=True)
    assert hub.private == ["me/adapters"]
    (folder / "more.json").write_bytes(b"[]")
    upload_folder(folder, "me/adapters", private=True)
    assert hub.repositories["me/adapters"][MAIN] == {**FILES, "more.json": b"[]"}


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        upload_folder(folder, "me/adapters")
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(folder), "me/adapters", *words):
        assert word in message, message
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == set(FILES)


def test_a_log_in_without_the_right_to_write_is_told(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "reader")
    refused(folder, "403", "token")
    monkeypatch.setenv("HF_TOKEN", "stranger")
    refused(folder, "401", "hf auth login")
    assert hub.repositories == {}


def test_a_hub_that_cannot_be_reached_is_told(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(folder)


def test_what_would_fail_in_the_end_is_told_in_the_beginning(hub, monkeypatch):
    with pytest.raises(UserError, match="not the name of a repository"):
        check_upload("me/adapters/of mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        check_upload("me/adapters")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        check_upload("me/adapters")
    assert hub.asked == []

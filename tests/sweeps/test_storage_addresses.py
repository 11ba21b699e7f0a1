"""Addresses of storages: what they lead to, and what of them is shown."""

from __future__ import annotations

import pytest

from spt_jax.sweeps import door
from spt_jax.sweeps.storage import hidden, open_storage, storage_url


@pytest.mark.parametrize("name", ["plain", "what?uri=false", "50%20", "a#b", "two words"])
def test_the_database_lies_in_the_sweeps_folder_whatever_its_name(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    storage = open_storage(storage_url("", folder))
    storage.create_new_study([], "sweep")
    storage.remove_session()
    storage.engine.dispose()
    assert (folder / "sweep.db").stat().st_size > 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://me:s3cret@host/base",
        "postgresql://host/base?user=me&password=s3cret",
        "postgresql://host/base?sslpassword=s3cret",
        "postgresql+psycopg://me:a@b:s3cret@host/base",
        "postgresql+psycopg://host:none/host/base?password=s3cret",
    ],
)
def test_no_password_is_shown(tmp_path, address):
    shown = hidden(address)
    assert "s3cret" not in shown and "host/base" in shown


def test_who_interrupts_a_watch_gets_a_sentence_and_the_code_of_an_interruption(monkeypatch, capsys):
    monkeypatch.setattr(door, "_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert door.main("launch/sweep.py", ["--sweep=configs/sweeps/lambdas.py", "--watch"]) == 130
    assert capsys.readouterr().err == "\nsweep: interrupted\n"

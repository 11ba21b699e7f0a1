"""The hash of a file is that of its bytes, whether it was kept or not."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from spt_jax.errors import UserError
from spt_jax.models.files import file_hash
from spt_jax.models.files.file_hash import sha256_of_files


@pytest.fixture(autouse=True)
def _small_and_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the hashes of small files just written."""
    monkeypatch.setattr(file_hash, "REMEMBERED_BYTES", 1)
    monkeypatch.setattr(file_hash, "SETTLED_SECONDS", -1.0)


def kept(cache_home: Path) -> list[Path]:
    return sorted((cache_home / "hashes").glob("*"))


def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets any further hashing of content fail."""

    class Broken:
        def update(self, block: bytes) -> None:
            raise AssertionError("the file was read")

    monkeypatch.setattr(file_hash, "hashlib", SimpleNamespace(sha256=Broken))


def test_a_file_that_did_not_change_is_not_read_again(
    tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights" * 1000)
    assert sha256_of_files((file,)) == hashlib.sha256(b"weights" * 1000).hexdigest()
    assert len(kept(cache_home)) == 1
    unreadable(monkeypatch)
    assert sha256_of_files((file,)) == hashlib.sha256(b"weights" * 1000).hexdigest()


def test_several_files_have_the_hash_of_their_names_and_hashes(tmp_path: Path, cache_home: Path) -> None:
    files = (tmp_path / "a", tmp_path / "b")
    for file in files:
        file.write_text(file.name)
    lines = "".join(f"{file.name} {hashlib.sha256(file.name.encode()).hexdigest()}\n" for file in files)
    for _ in range(2):
        assert sha256_of_files(files) == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize("how", ["rewritten", "replaced", "rewritten, its time set back"])
def test_other_bytes_of_the_same_length_have_another_hash(tmp_path: Path, cache_home: Path, how: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"old")
    status = file.stat()
    sha256_of_files((file,))
    if how == "replaced":
        (tmp_path / "new").write_bytes(b"new")
        (tmp_path / "new").replace(file)
    else:
        file.write_bytes(b"new")
    if how != "rewritten":
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sha256_of_files((file,)) == hashlib.sha256(b"new").hexdigest()


def test_a_file_that_has_just_changed_is_not_remembered(
    tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hash, "SETTLED_SECONDS", 60.0)
    (tmp_path / "a").write_bytes(b"x")
    sha256_of_files((tmp_path / "a",))
    assert kept(cache_home) == []


@pytest.mark.parametrize("damage", ["", "{}", "[]", "not JSON", '{"stamp": 1}', "another hash"])
def test_a_damaged_record_is_written_anew(
    tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    right = sha256_of_files((file,))
    [record] = kept(cache_home)
    whole = record.read_text()
    record.write_text(whole.replace(right, "0" * 64) if damage == "another hash" else damage)
    assert sha256_of_files((file,)) == right
    assert record.read_text() == whole
    unreadable(monkeypatch)
    assert sha256_of_files((file,)) == right


@pytest.mark.parametrize("why", ["off", "unusable"])
def test_without_a_cache_folder_files_are_read(
    tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "off":
        monkeypatch.setenv("SPT_JAX_CACHE_GB", "0")
    else:
        cache_home.parent.write_text("a file where the folder should be")
    (tmp_path / "a").write_bytes(b"x")
    assert sha256_of_files((tmp_path / "a",)) == hashlib.sha256(b"x").hexdigest()
    assert not cache_home.exists()


def test_a_file_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be read to its end: No such file"):
        sha256_of_files((tmp_path / "gone",))

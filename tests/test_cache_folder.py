"""What can be made again is kept within a limit, appears whole, and never makes anything fail."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spt_jax import cache_folder
from spt_jax.cache_folder import (
    cache_home,
    cache_limit,
    code_digest,
    drop,
    entry_path,
    key_of,
    make_room,
    new_folder_entry,
    store,
    touch,
)
from spt_jax.errors import UserError


def test_the_folder_is_the_users(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert entry_path("rows", "a") == cache_home / "rows" / "a"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert entry_path("rows", "a") == Path("/somewhere/.cache/spt_jax/rows/a")


def test_an_account_without_a_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_home() is None
    assert entry_path("rows", "a") is None
    assert not make_room(1)


@pytest.mark.parametrize(("text", "limit"), [("", 8_000_000_000), ("0", 0), ("0.5", 500_000_000), (" 20 ", 20 * 10**9)])
def test_the_limit_is_a_number_of_gigabytes(text: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPT_JAX_CACHE_GB", text)
    assert cache_limit() == limit
    assert (entry_path("rows", "a") is None) == (limit == 0)


@pytest.mark.parametrize("text", ["off", "-1", "nan", "inf", "8GB"])
def test_another_limit_is_refused_in_a_sentence(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPT_JAX_CACHE_GB", text)
    with pytest.raises(UserError, match=f"SPT_JAX_CACHE_GB is '{text}'; allowed: gigabytes, such as 8, or 0 for no"):
        entry_path("rows", "a")


def test_a_key_is_another_for_every_other_sequence_of_texts() -> None:
    sequences = [(), ("",), ("", ""), ("ab", "c"), ("a", "bc"), ("abc",), ("c", "ab"), ("\ud800",)]
    assert len({key_of(*texts) for texts in sequences}) == len(sequences)
    assert key_of("a", "b") == key_of("a", "b")


def test_another_line_of_code_is_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package_of_code" / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py", "inner/a.py"):
        (tmp_path / "package_of_code" / name).write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = code_digest("package_of_code")
    code_digest.cache_clear()
    assert code_digest("package_of_code") == before
    (tmp_path / "package_of_code" / "inner" / "a.py").write_text("x = 2\n")
    code_digest.cache_clear()
    assert code_digest("package_of_code") != before


def test_the_longest_unused_entries_make_room(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPT_JAX_CACHE_GB", "1e-6")  # 1000 bytes
    entries = [cache_home / "rows" / "old", cache_home / "weights" / "older", cache_home / "rows" / "new"]
    store(entries[0], bytes(300))
    with new_folder_entry(entries[1]) as folder:
        (folder / "a").write_bytes(bytes(300))
    store(entries[2], bytes(300))
    for age, entry in enumerate((entries[2], entries[0], entries[1])):
        os.utime(entry, (1e9 - age, 1e9 - age))
    assert make_room(100)
    assert [entry.exists() for entry in entries] == [True, True, True]
    assert make_room(101)
    assert [entry.exists() for entry in entries] == [True, False, True]
    touch(entries[0])
    store(cache_home / "rows" / "newest", bytes(500))
    assert [entry.exists() for entry in entries] == [True, False, False]
    store(cache_home / "rows" / "too large", bytes(1001))
    assert sorted(path.name for path in (cache_home / "rows").iterdir()) == ["newest", "old"]


def test_a_disk_that_is_almost_full_is_left_alone(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = cache_folder.shutil.disk_usage("/")._replace(free=1999)
    monkeypatch.setattr(cache_folder.shutil, "disk_usage", lambda path: free)
    assert make_room(999)
    assert not make_room(1000)


def test_a_folder_that_cannot_be_used_is_no_error(cache_home: Path) -> None:
    cache_home.parent.write_text("a file where the folder should be")
    store(cache_home / "rows" / "a", b"content")
    assert not make_room(1)
    touch(cache_home / "rows" / "a")
    drop(cache_home / "rows" / "a")
    with pytest.raises(OSError, match="Not a directory"), new_folder_entry(cache_home / "weights" / "a"):
        raise AssertionError


def test_a_folder_entry_appears_whole_or_not_at_all_and_the_first_stays(cache_home: Path) -> None:
    entry = cache_home / "weights" / "a"
    with pytest.raises(OSError, match="No space left"), new_folder_entry(entry) as folder:
        (folder / "half").write_text("written")
        raise OSError(28, "No space left on device")
    assert list(entry.parent.iterdir()) == []
    with new_folder_entry(entry) as second:
        with new_folder_entry(entry) as first:
            (first / "of").write_text("first")
        (second / "of").write_text("second")
    assert list(entry.parent.iterdir()) == [entry]
    assert (entry / "of").read_text() == "first"
    drop(entry)
    assert list(entry.parent.iterdir()) == []

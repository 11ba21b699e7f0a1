"""Any bytes: files are read, or refused with a sentence, in bounded time and memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from driver import Reader, read_case, run_campaign
from own_files import OWN_FILES, PACKED
from readers import CONFIGURATIONS, DIALOGUES, WEIGHTS

READERS = DIALOGUES + PACKED + WEIGHTS + CONFIGURATIONS + OWN_FILES
every_reader = pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)


@every_reader
def test_a_sound_file_is_read(reader: Reader, tmp_path: Path) -> None:
    assert read_case(reader, reader.sound, tmp_path) is None


@every_reader
def test_any_bytes_are_read_or_refused_with_a_sentence(
    reader: Reader, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    count = 5000 if request.config.getoption("--all") else 200
    refused = run_campaign(reader, count, tmp_path)
    assert refused > count // 20  # else the mutations do not reach what the reader checks

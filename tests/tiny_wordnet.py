"""A WordNet database of a handful of words, in the format of wndb(5WN)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from spt_jax.evaluation import wordnet

_NOUNS = (("dog", "hound"), ("kitchen",), ("film", "movie"))
_VERBS = (("cook", "prepare"),)
_HEAD = "  1 WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved.\n"


@contextmanager
def readers_closed() -> Iterator[None]:
    """Closes the files of every reader that is made in the block: nltk keeps them open as long as its reader lives."""
    made, make = [], wordnet._open
    wordnet._reader.cache_clear()
    with mock.patch.object(wordnet, "_open", lambda root: made.append(make(root)) or made[-1]):
        yield
    wordnet._reader.cache_clear()
    for reader in made:
        for file in reader._data_file_map.values():
            file.close()


def write_wordnet(folder: Path) -> Path:
    """Writes the files that Debian's packages bring, ``lexnames`` not among them."""
    folder.mkdir(parents=True)
    senses = []
    for part, letter, synsets in (("noun", "n", _NOUNS), ("verb", "v", _VERBS), ("adj", "a", ()), ("adv", "r", ())):
        data, index = _HEAD, {}
        for words in synsets:
            offset = len(data.encode())
            listed = " ".join(f"{word} 0" for word in words)
            frames = "00 " if letter == "v" else ""
            data += (
                f"{offset:08d} {5 if letter == 'n' else 29:02d} {letter} {len(words):02x} {listed} 000 {frames}| a\n"
            )
            index |= {word: f"{word} {letter} 1 0 1 0 {offset:08d}\n" for word in words}
            senses += [f"{word}%1:05:00:: {offset:08d} 1 0\n" for word in words]
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text(_HEAD + "".join(index[word] for word in sorted(index)))
        (folder / f"{part}.exc").write_text("")
    (folder / "index.sense").write_text("".join(sorted(senses)))
    (folder / "cntlist.rev").write_text("")
    return folder

"""WordNet 3 for METEOR, wherever this machine has it; nothing is downloaded.

nltk takes a database only from a folder ``corpora/wordnet`` below its own data path, with a file ``lexnames`` that
Debian's packages lack. So a database found elsewhere is copied into such a folder in the cache.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from spt_jax.cache_folder import entry_path, key_of, make_room, new_folder_entry, touch
from spt_jax.errors import UserError

HOW_TO_GET_IT = (
    "install Debian's packages with 'apt-get install wordnet-base wordnet-sense-index', or run "
    "'python -m nltk.downloader wordnet', or name a folder that holds it in the environment variable WNSEARCHDIR"
)
DEBIAN = Path("/usr/share/wordnet")
_FILES_TEXT = (
    "index.adj index.adv index.noun index.verb data.adj data.adv data.noun data.verb "
    "adj.exc adv.exc noun.exc verb.exc index.sense cntlist.rev"
)
_NOUNS_TEXT = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
)
_VERBS_TEXT = (
    "body change cognition communication competition consumption contact creation emotion motion perception possession "
    "social stative weather"
)
_FILES = tuple(_FILES_TEXT.split())
_LEXICOGRAPHER_FILES = (
    ("adj.all", 3),
    ("adj.pert", 3),
    ("adv.all", 4),
    *((f"noun.{name}", 1) for name in _NOUNS_TEXT.split()),
    *((f"verb.{name}", 2) for name in _VERBS_TEXT.split()),
    ("adj.ppl", 3),
)
"""The names of WordNet's lexicographer files with their parts of speech, in the order of lexnames(5WN)."""


class WordNetMissingError(UserError):
    """This machine has no WordNet."""


def find_wordnet() -> Any:
    """nltk's reader of WordNet, for ``meteor_score(…, wordnet=reader)``; the first use reads its index, some seconds.

    It is looked for in ``$WNSEARCHDIR``, ``$WNHOME/dict`` (WordNet's own variables), nltk's data path, then
    ``/usr/share/wordnet``.

    Raises:
        WordNetMissingError: There is none; the sentence says how to get it.
        UserError: A folder that a variable names holds no WordNet.
    """
    return _reader(os.environ.get("WNSEARCHDIR", ""), os.environ.get("WNHOME", ""), str(DEBIAN))


@functools.lru_cache(maxsize=1)
def _reader(search_folder: str, home: str, debian: str) -> Any:
    if search_folder:
        return _read(_named("WNSEARCHDIR", Path(search_folder)))
    if home:
        return _read(_named("WNHOME", Path(home) / "dict"))
    import nltk.data

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nltk on folders that others may write to: it skips them
        for name in ("corpora/wordnet", "corpora/wordnet.zip/wordnet/"):
            try:
                return _open(nltk.data.find(name))
            except (LookupError, OSError):
                continue
    if _missing(Path(debian)):
        raise WordNetMissingError(f"this machine has no WordNet; {HOW_TO_GET_IT}")
    return _read(Path(debian))


def _named(variable: str, folder: Path) -> Path:
    missing = _missing(folder)
    if missing:
        raise UserError(f"the environment variable {variable} leads to {folder}, where WordNet's file {missing} is not")
    return folder


def _missing(folder: Path) -> str:
    return next((name for name in _FILES if not (folder / name).is_file()), "")


def _read(folder: Path) -> Any:
    import nltk.data

    root = _staged(folder)
    if str(root) not in nltk.data.path:
        nltk.data.path.append(str(root))
    return _open(str(root / "corpora" / "wordnet"))


def _open(root: Any) -> Any:
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that other languages are not there
        warnings.simplefilter("ignore", ResourceWarning)  # nltk leaves closing the index to Python
        return WordNetCorpusReader(root, None)


def _staged(folder: Path) -> Path:
    """A folder with ``corpora/wordnet`` in the cache, or a temporary one for this process where nothing is kept."""
    stats = [(folder / name).stat() for name in _FILES]
    entry = entry_path("wordnet", key_of(str(folder.resolve()), *(f"{s.st_size} {s.st_mtime_ns}" for s in stats)))
    try:
        if entry is not None and not entry.exists() and make_room(sum(s.st_size for s in stats)):
            with new_folder_entry(entry) as new:
                _copy(folder, new)
        if entry is not None and entry.exists():
            touch(entry)
            return entry
    except OSError:
        pass  # a cache that cannot be written is no error
    return _temporary(folder)


@functools.cache
def _temporary(folder: Path) -> Path:
    new = Path(tempfile.mkdtemp(prefix="spt_jax-wordnet-"))
    atexit.register(shutil.rmtree, new, ignore_errors=True)
    _copy(folder, new)
    return new


def _copy(folder: Path, new: Path) -> None:
    target = new / "corpora" / "wordnet"
    target.mkdir(parents=True, mode=0o700)
    for name in _FILES:
        shutil.copyfile(folder / name, target / name)
    names = _lexicographer_lines() if not (folder / "lexnames").is_file() else (folder / "lexnames").read_text("utf-8")
    (target / "lexnames").write_text(names, encoding="utf-8")


def _lexicographer_lines() -> str:
    return "".join(f"{i:02d}\t{name}\t{kind}\n" for i, (name, kind) in enumerate(_LEXICOGRAPHER_FILES))

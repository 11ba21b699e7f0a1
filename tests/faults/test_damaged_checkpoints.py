"""A checkpoint whose files are cut, emptied, deleted or changed in a bit is either whole all the same or set aside."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from campaign import Campaign
from short_run import STEPS, steps_on_disk

from spt_jax.exit_codes import FINISHED, MISTAKE
from spt_jax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.first_python

Damage = Callable[[bytearray, random.Random], bytes | None]
"""New bytes of a file, or None to delete it."""


def truncated(data: bytearray, draws: random.Random) -> bytes:
    return bytes(data[: draws.randrange(len(data))])


def bit_flipped(data: bytearray, draws: random.Random) -> bytes:
    data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    return bytes(data)


def overwritten(data: bytearray, draws: random.Random) -> bytes:
    start = draws.randrange(len(data))
    data[start : start + 64] = draws.randbytes(len(data[start : start + 64]))
    return bytes(data)


def deleted(data: bytearray, draws: random.Random) -> None:
    return None


DAMAGES: tuple[Damage, ...] = (truncated, bit_flipped, bit_flipped, overwritten, deleted)


SEALED = ("meta/metadata", "metrics/metrics", "trainable/manifest.ocdbt", "optimizer/manifest.ocdbt")
"""Files of which a checksum, ours or OCDBT's, notices every change; of the others some are not read at a restore."""


def damage(step: Path, draws: random.Random, names: tuple[str, ...] = ()) -> str:
    """Damages a random file of a checkpoint, one of `names` if there are any; says which one and how."""
    files = [step / name for name in names] or [p for p in step.rglob("*") if p.is_file() and p.stat().st_size]
    path = draws.choice(sorted(files, key=lambda path: (path.parent, path.stat().st_size)))  # some names are random
    change = draws.choice(DAMAGES)
    data = change(bytearray(path.read_bytes()), draws)
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    return f"{path.relative_to(step)} {change.__name__}"


def assert_goes_on(undisturbed: Campaign, workdir: Path, what: str) -> bool:
    """Starts a run again whose newest checkpoint is damaged; whether the checkpoint was set aside."""
    code, out, err = undisturbed.command.run(workdir)
    told = f"{what}:\n{out}\n{err}"
    assert code == FINISHED, told
    assert not re.findall(r"^\w+Error.*", err, re.MULTILINE), told
    undisturbed.assert_undisturbed(workdir)
    resumed = re.search(r"resuming from step (\d+) of", out)
    assert resumed, told
    aside = (workdir / "checkpoints" / f"{STEPS}.corrupt").is_dir()
    assert int(resumed[1]) == (STEPS - 1 if aside else STEPS), told
    assert (f"it was set aside as {STEPS}.corrupt" in err) == aside, told
    return aside


@pytest.mark.parametrize("cases", [6, pytest.param(100, marks=pytest.mark.campaign)])
def test_a_run_goes_on_from_the_last_whole_checkpoint(undisturbed, tmp_path, cases):
    draws = random.Random(cases)
    best = list(Checkpoints(undisturbed.undisturbed / "checkpoints", read_only=True).candidates("best"))
    for case in range(cases):
        workdir = shutil.copytree(undisturbed.undisturbed, tmp_path / str(case))
        sealed = case % 2 == 0
        what = damage(workdir / "checkpoints" / str(STEPS), draws, SEALED if sealed else ())
        aside = assert_goes_on(undisturbed, workdir, what)
        assert aside or not sealed, f"{what}: the damage was not noticed"
        # What is best is known by the perplexities, of which none may have changed unnoticed.
        assert list(Checkpoints(workdir / "checkpoints", read_only=True).candidates("best")) == best, what
        shutil.rmtree(workdir)


def test_a_checkpoint_with_an_emptied_file_is_set_aside(undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed.undisturbed, tmp_path / "run")
    (workdir / "checkpoints" / str(STEPS) / "trainable" / "manifest.ocdbt").write_bytes(b"")
    assert assert_goes_on(undisturbed, workdir, "trainable/manifest.ocdbt emptied")


def test_without_any_whole_checkpoint_a_run_says_so_and_all_are_kept_for_the_one_who_asks(undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed.undisturbed, tmp_path / "run")
    for step in steps_on_disk(workdir):
        chunk = max((workdir / "checkpoints" / str(step) / "trainable").rglob("d/*"), key=lambda p: p.stat().st_size)
        chunk.write_bytes(bytes(len(chunk.read_bytes())))
    before = steps_on_disk(workdir)
    code, _, err = undisturbed.command.run(workdir)
    assert code == MISTAKE, err
    assert re.search(r"^spt-jax train: no checkpoint in .* is whole: ", err.splitlines()[-1]), err
    assert not re.findall(r"^\w+Error.*", err, re.MULTILINE), err
    kept = sorted(int(path.name.split(".")[0]) for path in (workdir / "checkpoints").glob("*.corrupt"))
    assert kept == before

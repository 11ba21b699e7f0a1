"""Kills, stops and wakes short trainings at random moments, and starts them again until they are done.

    PYTHONPATH=tests python tests/faults/campaign.py --faults=200 --out=faults

Every run must end bitwise as one that was never disturbed, and nothing may be lost but the steps since the last save
that was finished. Half of the starts have a wall clock that jumps by years at every phase, and files whose times are of
other years. Writes ``OUT.json`` and ``OUT.md``.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from disturbances import TEN_YEARS, Disturbance
from forked_command import ForkedCommand, Start, environment
from phases import PHASES
from short_run import STEPS, assert_same_run, digests, steps_on_disk, unfinished_saves, write_short_run

from spt_jax.exit_codes import FINISHED, STOPPED
from spt_jax.training.checkpoint_arrays import restore_targets, tree_digest
from spt_jax.training.workdir import read_initial

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
FAULTS_A_RUN = 10
"""After so many a run is left in peace to end."""


@dataclasses.dataclass
class Report:
    """What was done to the runs, and what became of them."""

    seed: int
    hits: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    runs: int = 0
    starts: int = 0
    jumping_clocks: int = 0
    unfinished_saves: int = 0
    set_aside: int = 0
    stopped_and_saved: int = 0
    steps_lost: int = 0
    most_lost: int = 0
    seconds: float = 0.0

    @property
    def faults(self) -> int:
        return self.hits.total()

    def to_dict(self) -> dict[str, object]:
        """JSON values; `hits` as ``{phase: {signal: count}}``."""
        hits = {phase: {s.name: self.hits[phase, s.name] for s in SIGNALS} for phase in PHASES}
        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "date": f"{datetime.date.today()}"}
        return dataclasses.asdict(self) | {"hits": hits, "faults": self.faults} | machine

    def to_markdown(self) -> str:
        """The table of phases and signals, and a line of what was seen."""
        lines = [f"| phase | {' | '.join(s.name for s in SIGNALS)} |", "| --- | ---: | ---: | ---: |"]
        lines += [f"| {p} | {' | '.join(str(self.hits[p, s.name]) for s in SIGNALS)} |" for p in PHASES]
        return "\n".join(lines) + (
            f"\n\n{self.faults} faults in {self.runs} runs and {self.starts} starts, {self.jumping_clocks} of them "
            f"with a jumping clock; {self.unfinished_saves} saves torn, {self.set_aside} half deleted checkpoints set "
            f"aside, {self.stopped_and_saved} polite stops that saved; {self.steps_lost} steps done again, at most "
            f"{self.most_lost} at once. Every run ended bitwise as the undisturbed one. Seed {self.seed}, "
            f"{self.seconds:.0f} s on {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"{datetime.date.today()}.\n"
        )


@dataclasses.dataclass
class Campaign:
    """The undisturbed run, and how long its phases take.

    Attributes:
        command: With warm caches.
        undisturbed: The working directory of the run that every other is compared with.
        seconds: Of each phase, on average.
    """

    command: ForkedCommand
    undisturbed: Path
    seconds: dict[str, float]

    @classmethod
    def prepared(cls, folder: Path) -> Campaign:
        """Trains undisturbed in a process of its own, as a user does, and in a fork, which must give the same."""
        config, caches = write_short_run(folder), folder / "caches"
        undisturbed = folder / "undisturbed"
        arguments = [f"--config={config}", f"--workdir={undisturbed}"]
        subprocess.run(
            [sys.executable, "-m", "spt_jax", "train", *arguments],
            env=os.environ | environment(caches),
            stdout=subprocess.DEVNULL,
            check=True,
        )
        command = ForkedCommand(config, caches, folder / "logs")
        start = command.start(folder / "forked")
        assert start.wait() == FINISHED, start.err
        assert_same_run(folder / "forked", undisturbed)
        return cls(command, undisturbed, {phase: start.board.mean_seconds(phase) for phase in PHASES})

    def assert_undisturbed(self, workdir: Path) -> None:
        """A run that is done is the undisturbed one, bitwise; its last parameters on the disk are those it tells of."""
        assert_same_run(workdir, self.undisturbed)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = ocp.args.StandardRestore(restore_targets(read_initial(workdir), here))
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            trainable = reader.restore(workdir / "checkpoints" / str(STEPS) / "trainable", args=wanted)
        assert tree_digest(trainable) == digests(self.undisturbed)["trainable"]

    def run(self, folder: Path, faults: int, seed: int) -> Report:
        """Disturbs runs until so many faults have hit.

        Raises:
            AssertionError: A run lost something, or did not end as the undisturbed one; its folder is left.
        """
        report, draws, begun = Report(seed), random.Random(seed), time.perf_counter()
        while report.faults < faults:
            report.runs += 1
            cold = report.runs % 4 == 0  # kills must hit compilations too, and entries of caches that are being written
            caches = folder / f"caches_{report.runs}" if cold else self.command.caches
            command = dataclasses.replace(self.command, caches=caches)
            run = _Run(folder / f"run_{report.runs}", command, self.seconds, draws, report)
            run.disturb(min(FAULTS_A_RUN, faults - report.faults))
            self.assert_undisturbed(run.workdir)
            assert not unfinished_saves(run.workdir)
            report.set_aside += len(list((run.workdir / "checkpoints").glob("*.corrupt*")))
        report.seconds = time.perf_counter() - begun
        return report


@dataclasses.dataclass
class _Run:
    """One working directory, and the starts that it takes to finish it."""

    workdir: Path
    command: ForkedCommand
    seconds: dict[str, float]
    draws: random.Random
    report: Report

    def disturb(self, faults: int) -> None:
        """Starts the run until it is done; at most so many faults hit it."""
        last = self.report.faults + faults
        code = None
        while code != FINISHED:
            self.report.starts += 1
            save_every = self.draws.choice((1, 2, 5))
            disturbance = self._other_time() if self.draws.random() < 0.5 else None
            newest, torn = self._newest(), unfinished_saves(self.workdir)
            start = self.command.start(self.workdir, f"--config.train.save_every={save_every}", disturbance=disturbance)
            try:
                sent = self._strike_until_it_ends(start, newest, torn, last)
                code = start.wait()
            finally:
                start.process.kill()
            self._check(start, code, sent, newest, save_every)

    def _strike_until_it_ends(self, start: Start, newest: int, torn: set[str], last: int) -> signal.Signals | None:
        """Signals until one ends the run, it has ended, or enough have hit; gives the one that should have ended it."""
        woken = False
        while self.report.faults < last:
            sent = self._strike(start, newest, torn, woken=woken)
            if sent != signal.SIGSTOP:
                return sent
            woken = True
        return None

    def _newest(self) -> int:
        return max(steps_on_disk(self.workdir), default=-1)

    def _other_time(self) -> Disturbance:
        """Gives every file the time of another year, and the next start a clock that jumps."""
        self.report.jumping_clocks += 1
        for folder in (self.workdir, self.command.caches):
            for path in folder.rglob("*"):
                moment = time.time() + self.draws.uniform(-TEN_YEARS, TEN_YEARS)
                os.utime(path, (moment, moment))
        return Disturbance(clock_seed=self.draws.randrange(2**32))

    def _strike(self, start: Start, newest: int, torn: set[str], *, woken: bool) -> signal.Signals | None:
        """Waits for a random moment and sends a random signal; None when the run ended before."""
        first = () if woken else ("start", "restore", "compile") if newest >= 0 else ("start", "compile")
        phase = self.draws.choice((*first, "step", "evaluation", "save"))
        number = self.draws.choices((signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP), (5, 2, 2))[0]
        often = start.board.entered(phase) + self.draws.randint(1, 4) if phase in ("step", "save") else 1
        while start.board.entered(phase) < often:
            if not start.process.is_alive():
                return None
            time.sleep(0.0005)
        time.sleep(self.draws.uniform(0, self.seconds[phase]))
        if not start.process.is_alive():
            return None
        assert start.process.pid is not None
        now = start.board.now
        os.kill(start.process.pid, number)
        if number == signal.SIGKILL:
            start.process.join()
            if start.process.exitcode != -signal.SIGKILL:
                return None
            now = start.board.now
            if unfinished_saves(self.workdir) - torn:
                self.report.unfinished_saves += 1
                now = "save"
        elif number == signal.SIGSTOP:
            time.sleep(self.draws.uniform(0.05, 0.3))
            now = start.board.now
            os.kill(start.process.pid, signal.SIGCONT)
        self.report.hits[now, number.name] += 1
        return number

    def _check(self, start: Start, code: int, sent: signal.Signals | None, newest: int, save_every: int) -> None:
        told = f"{self.workdir}, signal {sent}, exit code {code}, phase {start.board.now}:\n{start.out}\n{start.err}"
        saved = self._newest()
        allowed = {FINISHED}
        if sent == signal.SIGKILL:
            allowed = {-signal.SIGKILL}
        elif sent == signal.SIGTERM:
            # Before it listens, and after the last step, a run is ended by the signal itself.
            allowed |= {STOPPED} | ({-signal.SIGTERM} if start.board.now == "start" or saved == STEPS else set())
        assert code in allowed, told
        assert "Traceback" not in start.err, told
        resumed = re.search(r"resuming from step (\d+) of", start.out)
        assert resumed is None or int(resumed[1]) == newest, told
        assert resumed is not None or newest < 0 or code < 0, told
        assert saved >= newest, told
        begun = (int(resumed[1]) if resumed else 0) + start.board.entered("compile") + start.board.entered("step")
        lost = max(0, begun - max(saved, 0))
        if code == STOPPED:
            self.report.stopped_and_saved += 1
            stopped = re.search(r"stopped after step (\d+) of", start.out)
            assert stopped is not None and int(stopped[1]) == saved, told
        # A save is written while the next steps are done; the save after it waits for it.
        assert lost <= (2 * save_every if code < 0 else 0), told
        self.report.steps_lost += lost
        self.report.most_lost = max(self.report.most_lost, lost)


def main(arguments: Sequence[str] | None = None) -> None:
    """The campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="how many signals hit")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--out", type=Path, required=True, help="the report's name without its ending")
    flags = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="spt-jax-faults-"))
    report = Campaign.prepared(folder).run(folder, flags.faults, flags.seed)
    shutil.rmtree(folder)  # after a run that lost something it is left, to be looked at
    flags.out.with_suffix(".json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    flags.out.with_suffix(".md").write_text(report.to_markdown())
    print(report.to_markdown())


if __name__ == "__main__":
    main()

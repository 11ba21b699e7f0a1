"""Commands on the PATH that record how they were called, and answer, wait or fail as they are told."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent

PROGRAM = """#!{python}
import json, os, re, sys, time
folder = {folder!r}
with open(os.path.join(folder, "calls.jsonl"), "a") as calls:
    calls.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
text = " ".join(sys.argv[1:])
rules = json.load(open(os.path.join(folder, {name!r} + ".rules")))
for number, (pattern, answers) in enumerate(rules):
    if re.search(pattern, text, re.DOTALL):
        counter = os.path.join(folder, f"{name}.{{number}}.count")
        seen = int(open(counter).read()) if os.path.exists(counter) else 0
        open(counter, "w").write(str(seen + 1))
        code, out = answers[min(seen, len(answers) - 1)]
        if code is None:
            open(os.path.join(folder, "waiting"), "w").close()
            time.sleep(60)
        print(out, end="", file=sys.stderr if code else sys.stdout)
        sys.exit(code)
with open(os.path.join(folder, "unexpected.jsonl"), "a") as calls:
    calls.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
sys.exit("stand-in: nobody told {name} what to answer to " + text)
"""

Answer = tuple[int | None, str]
DONE: Answer = (0, "")
WAITS: Answer = (None, "")
"""It makes the file `waiting` in its folder, and waits for a signal."""
ANYTHING: Mapping[str, list[Answer]] = {"": [DONE]}


@dataclasses.dataclass(frozen=True)
class StandIns:
    """A folder of such commands.

    Attributes:
        folder: Put before everything else on the PATH.
    """

    folder: Path

    def add(self, name: str, rules: Mapping[str, list[Answer]] = ANYTHING) -> None:
        """A command that answers, to arguments that match a pattern, its answers (code, output) one after the other.

        What it says when it fails goes to stderr. The last one stays. The first pattern that matches answers; what
        matches none fails, and is kept among the unexpected calls. Without rules, everything succeeds silently.
        """
        (self.folder / f"{name}.rules").write_text(json.dumps(list(rules.items())))
        self.program(name, PROGRAM.format(python=os.path.realpath(sys.executable), folder=str(self.folder), name=name))

    def program(self, name: str, text: str) -> None:
        """A command of one's own."""
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def calls(self) -> list[list[str]]:
        """Every call so far, the command's name first."""
        return self._kept("calls.jsonl")

    def unexpected(self) -> list[list[str]]:
        """Those calls to which no rule had an answer."""
        return self._kept("unexpected.jsonl")

    def _kept(self, name: str) -> list[list[str]]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def environment(self, **more: str) -> dict[str, str]:
        return os.environ | {"PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}", **more}

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A script of launch/, in a folder of its own."""
        return subprocess.run(
            ["bash", str(REPOSITORY / "launch" / script), *arguments],
            capture_output=True,
            text=True,
            env=self.environment(**environment),
            cwd=self.folder,
            timeout=120,
            check=False,
        )

    @contextlib.contextmanager
    def started(self, script: str, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
        """A script of launch/ that goes on meanwhile, in a group of its own, as a terminal's foreground is one."""
        hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        try:
            process = subprocess.Popen(
                ["bash", str(REPOSITORY / "launch" / script), *arguments],
                env=self.environment(**environment),
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        finally:
            signal.signal(signal.SIGHUP, hangup)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(path: Path) -> None:
    """Waits until there is such a file."""
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not come"
        time.sleep(0.01)

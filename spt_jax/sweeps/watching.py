"""A sweep as it goes: a live table on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from spt_jax.sweeps.leases import Lease
from spt_jax.sweeps.outages import STORAGE_ERRORS, Patience
from spt_jax.sweeps.worker import ERROR

_SECONDS = 1.0
_MOST_ROWS = 30


def watch(
    read: Callable[[], tuple[Sequence[FrozenTrial], Mapping[int, Lease]]],
    going: Callable[[], bool],
    names: Sequence[str],
    metric: str,
) -> None:
    """Shows a sweep until every trial has ended, or nothing goes on any more; bears a storage that is away.

    Args:
        read: The sweep's trials and leases, from the storage.
        going: Whether to look again.
        names: The options that vary.
        metric: The objective's.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:

            def draw(trials: Sequence[FrozenTrial], leases: Mapping[int, Lease]) -> None:
                live.update(table(trials, leases, names, metric), refresh=True)

            _poll(read, going, draw, console)
        return
    shown: dict[int, str] = {}

    def lines(trials: Sequence[FrozenTrial], leases: Mapping[int, Lease]) -> None:
        for trial in trials:
            state = _state(trial, leases)
            if state != shown.get(trial.number, "waiting"):
                value = "" if trial.state != TrialState.COMPLETE else f" {metric} {trial.value:.6g}"
                console.print(f"trial {trial.number}: {state}{value}", markup=False, highlight=False, soft_wrap=True)
            shown[trial.number] = state

    _poll(read, going, lines, console)


def _poll(
    read: Callable[[], tuple[Sequence[FrozenTrial], Mapping[int, Lease]]],
    going: Callable[[], bool],
    show: Callable[[Sequence[FrozenTrial], Mapping[int, Lease]], None],
    console: Console,
) -> None:
    patience = Patience(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
    while True:
        more = going()
        try:
            trials, leases = read()
        except STORAGE_ERRORS as error:
            if not more or not patience.bears(error):
                raise
        else:
            patience.answered()
            show(trials, leases)
            if not more or all(trial.state.is_finished() for trial in trials):
                return
        time.sleep(_SECONDS)


def table(trials: Sequence[FrozenTrial], leases: Mapping[int, Lease], names: Sequence[str], metric: str) -> Table:
    """The trials that go on and those that ended last, with how many there are of each state above.

    Args:
        trials: All of the sweep.
        leases: By trial.
        names: The options that vary, a column each.
        metric: The objective's; a trial that goes on shows its latest value and step.
    """
    states = [_state(trial, leases) for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    # What a run says may look like rich's markup.
    drawn = Table(title=escape(f"{len(trials)} trials: {counts}"), title_justify="left")
    for column in ("trial", "state", *names, metric, "step"):
        drawn.add_column(column, justify="left" if column == "state" else "right", overflow="fold")
    begun = [(trial, state) for trial, state in zip(trials, states, strict=True) if state != "waiting"]
    for trial, state in begun[-_MOST_ROWS:]:
        steps = trial.intermediate_values
        last = max(steps) if steps else None
        value = trial.value if trial.state == TrialState.COMPLETE else None if last is None else steps[last]
        row = [str(trial.number), state, *(_short(trial.params.get(name)) for name in names)]
        drawn.add_row(*map(escape, [*row, _short(value), "" if last is None else str(last)]))
    return drawn


def _state(trial: FrozenTrial, leases: Mapping[int, Lease]) -> str:
    if trial.state == TrialState.RUNNING:
        lease = leases.get(trial.number)
        if lease is not None and lease.seconds > 0:
            return "running"
        return f"failed once: {trial.user_attrs[ERROR]}" if ERROR in trial.user_attrs else "interrupted"
    if trial.state == TrialState.FAIL:
        return f"failed: {trial.user_attrs.get(ERROR, 'no reason was kept')}"
    return trial.state.name.lower()


def _short(value: object) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)

"""Nothing is lost but the steps since the last save, whatever signal comes whenever."""

from __future__ import annotations

import signal

import pytest
from campaign import SIGNALS, Report
from phases import PHASES

pytestmark = pytest.mark.first_python


@pytest.mark.parametrize("faults", [10, pytest.param(200, marks=pytest.mark.campaign)])
def test_runs_that_are_killed_stopped_and_woken_at_random_end_as_the_undisturbed_one(undisturbed, tmp_path, faults):
    report = undisturbed.run(tmp_path, faults, seed=faults)
    assert report.faults == faults
    if faults >= 200:
        assert all(report.hits[phase, signal.SIGKILL.name] for phase in PHASES), report.to_markdown()
        assert report.unfinished_saves and report.stopped_and_saved and report.jumping_clocks
        assert all(sum(report.hits[phase, s.name] for phase in PHASES) for s in SIGNALS)


def test_a_report_counts_what_hit():
    report = Report(seed=3, runs=2)
    report.hits.update({("save", "SIGKILL"): 2, ("step", "SIGSTOP"): 1})
    assert report.to_dict()["faults"] == 3
    table = report.to_markdown().splitlines()
    assert "| save | 2 | 0 | 0 |" in table
    assert "| step | 0 | 0 | 1 |" in table
    assert "3 faults in 2 runs" in table[-1]

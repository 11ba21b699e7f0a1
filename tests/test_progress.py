"""The bar in a log file: a line at the start, at the end, and every ten seconds between."""

from __future__ import annotations

import re

import pytest

from spt_jax import progress
from spt_jax.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(capsys) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_log_file_gets_a_line_every_ten_seconds(clock, capsys):
    with ProgressBar("training", 100) as bar:
        for step in range(1, 41):
            clock[0] += 1.0
            bar.advance(1, f"loss {step}")
    assert lines(capsys) == [
        "training 0/100",
        "training 10/100 · loss 10 · 1:30 left",
        "training 20/100 · loss 20 · 1:20 left",
        "training 30/100 · loss 30 · 1:10 left",
        "training 40/100 · loss 40 · 1:00 left",
    ]


def test_time_left_counts_from_where_a_resumed_run_began(clock, capsys):
    with ProgressBar("training", 100, start=50) as bar:
        clock[0] += 20.0
        bar.advance(10)
    assert lines(capsys) == ["training 50/100", "training 60/100 · 1:20 left"]


def test_what_an_earlier_start_has_done_does_not_make_the_rest_look_near(clock, capsys):
    with ProgressBar("replying", 2000) as bar:
        bar.skip(1900)
        clock[0] += 10.5
        bar.advance(16)
    assert lines(capsys) == ["replying 0/2000", "replying 1916/2000 · 0:55 left"]


def test_all_that_was_done_before_is_told(clock, capsys):
    with ProgressBar("replying", 20) as bar:
        bar.skip(20)
    assert lines(capsys) == ["replying 0/20", "replying 20/20"]


def test_the_last_line_shows_all_done(clock, capsys):
    with ProgressBar("scoring", 3) as bar:
        clock[0] += 1.0
        bar.advance(3)
    assert lines(capsys) == ["scoring 0/3", "scoring 3/3"]


def test_what_was_done_since_the_last_line_is_told_at_the_end(clock, capsys):
    with ProgressBar("training", 100) as bar:
        for seconds in (10.0, 1.0):
            clock[0] += seconds
            bar.advance(1)
    assert [line.split(" · ")[0] for line in lines(capsys)] == ["training 0/100", "training 1/100", "training 2/100"]


def test_a_bar_that_never_moved_says_nothing_at_its_end(clock, capsys):
    with ProgressBar("training", 5, start=5):
        pass
    assert lines(capsys) == ["training 5/5"]


def test_a_note_stays_until_another_comes(clock, capsys):
    with ProgressBar("training", 5) as bar:
        bar.advance(1, "loss 2")
        bar.advance(1)
    assert lines(capsys)[-1].startswith("training 2/5 · loss 2")


def test_messages_are_lines_of_their_own_and_keep_their_brackets(capsys):
    with ProgressBar("training", 5) as bar:
        bar.message("[bold] step 3: perplexity 12.5 [/bold] " + "x" * 200)
    text = "".join(lines(capsys))
    assert "[bold] step 3: perplexity 12.5 [/bold]" in text
    assert re.search("x{200}$", text.replace("\n", ""))


def test_a_terminal_gets_a_live_bar(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar("training", 4, start=1) as bar:
        bar.skip(1)
        bar.advance(2, "loss 1.5")
        bar.message("step 4: done")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "4/4" in captured.err
    assert "loss 1.5" in captured.err
    assert "step 4: done" in captured.err

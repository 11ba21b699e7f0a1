"""The tests' reading of what several processes say, without what Gloo's threads write into it."""

from __future__ import annotations

import random

import pytest
from several_processes import Job

WORDS = ("[Gloo] Rank ", "0", " is connected to ", "11", " peer ranks. ")
WORDS += ("Expected number of connected peer ranks is : ", "11", "\n")
GREETING = "".join(WORDS)


def said(out: str, err: str = "") -> str:
    job = Job([])
    job.out, job.err = [out], [err]
    return job.said(0)


@pytest.mark.parametrize(
    "text", ["", "step 3 of 20", "7", "Traceback (most recent call last)", "Rank 1 of 2 was lost", "a\n\n1\n\nb"]
)
def test_greetings_go_and_nothing_else_does(text):
    assert said(f"{text}\n") == text
    assert said(GREETING, f"{text}\n") == text
    assert said(f"{text}\n{GREETING}{GREETING}") == text


def test_greetings_that_threads_wrote_into_one_another_go():
    draw = random.Random(0)
    mixed = 0
    for _ in range(500):
        queues = [list(WORDS), list(WORDS)]
        written = ""
        while any(queues):
            written += draw.choice([queue for queue in queues if queue]).pop(0)
        mixed += written != 2 * GREETING
        assert said(written, "step 3 of 20\n") == "step 3 of 20", written
    assert mixed > 400

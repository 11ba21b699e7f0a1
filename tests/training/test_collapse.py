"""A retriever that settles on one prompt is told once."""

from __future__ import annotations

import pytest

from spt_jax.training.collapse import CollapseAlarm


def usage(*shares: float) -> dict[str, float]:
    return {f"development/usage/{k}": share for k, share in enumerate(shares)} | {"development/perplexity": 9.0}


def test_the_alarm_names_the_prompt_that_is_left():
    assert CollapseAlarm().sentence(usage(0.02, 0.01, 0.97)) == (
        "prompt 2 answers 97% of the development turns, so the retriever hardly uses the other 2; "
        "objective.balance_weight keeps them in use"
    )


@pytest.mark.parametrize("shares", [(), (1.0,), (0.5, 0.5), (0.94, 0.06)])
def test_there_is_no_alarm_without_a_collapse(shares):
    assert CollapseAlarm().sentence(usage(*shares)) == ""


def test_the_alarm_sounds_again_only_after_a_recovery():
    alarm = CollapseAlarm()
    sounded = [bool(alarm.sentence(usage(share, 1 - share))) for share in (0.99, 1.0, 0.0, 0.5, 0.98, 0.99)]
    assert sounded == [True, False, False, False, True, False]

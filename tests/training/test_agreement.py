"""Which options processes that train as one must share."""

from __future__ import annotations

import jax
import pytest

from spt_jax.config import default_config, set_option
from spt_jax.errors import UserError
from spt_jax.training import agreement

FIRST = default_config()


@pytest.mark.parametrize("name", ["data.test_dialogues", "data.development_dialogues", "bank.prompt_length", "seed"])
def test_an_option_that_differs_is_named(monkeypatch, name):
    with pytest.raises(UserError) as told:
        ask_beside_the_first(monkeypatch, {name: 7})
    value = agreement.flatten(FIRST)[name]
    assert f"differs from what the first was given: {name} ({value} there, 7 here)" in str(told.value)


@pytest.mark.parametrize("name", [*agreement.PLACES, "tracking.project"])
def test_files_may_lie_elsewhere_and_metrics_go_elsewhere(monkeypatch, name):
    ask_beside_the_first(monkeypatch, {name: "elsewhere"})


def ask_beside_the_first(monkeypatch, changes) -> None:
    """What a second process asks whose options are the defaults with `changes`."""
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement, "json_told_by_lead", lambda mine: told.append(mine) or told[0])
    agreement.check_same_options(FIRST)
    own = default_config()
    for name, value in changes.items():
        set_option(own, name, value)
    agreement.check_same_options(own)

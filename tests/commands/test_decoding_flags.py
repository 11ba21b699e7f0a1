"""Flags of decoding beside a run's own options: what does not go with a flag is set aside, what was given is not."""

from __future__ import annotations

import pytest
from absl import flags

from spt_jax.commands.decoding_flags import define_decoding_flags, given_decoding
from spt_jax.config import default_config
from spt_jax.errors import UserError
from spt_jax.generation.decoding import Decoding


def decoded(run: dict, *arguments: str, samples: bool = False) -> Decoding:
    """How a door decodes for a run with some options when it is given some flags."""
    values = flags.FlagValues()
    define_decoding_flags(values, samples=samples)
    values(["door", *arguments])
    section = default_config().generation
    section.update(run)
    return Decoding.of(section, **given_decoding(values))


def test_beams_serve_a_run_that_draws():
    run = {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "no_repeat_ngram": 4}
    assert decoded(run, "--beams=10") == Decoding(beams=10, no_repeat_ngram=4)


def test_a_temperature_serves_a_run_that_searches():
    assert decoded({"beams": 10, "min_new_tokens": 3}, "--temperature=0.5", "--top_k=5") == Decoding(
        temperature=0.5, top_k=5, min_new_tokens=3
    )


def test_temperature_0_serves_a_run_that_cuts_its_draws():
    run = {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.5}
    assert decoded(run, "--temperature=0") == Decoding()
    assert decoded({"beams": 4}, "--temperature=0") == Decoding(beams=4)


def test_a_door_of_one_reply_asks_for_one_whatever_the_run_does():
    run = {"beams": 10, "samples": 10}
    assert decoded(run, "--beams=4") == Decoding(beams=4)
    assert decoded(run) == Decoding(beams=10)
    assert decoded(run, samples=True) == Decoding(beams=10, samples=10)


@pytest.mark.parametrize("arguments", [("--beams=4", "--temperature=0.5"), ("--temperature=0", "--top_k=5")])
def test_flags_that_do_not_go_together_are_refused(arguments):
    with pytest.raises(UserError):
        decoded({}, *arguments)

from __future__ import annotations

import dataclasses

import pytest

from spt_jax.config import default_config, validate
from spt_jax.errors import UserError
from spt_jax.generation.decoding import Decoding


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": -0.5}, "temperature is -0.5; allowed: 0, or 1e-30 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 1.0, "min_p": 1.5}, "min_p is 1.5"),
        ({"temperature": 1.0, "typical_p": 0.0}, "typical_p is 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; allowed: more than 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram is -1"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"stop": ("",)}, "stop is .*; allowed: texts, none empty"),
        ({"beams": 0}, "beams is 0"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"early_stopping": "soon"}, "early_stopping is 'soon'; allowed: one of false, true, never"),
        ({"samples": 0}, "samples is 0"),
        ({"top_k": 5}, "top_k would cut a draw, but temperature is 0"),
        ({"top_p": 0.5, "min_p": 0.1}, "top_p and min_p would cut"),
        ({"beams": 3, "temperature": 0.7}, "beams is 3 and temperature 0.7; a beam search draws nothing"),
        ({"samples": 3}, "samples is 3; allowed with temperature 0: up to beams .1."),
    ],
)
def test_values_that_are_not_allowed_are_named_here_and_in_a_config(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Decoding(**options)
    config = default_config()
    config.generation.update(options)
    with pytest.raises(UserError, match="generation"):
        validate(config)


def test_the_defaults_of_a_config_are_the_defaults_and_greedy():
    assert Decoding.of(default_config().generation) == Decoding()
    assert Decoding().rule([2]) == Decoding(early_stopping=False, stop=("x",)).rule([2])
    assert not Decoding().draws


def test_a_config_has_an_option_for_every_field_and_flags_override_it():
    config = default_config()
    assert set(config.generation) == {field.name for field in dataclasses.fields(Decoding)}
    config.generation.update({"beams": 10, "no_repeat_ngram": 4, "stop": ["bye"]})
    assert Decoding.of(config.generation, beams=2) == Decoding(beams=2, no_repeat_ngram=4, stop=("bye",))


def test_true_and_false_serve_as_words():
    assert Decoding(early_stopping=True) == Decoding(early_stopping="true")
    assert Decoding(early_stopping=False).early_stopping == "false"


def test_more_tokens_at_least_than_at_most_are_refused():
    config = default_config()
    config.generation.min_new_tokens = 33
    with pytest.raises(
        UserError, match=r"generation.min_new_tokens is 33; allowed: up to evaluation.max_new_tokens .32"
    ):
        validate(config)

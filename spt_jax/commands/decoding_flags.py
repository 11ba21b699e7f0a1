"""The flags of decoding, the same at every door: each overrides the run's option of the same name."""

from __future__ import annotations

import dataclasses
from typing import Any

from absl import flags

from spt_jax.config_rules import CUTS, RULES
from spt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Option:
    kind: str
    help: str


_OPTIONS = {
    "temperature": _Option("float", "Sampling temperature; 0 is greedy decoding, or beam search with --beams."),
    "top_k": _Option("integer", "Sample among the k most likely tokens; 0 keeps all."),
    "top_p": _Option("float", "Sample from the smallest head of this probability; 1 keeps all."),
    "min_p": _Option("float", "Sample among tokens at least so many times as likely as the likeliest; 0 keeps all."),
    "typical_p": _Option("float", "Sample from the most typical tokens of this probability; 1 keeps all."),
    "repetition_penalty": _Option("float", "Above 1: tokens generated before become less likely (CTRL's penalty)."),
    "presence_penalty": _Option("float", "Above 0: is taken from the logits of tokens generated before."),
    "no_repeat_ngram": _Option("integer", "No n-gram of this length is generated twice; 0 for no such rule."),
    "min_new_tokens": _Option("integer", "Tokens before which no end of sequence may end a reply."),
    "stop": _Option("multi_string", "A text that ends a reply, which does not contain it; repeat for more."),
    "beams": _Option("integer", "Width of beam search; 1 for none. The paper's chats: 10, with --no_repeat_ngram=4."),
    "length_penalty": _Option("float", "A beam's score is its log-probability / length ** length_penalty."),
    "early_stopping": _Option("string", "When a beam search ends, as in transformers: false, true or never."),
    "samples": _Option("integer", "Replies to each context; with --beams the best so many."),
}


def define_decoding_flags(flag_values: flags.FlagValues, *, samples: bool = False) -> None:
    """Adds a flag for every option of `spt_jax.generation.decoding.Decoding`.

    Args:
        flag_values: Takes them.
        samples: Whether the door can show several replies to one context.
    """
    for name, option in _OPTIONS.items():
        if samples or name != "samples":
            text = f"{option.help} Else the run's generation.{name}."
            getattr(flags, f"DEFINE_{option.kind}")(name, None, text, flag_values=flag_values)


def given_decoding(flag_values: flags.FlagValues) -> dict[str, Any]:
    """The options that were given as flags, and those of the run that do not go with them, set to do nothing.

    So ``--beams`` serves a run that draws, and ``--temperature`` one that searches; and a door that shows one reply to
    a context asks for one.

    Raises:
        UserError: A value is outside its range.
    """
    given: dict[str, Any] = {
        name: flag_values[name].value
        for name in _OPTIONS
        if name in flag_values and flag_values[name].value is not None
    }
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    for name, value in given.items():
        rule = RULES[f"generation.{name}"]
        if not rule.holds(value):
            raise UserError(f"--{name} is {value!r}; allowed: {rule.allowed}")
    aside: dict[str, Any] = {} if "samples" in flag_values else {"samples": 1}
    if given.get("beams", 1) > 1 and "temperature" not in given:
        aside["temperature"] = 0.0
    if (given | aside).get("temperature") == 0:
        aside |= CUTS
    elif given.get("temperature"):
        aside["beams"] = 1
    return aside | given

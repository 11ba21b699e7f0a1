"""Everything a user may ask of decoding, as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.config_rules import RULES, decoding_relations
from spt_jax.errors import UserError
from spt_jax.generation.processors import MinNewTokens, NoRepeatNgram, PresencePenalty, Processor, RepetitionPenalty
from spt_jax.generation.sampling import Rule
from spt_jax.generation.warpers import MinP, Temperature, TopK, TopP, Typical, Warper


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; how many at most, is said where they are asked for.

    Greedy by default; a draw with a `temperature`, beam search with `beams`. The order is transformers': repetition,
    presence, n-grams, length; then temperature, top-k, top-p, min-p, typical.

    Attributes:
        temperature: 0 takes the most likely token; above 0 draws from ``softmax(logits / temperature)``.
        top_k: Draw among the k most likely tokens; 0 for all.
        top_p: Draw from the smallest head of this probability; 1 for all.
        min_p: Draw among tokens at least so many times as likely as the likeliest; 0 for all.
        typical_p: Draw from the most typical tokens of this probability; 1 for all.
        repetition_penalty: Divides positive logits of tokens generated before, multiplies negative ones; 1 for none.
        presence_penalty: Is taken from the logits of tokens generated before; 0 for none.
        no_repeat_ngram: No n-gram of this length is generated twice; 0 for no such rule.
        min_new_tokens: No row ends by an end-of-sequence token before so many tokens.
        stop: Texts that end a reply, which does not contain them; with beams, a hypothesis, as an end of sequence does.
        beams: Width of beam search; 1 for none.
        length_penalty: A finished beam's score is its log-probability / length ** length_penalty, its end of sequence
            counted: above 0 favours long replies.
        early_stopping: When a search ends, as in transformers: "true", when there are as many finished beams as
            `beams`; "false", when no running beam would better them at its present length; "never", at the length that
            suits it best. True and False serve as "true" and "false".
        samples: How many continuations a row gets; with beams, the best so many.

    Raises:
        UserError: A value is outside its range, or two do not go together; one sentence each.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    no_repeat_ngram: int = 0
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: str | bool = "false"
    samples: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.early_stopping, bool):
            object.__setattr__(self, "early_stopping", str(self.early_stopping).lower())
        values = dataclasses.asdict(self)
        rules = {name: RULES[f"generation.{name}"] for name in values}
        problems = [
            f"{name} is {value!r}; allowed: {rules[name].allowed}"
            for name, value in values.items()
            if not rules[name].holds(value)
        ]
        problems = problems or decoding_relations(values)
        if problems:
            raise UserError("\n".join(problems))

    @classmethod
    def of(cls, section: Mapping[str, Any], **given: Any) -> Decoding:
        """The options of a config's section ``generation``, where `given` does not say otherwise.

        Raises:
            UserError: As the class.
        """
        values: dict[str, Any] = {field.name: section[field.name] for field in dataclasses.fields(cls)} | given
        values["stop"] = tuple(values["stop"])
        return cls(**values)

    @property
    def draws(self) -> bool:
        """Whether a reply depends on its seed."""
        return self.temperature > 0

    def rule(self, eos_ids: Sequence[int], vocab_size: int | None = None) -> Rule:
        """What chooses tokens; of beam search, what makes its log-probabilities.

        Args:
            eos_ids: What ends a row.
            vocab_size: How many leading tokens may be chosen; None for all.
        """
        processors: list[Processor] = []
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenalty(self.repetition_penalty))
        if self.presence_penalty:
            processors.append(PresencePenalty(self.presence_penalty))
        if self.no_repeat_ngram:
            processors.append(NoRepeatNgram(self.no_repeat_ngram))
        if self.min_new_tokens and eos_ids:
            processors.append(MinNewTokens(self.min_new_tokens, tuple(eos_ids)))
        warpers: list[Warper] = []
        if self.draws and self.temperature != 1:
            warpers.append(Temperature(self.temperature))
        if self.top_k:
            warpers.append(TopK(self.top_k))
        if self.top_p < 1:
            warpers.append(TopP(self.top_p))
        if self.min_p:
            warpers.append(MinP(self.min_p))
        if self.typical_p < 1:
            warpers.append(Typical(self.typical_p))
        return Rule(tuple(processors), tuple(warpers), self.draws, vocab_size)

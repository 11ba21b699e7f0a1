"""How much of a persona a reply takes up, by words: recall, precision and F1 of content words.

The knowledge R/P/F1 of Lian et al. (arXiv 1902.04911), with the persona as the knowledge: W_Y and W_K are the sets of
words that are no stop words in reply and persona; recall = |W_Y ∩ W_K| / |W_K|, precision = |W_Y ∩ W_K| / |W_Y|.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from spt_jax.evaluation.normalised import normalise

_STOP_WORDS = (
    # Articles, pronouns and determiners.
    "a an the i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she "
    "her hers herself it its itself they them their theirs themselves this that these those who whom whose which what "
    "one some any each every either neither both all such other another same own "
    # Forms of be, have and do, and auxiliaries.
    "am is are was were be been being have has had having do does did doing done can could will would shall should "
    "may might must ought "
    # Prepositions, conjunctions and adverbs of grammar.
    "of at by for with about against between into through during before after above below to from up down in out on "
    "off over under and but or nor if because as until while than so then once not no only very too just also here "
    "there when where why how again further more most few "
    # Words of conversation that say nothing about a person.
    "yes yeah yep no nope oh ah hi hello hey ok okay well lol please thanks thank really "
    # What is left of contractions when punctuation is a space: i'm, don't, you'll, i've, they're, i'd, isn't.
    "s t m d ll ve re don didn doesn isn aren wasn weren won wouldn couldn shouldn hasn haven hadn ain mustn needn "
    # The same without an apostrophe.
    "im ive id ill youre youve dont didnt doesnt isnt arent wasnt cant wont couldnt wouldnt thats whats lets"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""English words without content of their own, lower case."""


class PersonaWords(NamedTuple):
    """Of one reply, fractions; 0 where nothing is shared, so where either side has no content word.

    Attributes:
      recall: Share of the persona's content words that the reply uses.
      precision: Share of the reply's content words that are the persona's.
      f1: Their harmonic mean.
    """

    recall: float
    precision: float
    f1: float


def content_words(text: str) -> frozenset[str]:
    """The words of a text that are not in `STOP_WORDS`, after ParlAI's normalisation (lower case, no punctuation)."""
    return frozenset(normalise(text).split()) - STOP_WORDS


def persona_words(reply: str, persona: Sequence[str]) -> PersonaWords:
    """Recall, precision and F1 of a persona's content words in a reply (arXiv 1902.04911), as fractions.

    Args:
      reply: The reply.
      persona: The persona's lines, all of them together.
    """
    said, known = content_words(reply), content_words(" ".join(persona))
    common = len(said & known)
    if not common:
        return PersonaWords(0.0, 0.0, 0.0)
    return PersonaWords(common / len(known), common / len(said), 2.0 * common / (len(known) + len(said)))

"""What the text of a row is, as a value: a `Template`; and the paper's own, `PlainTemplate`.

The paper's text is `given persona: …; context: Q: u1 R: r1 … Q: ut R: rt`; its inference prompt ends with `R:`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from spt_jax.data.dialogue import Dialogue
from spt_jax.errors import UserError

QUERY_MARK = "Q:"
RESPONSE_MARK = "R:"
# A marker counts only where a word could start, so that "FAQ:" or "HR:" inside a reply survives.
_REPLY_END = re.compile(r"(?<!\w)(?:R|Q|Summary):|\n")


class TextEncoder(Protocol):
    """Text to token ids, without any special token; the ids that frame a row (`bos_id` None: rows have none)."""

    @property
    def bos_id(self) -> int | None:
        """First token of a row."""
        ...

    @property
    def eos_id(self) -> int:
        """Last target of every response."""
        ...

    @property
    def pad_id(self) -> int:
        """Fills rows up to their bucket's length; any id, it is masked."""
        ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of every text, nothing added in front or behind."""
        ...


class DialogueTooLongError(UserError):
    """The persona and the last query (in training, with the response) do not fit into the limit of tokens."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a template writes a context from.

    Attributes:
      persona: the persona's lines.
      history: alternating utterances, oldest first, of which the last is the partner's; an even number of them begins
        with the persona's own words. (`PersonaTemplate.encode_contexts`: the last is the persona's.)
      shots: how many demonstrations stand in front, where the template has any.
    """

    persona: Sequence[str]
    history: Sequence[str]
    shots: int = 0


@dataclass(frozen=True, slots=True)
class EncodedTurn:
    """Token ids of one turn.

    Attributes:
      tokens: the context, bos first, then what is learned, without the token that ends it.
      length: how many of them are the context.
      end_id: the last target: what ends a turn.
      whole: context and response were encoded as one text; if not, their tokens would have merged.
    """

    tokens: list[int]
    length: int
    end_id: int
    whole: bool


class Template(Protocol):
    """How a persona and a conversation become the tokens of a row; a frozen value, the same for all rows of a run."""

    @property
    def demonstrations(self) -> int:
        """Dialogues shown in front of a context; the first to go when a row is too long."""
        ...

    @property
    def learns_persona(self) -> bool:
        """Whether the persona is learned, from the whole dialogue (one turn a dialogue), instead of responses."""
        ...

    def encode_contexts(self, encoder: TextEncoder, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The token ids of inference prompts, bos first."""
        ...

    def encode_turns(
        self, encoder: TextEncoder, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> list[EncodedTurn]:
        """The token ids of turns; `responses[i]` answers `prompts[i]`."""
        ...

    def end_id(self, encoder: TextEncoder) -> int:
        """The token that ends every turn, for generation to stop at."""
        ...

    def cut(self, text: str) -> str:
        """The reply in a generated text; idempotent."""
        ...


def context_text(persona: Sequence[str], history: Sequence[str]) -> str:
    """The inference prompt's text, from `given persona:` through the last `R:`.

    Args:
      persona: the persona's lines.
      history: alternating utterances, oldest first, of which the last is the partner's; an even number of them begins
        with the persona's own words.

    Raises:
      UserError: `history` is empty.
    """
    return f"given persona: {' '.join(persona)}; context: {said_text(history)} {RESPONSE_MARK}"


def said_text(history: Sequence[str], last_mark: str = QUERY_MARK) -> str:
    """`Q: u1 R: r1 …`: the utterances with their marks, of which the last is `last_mark`.

    Raises:
      UserError: `history` is empty.
    """
    if not history:
        raise UserError("The history is empty; it must end with the partner's utterance.")
    marks = (QUERY_MARK, RESPONSE_MARK) if last_mark == QUERY_MARK else (RESPONSE_MARK, QUERY_MARK)
    return " ".join(f"{marks[(len(history) - 1 - i) % 2]} {utterance}" for i, utterance in enumerate(history))


def response_text(context: str, response: str) -> str:
    """A context with the response behind its last `R:`; without the end of sequence."""
    return f"{context} {response}"


def turn_history(dialogue: Dialogue, turn: int, start: int = 0) -> list[str]:
    """The utterances of `dialogue` from turn `start` up to the query of turn `turn` (both 0-based)."""
    history = []
    for earlier in dialogue.turns[start:turn]:
        history += [earlier.query, earlier.response]
    return [*history, dialogue.turns[turn].query]


@dataclass(frozen=True)
class PlainTemplate:
    """The paper's text (`context_text`); a turn ends with the end of sequence."""

    demonstrations = 0
    learns_persona = False

    def encode_contexts(self, encoder: TextEncoder, prompts: Sequence[Prompt]) -> list[list[int]]:
        """See `Template.encode_contexts`."""
        return encode_texts(encoder, [context_text(prompt.persona, prompt.history) for prompt in prompts])

    def encode_turns(
        self, encoder: TextEncoder, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> list[EncodedTurn]:
        """See `Template.encode_turns`."""
        contexts = [context_text(prompt.persona, prompt.history) for prompt in prompts]
        return encode_continued(encoder, contexts, responses)

    def end_id(self, encoder: TextEncoder) -> int:
        """The end of sequence."""
        return encoder.eos_id

    def cut(self, text: str) -> str:
        """Everything before the first `R:`, `Q:`, `Summary:` or line break, stripped."""
        return _REPLY_END.split(text, maxsplit=1)[0].strip()


def encode_texts(encoder: TextEncoder, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of whole texts, bos first."""
    bos = [] if encoder.bos_id is None else [encoder.bos_id]
    return [bos + ids for ids in encoder.encode(texts)]


def encode_continued(encoder: TextEncoder, contexts: Sequence[str], continuations: Sequence[str]) -> list[EncodedTurn]:
    """Turns whose context is a text and whose response follows behind a space; bos in front, eos ends them."""
    bos = [] if encoder.bos_id is None else [encoder.bos_id]
    behind = [response_text("", continuation) for continuation in continuations]
    return join_turns(encoder.encode, contexts, behind, bos=bos, end_id=encoder.eos_id)


_Text = TypeVar("_Text", str, list[str | int])
"""A text, or its parts (text, or the id of a special token); either way `a + b` is a followed by b."""


def join_turns(
    encode: Callable[[Sequence[_Text]], list[list[int]]],
    contexts: Sequence[_Text],
    responses: Sequence[_Text],
    *,
    bos: list[int],
    end_id: int,
) -> list[EncodedTurn]:
    """Encodes each context with its response as one text; apart where their tokens would merge.

    Args:
      encode: texts to token ids.
      contexts: what stands in front.
      responses: what is learned, with the spaces that part it from its context.
      bos: ids in front of every row.
      end_id: last target.
    """
    texts: list[_Text] = []
    for context, response in zip(contexts, responses, strict=True):
        texts += [context, context + response]
    encoded = encode(texts)
    pairs = [(encoded[2 * i], encoded[2 * i + 1]) for i in range(len(contexts))]
    merged = [i for i, (context, full) in enumerate(pairs) if full[: len(context)] != context]
    apart = dict(zip(merged, encode([responses[i] for i in merged]), strict=True)) if merged else {}
    return [
        EncodedTurn(
            bos + (context + apart[i] if i in apart else full), len(bos) + len(context), end_id, whole=i not in apart
        )
        for i, (context, full) in enumerate(pairs)
    ]


def encode_context(
    encoder: TextEncoder,
    persona: Sequence[str],
    history: Sequence[str],
    *,
    max_length: int,
    place: str = "the conversation",
    template: Template | None = None,
) -> list[int]:
    """Token ids of the inference prompt, bos first, T <= `max_length`.

    When it is too long, demonstrations go first, then the oldest (query, response) pairs; persona and last query stay.

    Args:
      encoder: the LM's tokenizer.
      persona: the persona's lines.
      history: alternating utterances that end with the partner's (where the persona is learned: with its speaker's).
      max_length: limit in tokens, bos included; the soft prompt and the reply are not counted.
      place: what the error names, for example "input.jsonl:7".
      template: of the text; None for `PlainTemplate`.

    Raises:
      DialogueTooLongError: persona and last query alone are longer.
      UserError: `history` is empty, or the template refuses it.
    """
    template = template or PlainTemplate()
    # A lone utterance in front is the first to go, then whole pairs, so that what is left begins with a query.
    last = 0 if template.learns_persona else 1
    starts = [0, *(start for start in range(1, len(history)) if (len(history) - start) % 2 == last)]
    levels = [(0, shots) for shots in range(template.demonstrations, 0, -1)] + [(start, 0) for start in starts]
    for start, shots in levels:
        [tokens] = template.encode_contexts(encoder, [Prompt(persona, history[start:], shots)])
        if len(tokens) <= max_length:
            return tokens
    what = "the last exchange needs" if template.learns_persona else "persona and last query need"
    raise DialogueTooLongError(f"{place}: {what} {len(tokens)} tokens, the limit is {max_length}.")

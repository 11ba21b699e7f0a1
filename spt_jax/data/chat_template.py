"""A chat model's own way of writing a conversation: the Jinja template that its tokenizer carries."""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from spt_jax.data.template import EncodedTurn, Prompt, TextEncoder, join_turns
from spt_jax.errors import UserError

SYSTEM = (
    "You are a person in a casual conversation. Your persona: {persona} "
    "Reply as this person would, in one short message."
)
"""The system message; ``{persona}`` stands for the persona's lines, joined by a space."""

OPENING = "__SILENCE__"
"""What a partner who has said nothing yet "says", where a template cannot begin with the assistant (ParlAI's word)."""

# Some templates tell the LM today's date. Rows must not depend on the day on which they were built, so the date is
# the one that Llama 3's template falls back to; a macro shadows the function of transformers' environment.
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%B', 'July') | replace('%b', 'Jul') "
    "| replace('%m', '07') | replace('%Y', '2024') | replace('%y', '24') | replace('%A', 'Friday') }}{% endmacro %}"
)
_VARIABLES = {"date_string": "26 Jul 2024", "enable_thinking": False}
# Stands in a rendered text for a special token's spelling that somebody said; no text can hold it by chance.
_MARK = secrets.token_hex(16)
_MARKED = re.compile(rf"\[{_MARK}:(\d+)\]")

Parts = list[str | int]
"""A text with its special tokens as ids."""


class ChatEncoder(TextEncoder, Protocol):
    """What a chat template needs of a tokenizer."""

    @property
    def chat_template(self) -> str | None:
        """Its Jinja template; None where it has none."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The spelling and id of every special token."""
        ...

    def encode_with_specials(self, texts: Sequence[Sequence[str | int]]) -> list[list[int]]:
        """The ids of texts in parts: strings, and ids of special tokens."""
        ...


@dataclass(frozen=True)
class _Answer:
    """How a template writes an answer: what stands before it (beyond the generation prompt) and behind it."""

    before: str
    after: str
    strips: bool


@dataclass(frozen=True)
class ChatTemplate:
    """The LM's own template; `ChatTemplate.of` makes one from a tokenizer.

    The persona is the system message, or stands before the partner's first words where the template knows no system
    (Gemma 1 and 2). A history that begins with the persona's own words begins with the assistant where the template
    allows it, otherwise with a user who says `opening`. A context goes through the mark after which the assistant
    answers; what is learned is the response and what ends the assistant's turn: the first special token behind it
    (``<|im_end|>``), or the end of sequence where the template writes none. Special tokens, the bos among them, are
    those that the template writes, no more; the spelling of one inside a persona or an utterance stays text.

    Attributes:
      source: the Jinja template.
      bos_token: what the template's ``bos_token`` stands for; empty where rows have none.
      eos_token: what its ``eos_token`` stands for.
      system: the system message with ``{persona}`` in it.
      opening: see above.

    Raises:
      UserError: `system` lacks ``{persona}``, or the template cannot write a conversation of two.
    """

    source: str
    bos_token: str = ""
    eos_token: str = ""
    system: str = SYSTEM
    opening: str = OPENING

    demonstrations = 0
    learns_persona = False

    def __post_init__(self) -> None:
        if "{persona}" not in self.system:
            raise UserError(f"the system message {self.system!r} has no place for the persona; write {{persona}} in it")
        _ = self._answer

    @classmethod
    def of(cls, tokenizer: TextEncoder) -> ChatTemplate:
        """The template of a chat model's tokenizer, a `ChatEncoder`.

        Raises:
          UserError: The tokenizer has none, or it cannot write a conversation of two.
        """
        source = getattr(tokenizer, "chat_template", None)
        if not source:
            raise UserError(
                "data.template is 'chat', but the LM's tokenizer has no chat template; use data.template = plain"
            )
        spelled = {number: token for token, number in _chat_encoder(tokenizer).special_tokens.items()}
        bos = "" if tokenizer.bos_id is None else spelled.get(tokenizer.bos_id, "")
        return cls(source, bos, spelled.get(tokenizer.eos_id, ""))

    def encode_contexts(self, encoder: TextEncoder, prompts: Sequence[Prompt]) -> list[list[int]]:
        """See `Template.encode_contexts`; `encoder` is a `ChatEncoder`."""
        chat = _chat_encoder(encoder)
        return chat.encode_with_specials([self._context(chat, prompt) for prompt in prompts])

    def encode_turns(
        self, encoder: TextEncoder, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> list[EncodedTurn]:
        """See `Template.encode_turns`; `encoder` is a `ChatEncoder`."""
        chat = _chat_encoder(encoder)
        contexts = [self._context(chat, prompt) for prompt in prompts]
        behind, end_id = self._end(chat)
        before: Parts = [self._answer.before] if self._answer.before else []
        answers: list[Parts] = [
            [*before, response.strip() if self._answer.strips else response, *behind] for response in responses
        ]
        return join_turns(chat.encode_with_specials, contexts, answers, bos=[], end_id=end_id)

    def end_id(self, encoder: TextEncoder) -> int:
        """What ends the assistant's turn."""
        return self._end(_chat_encoder(encoder))[1]

    def cut(self, text: str) -> str:
        """The text without the spaces around it: the end of turn is a token."""
        return text.strip()

    def _context(self, encoder: ChatEncoder, prompt: Prompt) -> Parts:
        find = _finder(tuple(encoder.special_tokens))
        said: list[str] = []

        def quoted(text: str) -> str:
            """A text in which no special token's spelling is left; `said` keeps them."""

            def keep(match: re.Match[str]) -> str:
                said.append(match.group())
                return f"[{_MARK}:{len(said) - 1}]"

            return find.sub(keep, text)

        persona = quoted(" ".join(prompt.persona))
        text = self._render(self._messages(persona, [quoted(utterance) for utterance in prompt.history]), asks=True)
        return [
            _MARKED.sub(lambda match: said[int(match.group(1))], part) if isinstance(part, str) else part
            for part in _parts(encoder, text)
        ]

    def _messages(self, persona: str, history: Sequence[str]) -> list[dict[str, str]]:
        if not history:
            raise UserError("The history is empty; it must end with the partner's utterance.")
        opened = len(history) % 2 == 1
        if not opened and not self._assistant_may_begin:
            history, opened = [self.opening, *history], True
        roles = ("user", "assistant") if opened else ("assistant", "user")
        messages = [{"role": roles[i % 2], "content": utterance} for i, utterance in enumerate(history)]
        system = self.system.replace("{persona}", persona)
        if self._has_system:
            return [{"role": "system", "content": system}, *messages]
        first = messages[0 if opened else 1]
        first["content"] = f"{system}\n\n{first['content']}"
        return messages

    def _render(self, messages: Sequence[dict[str, str]], *, asks: bool) -> str:
        """The conversation's text; `asks` adds the mark after which the assistant answers."""
        try:
            # The library's environment is a sandbox: templates come from the hub and are programs.
            from transformers.utils.chat_template_utils import render_jinja_template

            source = _FIXED_DATE + self.source if "strftime_now" in self.source else self.source
            rendered, _ = render_jinja_template(
                [list(messages)],
                chat_template=source,
                add_generation_prompt=asks,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                **_VARIABLES,
            )
        except ImportError as error:
            raise UserError(f"chat templates need the package jinja2, 3.1.6 or later ({error})") from error
        except Exception as error:  # a template is a program: it may raise anything
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"the LM's chat template does not write this conversation: {reason}") from error
        return rendered[0]

    def _shows(self, roles: Sequence[str]) -> bool:
        """Whether the template writes messages of these roles, all of them and in their order."""
        messages = [{"role": role, "content": f"{_MARK}-{i}"} for i, role in enumerate(roles)]
        try:
            text = self._render(messages, asks=True)
        except UserError:
            return False
        places = [text.find(message["content"]) for message in messages]
        return -1 not in places and places == sorted(places)

    @functools.cached_property
    def _has_system(self) -> bool:
        return self._shows(["system", "user"])

    @functools.cached_property
    def _assistant_may_begin(self) -> bool:
        return self._shows([*(["system"] if self._has_system else []), "assistant", "user"])

    @functools.cached_property
    def _answer(self) -> _Answer:
        messages = self._messages("p", ["q"])
        asked = self._render(messages, asks=True)
        # Spaces around the answer show whether the template strips them.
        padded = f"\t{_MARK}\t"
        text = self._render([*messages, {"role": "assistant", "content": padded}], asks=False)
        strips = padded not in text
        before, found, after = text.partition(_MARK if strips else padded)
        if not found:
            raise UserError("the LM's chat template leaves out what the assistant says; use data.template = plain")
        if strips:  # some strip one side alone
            before, after = before.removesuffix("\t"), after.removeprefix("\t")
        return _Answer(before.removeprefix(asked) if before.startswith(asked) else "", after, strips)

    def _end(self, encoder: ChatEncoder) -> tuple[Parts, int]:
        """What stands between a response and the special token that ends its turn, and that token."""
        parts = _parts(encoder, self._answer.after)
        for place, part in enumerate(parts):
            if isinstance(part, int):
                return parts[:place], part
        return [], encoder.eos_id


def _chat_encoder(encoder: TextEncoder) -> ChatEncoder:
    if not hasattr(encoder, "encode_with_specials"):
        raise UserError(
            f"a chat template needs a tokenizer that encodes special tokens; {type(encoder).__name__} does not"
        )
    chat: Any = encoder
    return chat


@functools.lru_cache(maxsize=16)
def _finder(spellings: tuple[str, ...]) -> re.Pattern[str]:
    """Finds the spelling of a special token, of several at one place the longest."""
    longest_first = sorted(filter(None, spellings), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _parts(encoder: ChatEncoder, text: str) -> Parts:
    ids = encoder.special_tokens
    find = _finder(tuple(ids))
    parts: Parts = []
    start = 0
    for match in find.finditer(text):
        parts += [text[start : match.start()], ids[match.group()]]
        start = match.end()
    return [part for part in [*parts, text[start:]] if part != ""]

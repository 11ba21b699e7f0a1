"""A conversation as plain values, and what a typed line asks for; no terminal, no model."""

from __future__ import annotations

import dataclasses
from typing import Any

from spt_jax.commands.shown_text import typed
from spt_jax.errors import UserError, nearest

ORDERS = {
    "persona": "show the persona; /persona TEXT adds a line, /persona clear removes all",
    "clear": "start over; the persona stays (also: clear)",
    "retry": "answer the last message again (also: r)",
    "why": "show what every prompt would have said to the last message, and its score; /why 2 to the second",
    "save": "write the conversation as JSON; /save FILE names the file (also: save)",
    "help": "show this list",
    "exit": "leave (also: exit, Ctrl-D)",
}
"""What may follow a slash, and what it does."""

# The authors' program knows these words, alone on a line; inside a sentence they are ordinary speech.
_BARE_WORDS = {"clear": "clear", "r": "retry", "save": "save", "exit": "exit"}
_WITH_ARGUMENT = ("persona", "save", "why")


@dataclasses.dataclass(frozen=True)
class Order:
    """Something the user asks of the program.

    Attributes:
        name: One of `ORDERS`, or ``"say"`` for a message to the persona.
        argument: What follows the name; for ``"say"`` the message.
    """

    name: str
    argument: str = ""


def read_order(line: str) -> Order:
    """What a typed line means.

    Raises:
        UserError: If it begins with a slash and is no known command, or a command that takes nothing gets something.
    """
    line = typed(line).strip()
    if line in _BARE_WORDS:
        return Order(_BARE_WORDS[line])
    if not line.startswith("/"):
        return Order("say", line)
    name, _, argument = line[1:].partition(" ")
    if name not in ORDERS:
        hint = nearest(f"/{name}", [f"/{order}" for order in ORDERS])
        raise UserError(f"There is no command /{name}; /help lists them.{hint}")
    if argument.strip() and name not in _WITH_ARGUMENT:
        raise UserError(f"/{name} takes nothing after it, but got {argument.strip()!r}.")
    return Order(name, argument.strip())


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One message and its reply.

    Attributes:
        message: What the user said.
        reply: What the persona said; may be empty.
        prompt: The soft prompt that answered.
        scores: The retriever's K scores.
        seed: The seed of the draws.
        persona: The lines it was said under.
        decoding: How its tokens were chosen, a `spt_jax.generation.decoding.Decoding`.
    """

    message: str
    reply: str
    prompt: int
    scores: tuple[float, ...]
    seed: int = 0
    persona: tuple[str, ...] = ()
    decoding: Any = None


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A persona and the exchanges so far; every change gives a new value.

    Attributes:
        persona: The persona's lines.
        exchanges: Oldest first.
    """

    persona: tuple[str, ...] = ()
    exchanges: tuple[Exchange, ...] = ()

    def history(self, message: str) -> list[str]:
        """Alternating utterances that end with `message`; an exchange whose reply is empty never happened."""
        spoken = [exchange for exchange in self.exchanges if exchange.reply]
        return [utterance for exchange in spoken for utterance in (exchange.message, exchange.reply)] + [message]

    def answered(self, exchange: Exchange) -> Conversation:
        """With one more exchange."""
        return dataclasses.replace(self, exchanges=(*self.exchanges, exchange))

    def taken_back(self) -> tuple[Conversation, str]:
        """Without the last exchange, and the message it answered.

        Raises:
            UserError: If there is none.
        """
        if not self.exchanges:
            raise UserError("There is no reply to retry yet; say something first.")
        return dataclasses.replace(self, exchanges=self.exchanges[:-1]), self.exchanges[-1].message

    def before(self, number: int) -> tuple[Conversation, Exchange]:
        """The conversation before its `number`-th exchange, counted from 1, under that one's persona; and it.

        Raises:
            UserError: If there is none.
        """
        if not self.exchanges:
            raise UserError("Nothing was said yet; say something first.")
        if not 1 <= number <= len(self.exchanges):
            raise UserError(f"There is no message {number}; this conversation has 1 to {len(self.exchanges)}.")
        exchange = self.exchanges[number - 1]
        return Conversation(exchange.persona, self.exchanges[: number - 1]), exchange

    def cleared(self) -> Conversation:
        """The persona alone."""
        return dataclasses.replace(self, exchanges=())

    def with_persona(self, line: str) -> Conversation:
        """With one more line of persona."""
        return dataclasses.replace(self, persona=(*self.persona, line))

    def without_persona(self) -> Conversation:
        """The exchanges alone."""
        return dataclasses.replace(self, persona=())

    def transcript(self) -> dict[str, Any]:
        """Plain values for JSON: ``persona`` and ``turns``, each turn the fields of an `Exchange`."""
        turns = [
            {**dataclasses.asdict(exchange), "scores": list(exchange.scores), "persona": list(exchange.persona)}
            for exchange in self.exchanges
        ]
        return {"persona": list(self.persona), "turns": turns}

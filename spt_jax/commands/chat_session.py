"""The conversation's loop: reads lines, obeys commands, shows replies as they are generated."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from spt_jax.atomic_file import write_atomically
from spt_jax.commands.conversation import ORDERS, Conversation, Exchange, Order, read_order
from spt_jax.commands.replying import Responder, Selection
from spt_jax.commands.shown_text import shown, shown_line
from spt_jax.errors import UserError
from spt_jax.generation.decoding import Decoding
from spt_jax.user_paths import expanded, present

LineReader = Callable[[], str]
"""Gives the next line without its end; raises EOFError when there is none."""

# What draws nothing would only repeat itself; this is mild enough to stay on topic.
_RETRY_TEMPERATURE = 0.8


def line_reader() -> LineReader:
    """A reader of the terminal, with history, arrow keys and completion of commands, or of standard input's lines."""
    if not sys.stdin.isatty():
        return _read_plain_line
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    completer = WordCompleter([f"/{name}" for name in ORDERS], sentence=True, meta_dict=_slashed(ORDERS))
    session: PromptSession[str] = PromptSession(completer=completer, complete_while_typing=True)
    return lambda: session.prompt("you> ")


def _slashed(orders: dict[str, str]) -> dict[str, str]:
    return {f"/{name}": meaning for name, meaning in orders.items()}


def _read_plain_line() -> str:
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding} text") from error
    if not line:
        raise EOFError
    return line.removeprefix("\ufeff").rstrip("\r\n")  # with which files of Windows begin


class ChatSession:
    """One conversation at a terminal.

    Args:
        responder: Replies with a run.
        conversation: Where to begin.
        console: What is written to.
        workdir: The run's, as the user named it; a transcript tells of it.
        saved_in: Where /save puts files without a name.
    """

    def __init__(
        self, responder: Responder, conversation: Conversation, console: Console, *, workdir: str, saved_in: Path
    ) -> None:
        self.conversation = conversation
        self._responder = responder
        self._console = console
        self._workdir, self._saved_in = workdir, saved_in
        self._seed = responder.settings.seed
        self._said_dropped = False
        self._saved: set[Path] = set()

    def run(self, read: LineReader) -> None:
        """Obeys lines until /exit or the end of input."""
        while True:
            try:
                line = read()
            except KeyboardInterrupt:
                self._note("Ctrl-D or /exit leaves.")
                continue
            except EOFError:
                return
            if not self.obey(line):
                return

    def obey(self, line: str) -> bool:
        """Does what one line asks for; False when it asks to leave.

        A user's mistake is told, never raised; Ctrl-C stops what is done, and the conversation stays as it was.
        """
        try:
            order = read_order(line)
            if order.name == "exit":
                return False
            self._obey(order)
        except UserError as error:
            self._note(str(error))
        except KeyboardInterrupt:
            self._note("(stopped)")
        return True

    def _obey(self, order: Order) -> None:
        if order.name == "say":
            if order.argument:
                self._answer(self.conversation, order.argument, self._responder.decoding)
        elif order.name == "retry":
            self._retry()
        elif order.name == "clear":
            self.conversation = self.conversation.cleared()
            self._said_dropped = False
            self._note("The conversation starts over; the persona stays.")
        elif order.name == "persona":
            self._change_persona(order.argument)
        elif order.name == "why":
            self._explain(order.argument)
        elif order.name == "save":
            self._save(order.argument)
        else:
            for name, meaning in ORDERS.items():
                self._note(f"/{name:<8} {meaning}")

    def _retry(self) -> None:
        conversation, message = self.conversation.taken_back()
        decoding = self._responder.decoding
        if not decoding.draws:
            kind = "Beam search" if decoding.beams > 1 else "Greedy decoding"
            decoding = dataclasses.replace(decoding, temperature=_RETRY_TEMPERATURE, beams=1)
            self._note(
                f"{kind} would repeat itself; this reply is sampled at temperature {_RETRY_TEMPERATURE} "
                "(--temperature samples all)."
            )
        self._seed += 1
        self._answer(conversation, message, decoding)

    def _answer(self, conversation: Conversation, message: str, decoding: Decoding) -> None:
        """Replies to `message` after `conversation`, which becomes the session's once a reply began."""
        tokens = self._responder.encode(conversation.persona, conversation.history(message))
        self._say_once_if_dropped(conversation, message, tokens)
        selection = self._responder.select([tokens])[0]
        stream = self._responder.stream(selection, seed=self._seed, decoding=decoding)
        self._show_selection(selection)
        pieces = iter(stream)
        try:
            with self._patience():
                piece = next(pieces, "")
            while piece:
                self._console.out(shown(piece), end="", highlight=False)
                piece = next(pieces, "")
        except KeyboardInterrupt:
            if not stream.text:
                raise
            self._console.out(" (stopped)", end="", style="dim", highlight=False)
        self._console.out("" if stream.text else "(an empty reply: /retry, or other words)", highlight=False)
        exchange = Exchange(
            message, stream.text, selection.prompt, selection.scores, self._seed, conversation.persona, decoding
        )
        self.conversation = conversation.answered(exchange)

    def _say_once_if_dropped(self, conversation: Conversation, message: str, tokens: list[int]) -> None:
        history = conversation.history(message)
        if self._said_dropped or len(history) < 3:
            return
        if tokens == self._responder.encode(conversation.persona, history[2:]):
            self._said_dropped = True
            self._note(
                "The conversation is longer than data.max_length, data.max_turns or the LM allows: from here on the "
                "oldest turns are left out."
            )

    def _show_selection(self, selection: Selection) -> None:
        scores = "  ".join(f"{index}: {score:.3f}" for index, score in enumerate(selection.scores))
        forced = " (forced)" if self._responder.settings.prompt is not None else ""
        who = f"prompt {selection.prompt}{forced} answers"
        if self._responder.mixes:
            who = f"a mixture of all prompts answers, prompt {selection.prompt} the most of it"
        self._note(f"{who}; scores {scores}")

    def _explain(self, argument: str) -> None:
        """The retriever's view of a message: each prompt's score, and what it would have said."""
        if argument and not (argument.isdecimal() and len(argument) < 10):
            raise UserError(f"/why takes the number of a message, but got {argument[:40]!r}.")
        before, exchange = self.conversation.before(int(argument) if argument else len(self.conversation.exchanges))
        tokens = self._responder.encode(before.persona, before.history(exchange.message))
        with self._patience():
            replies = self._responder.under_every_prompt(tokens, seed=exchange.seed, decoding=exchange.decoding)
        self._note(f"to {shown_line(exchange.message)!r}:")
        if self._responder.mixes:
            self._note("(what answered is a mixture of all prompts, the marked one the most of it)")
        for prompt, (score, reply) in enumerate(zip(exchange.scores, replies, strict=True)):
            mark = "*" if prompt == exchange.prompt else " "
            self._note(f"{mark} prompt {prompt}, score {score:.3f}: {shown_line(reply) or '(an empty reply)'}")

    def _patience(self) -> contextlib.AbstractContextManager[object]:
        # The first reply of a length compiles: seconds in which a terminal must not look dead.
        return self._console.status("thinking") if self._console.is_terminal else contextlib.nullcontext()

    def _change_persona(self, argument: str) -> None:
        if argument == "clear":
            self.conversation = self.conversation.without_persona()
        elif argument:
            self.conversation = self.conversation.with_persona(argument)
        self._note("persona:" if self.conversation.persona else "The persona is empty; /persona TEXT adds a line.")
        for line in self.conversation.persona:
            self._note(f"  {line}")

    def _save(self, argument: str) -> None:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        path = expanded(argument, "/save") if argument else self._saved_in / f"chat-{stamp}.json"
        path = path.absolute()
        if present(path, "/save") and path not in self._saved:
            raise UserError(f"{path} exists already; /save FILE takes another name.")
        transcript = {
            "workdir": self._workdir,
            "max_new_tokens": self._responder.max_new_tokens,
            **self.conversation.transcript(),
        }
        write_atomically(path, json.dumps(transcript, ensure_ascii=False, indent=2) + "\n")
        self._saved.add(path)
        self._note(f"Saved to {path}")

    def _note(self, text: str) -> None:
        self._console.out(text, style="dim", highlight=False)

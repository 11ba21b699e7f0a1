"""Talks with a trained run in the terminal; shows which soft prompt answers and the retriever's scores.

Commands in the conversation: /persona /clear /retry /why /save [FILE] /help /exit, and alone on a line the words clear,
r, save and exit. Where standard input is no terminal, its lines are the conversation.

Examples:
  spt-jax chat --workdir=runs/quickstart --persona="i have two dogs." --persona="i love the sea."
  spt-jax chat --workdir=runs/quickstart --temperature=0.7 --top_p=0.9 --seed=3
  spt-jax chat --workdir=runs/quickstart --beams=10 --no_repeat_ngram=4
  spt-jax chat --workdir=runs/quickstart --prompt=2
  spt-jax chat --workdir=runs/quickstart < questions.txt
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from spt_jax.commands.conversation import Conversation
from spt_jax.commands.replying import Opener, Responder, define_reply_flags, reply_settings, restored
from spt_jax.commands.shown_text import typed
from spt_jax.errors import UserError
from spt_jax.storage.bucket import is_bucket_url

# Each width of context compiles once: coarse steps keep a growing conversation from stalling at every turn.
_LENGTH_MULTIPLE = 128


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this door."""
    define_reply_flags(flag_values)
    flags.DEFINE_multi_string("persona", [], "A line of the persona; repeat for more.", flag_values=flag_values)


def run(flag_values: flags.FlagValues, opener: Opener | None = None) -> int:
    """Converses until /exit or the end of input.

    Args:
        flag_values: Parsed flags of `define_flags`.
        opener: Stands in for the function that opens a run.

    Raises:
        UserError: If a flag is wrong or the run cannot be opened.
    """
    settings = reply_settings(flag_values)
    persona = tuple(typed(line).strip() for line in flag_values.persona)
    if "" in persona:
        raise UserError("--persona is empty; give a line such as --persona='i have two dogs.', or leave it out")
    from rich.console import Console

    from spt_jax.commands.chat_session import ChatSession, line_reader

    run_ = restored(flag_values, settings, opener)
    responder = Responder(run_, settings, max_batch=1, length_multiple=_LENGTH_MULTIPLE)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    saved_in = Path() if is_bucket_url(flag_values.workdir) else Path(flag_values.workdir)
    session = ChatSession(responder, Conversation(persona), console, workdir=flag_values.workdir, saved_in=saved_in)
    if console.is_terminal:
        console.out("Say something; /help lists the commands, /exit leaves.", style="dim", highlight=False)
    session.run(line_reader())
    return 0

"""Replies to every conversation of a file of JSON lines.

A line of the input: {"persona": ["i have two dogs."], "history": ["hi, how are you?"]}, where the history alternates
and ends with the partner's utterance. A line of the output: the same fields, and "reply", "selected" (the prompt that
answered; with evaluation.selection = soft the one that weighs most in the mixture that did) and "scores" (the
retriever's, one a prompt), in the input's order. With --samples=n "replies" holds n of them, the first of which is
"reply". Where replies are drawn, a line's "seed" makes its reply the same wherever it stands; a line without one draws
by --seed and its place in the file.

Examples:
  spt-jax generate --workdir=runs/quickstart --input=contexts.jsonl --out=replies.jsonl
  spt-jax generate --workdir=runs/quickstart --input=contexts.jsonl --out=sampled.jsonl --temperature=0.7 --top_k=50
  spt-jax generate --workdir=runs/quickstart --input=contexts.jsonl --out=beams.jsonl --beams=10 --no_repeat_ngram=4
  spt-jax generate --workdir=runs/quickstart --input=contexts.jsonl --out=prompt2.jsonl --prompt=2 --batch=32
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from spt_jax.atomic_file import check_other_file, check_writable, write_atomically
from spt_jax.commands.replying import Opener, Responder, Selection, define_reply_flags, reply_settings, restored
from spt_jax.commands.requests import Request, encode_requests, read_requests
from spt_jax.errors import UserError
from spt_jax.progress import ProgressBar
from spt_jax.streams import stream_path


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this door."""
    define_reply_flags(flag_values, samples=True)
    flags.DEFINE_string("input", None, "File of JSON lines to reply to; - for standard input.", flag_values=flag_values)
    flags.DEFINE_string("out", None, "File of JSON lines to write; - for standard output.", flag_values=flag_values)
    flags.DEFINE_integer("batch", 16, "Conversations selected and generated at once.", flag_values=flag_values)


def run(flag_values: flags.FlagValues, opener: Opener | None = None) -> int:
    """Reads and checks all requests, replies, and writes all replies at once.

    Args:
        flag_values: Parsed flags of `define_flags`.
        opener: Stands in for the function that opens a run.

    Raises:
        UserError: If a flag or a line is wrong or the run cannot be opened; nothing is written then.
    """
    settings = reply_settings(flag_values)
    source, target = _paths(flag_values)
    if flag_values.batch < 1:
        raise UserError(f"--batch is {flag_values['batch'].value}; allowed: 1 or more")
    requests = read_requests(source)
    run_ = restored(flag_values, settings, opener)
    responder = Responder(run_, settings, max_batch=flag_values.batch)
    selections = _selections(responder, encode_requests(requests, responder.encode), flag_values.batch)
    replies = _replies(responder, selections, [request.seed for request in requests])
    write_atomically(target, "".join(map(_line, requests, selections, replies)))
    print(f"{len(replies)} replies in {target}", file=sys.stderr)
    return 0


def _paths(flag_values: flags.FlagValues) -> tuple[Path, Path]:
    for name, purpose in (("input", "a file of JSON lines to reply to"), ("out", "a file to write")):
        if not flag_values[name].value:
            raise UserError(f"--{name} is missing; give {purpose}")
    source, target = stream_path(flag_values.input, "stdin"), stream_path(flag_values.out, "stdout")
    check_writable(target)
    check_other_file(target, source, "input")
    return source, target


def _selections(responder: Responder, contexts: Sequence[Sequence[int]], batch: int) -> list[Selection]:
    selections: list[Selection] = []
    with ProgressBar("selecting prompts", len(contexts)) as bar:
        for start in range(0, len(contexts), batch):
            chunk = responder.select(contexts[start : start + batch])
            selections += chunk
            bar.advance(len(chunk))
    return selections


def _replies(responder: Responder, selections: Sequence[Selection], seeds: Sequence[int | None]) -> list[list[str]]:
    done = 0
    with ProgressBar("replies", len(selections)) as bar:

        def on_batch(now_done: int, _: int) -> None:
            nonlocal done
            bar.advance(now_done - done)
            done = now_done

        return responder.replies(selections, on_batch, seeds)


def _line(request: Request, selection: Selection, replies: Sequence[str]) -> str:
    several = {"replies": list(replies)} if len(replies) > 1 else {}
    answer = {"reply": replies[0], **several, "selected": selection.prompt, "scores": list(selection.scores)}
    return json.dumps({**request.fields, **answer}, ensure_ascii=False) + "\n"

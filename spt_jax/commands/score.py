"""Scores every turn of a file under every prompt, without generating anything.

Writes one JSON object a turn, in file order: {"dialogue", "turn", "target_tokens", "nll": [K], "scores": [K],
"selected"}; nll is the mean per target token in nats, scores are the retriever's.

Examples:
  spt-jax score --workdir=runs/quickstart --data=valid.txt --out=scores.jsonl
  spt-jax score --workdir=runs/quickstart --data=valid.txt --out=scores.jsonl --layout=turn
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import flags

from spt_jax.commands.data_flags import define_on_error, reading_of
from spt_jax.errors import UserError
from spt_jax.progress import ProgressBar
from spt_jax.streams import own_stream, stream_path

_REQUIRED = {
    "workdir": "the working directory of a trained run",
    "data": "a file of dialogues",
    "out": "a file for the JSON lines",
}


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of this door."""
    fv: dict[str, Any] = {"flag_values": flag_values}
    flags.DEFINE_string("workdir", None, "Working directory of a trained run.", **fv)
    flags.DEFINE_string("checkpoint", "best", "Which checkpoint: best, latest or a step's number.", **fv)
    flags.DEFINE_string("data", None, "Dialogues, in any format that data.train takes.", **fv)
    define_on_error(flag_values)
    flags.DEFINE_string("out", None, "Where the JSON lines go; - for standard output.", **fv)
    flags.DEFINE_enum("layout", None, ["dialogue", "turn"], "Rows: packed dialogues or single turns.", **fv)
    flags.DEFINE_integer("batch", None, "Rows at once; in the official mode scores depend on it.", lower_bound=1, **fv)
    flags.DEFINE_integer("limit", 0, "Score the first so many dialogues; 0 for all.", lower_bound=0, **fv)


def run(flag_values: flags.FlagValues) -> int:
    """Scores; returns the exit code.

    Raises:
        UserError: A flag is missing, there is no run or no checkpoint, or the dialogues cannot be used.
    """
    given: Any = flag_values.flag_values_dict()
    for name, wanted in _REQUIRED.items():
        if not given[name]:
            raise UserError(f"--{name} is missing; give {wanted}")
    from spt_jax.atomic_file import check_other_file, check_writable, write_atomically
    from spt_jax.commands.restored import find_run, heldout_dialogues
    from spt_jax.evaluation.likelihood import score_rows
    from spt_jax.training.experiment import pack_dialogues, pad_id_of

    out = stream_path(given["out"], "stdout")
    check_writable(out)
    check_other_file(out, Path(os.path.expanduser(given["data"])), "data")
    found = find_run(given["workdir"], given["checkpoint"])
    reading = reading_of(found.config, given)
    _, dialogues = heldout_dialogues(reading, found.workdir, given["data"], given["limit"])
    restored = found.open()
    config, lm = restored.config, restored.lm
    official = restored.experiment.model.official
    layout = given["layout"] or ("turn" if official or config.data.max_turns else "dialogue")
    rows = pack_dialogues(config, dialogues, lm.tokenizer, restored.template, layout).rows
    with ProgressBar("scoring turns", sum(len(row.turns) for row in rows)) as bar:
        likelihoods = score_rows(
            restored.experiment.model,
            lm.params,
            restored.trainable,
            rows,
            mesh=restored.experiment.mesh,
            batch_size=given["batch"] or config.evaluation.batch,
            pad_id=pad_id_of(config, lm.tokenizer),
            max_buckets=config.data.max_buckets,
            on_batch=lambda scored, _: bar.advance(len(scored)),
        )
    lines = [
        json.dumps(
            {
                "dialogue": int(likelihoods.dialogue[u]),
                "turn": int(likelihoods.turn[u]),
                "target_tokens": int(likelihoods.tokens[u]),
                "nll": likelihoods.nll[u].tolist(),
                "scores": likelihoods.scores[u].tolist(),
                "selected": int(likelihoods.selected[u]),
            }
        )
        for u in range(len(likelihoods.tokens))
    ]
    write_atomically(out, "\n".join(lines) + "\n")
    told = f"{len(lines)} turns of {len(dialogues)} dialogues: perplexity {likelihoods.perplexity:.3f}, in {out}"
    print(told, file=sys.stderr if own_stream(out) == 1 else sys.stdout)
    return 0

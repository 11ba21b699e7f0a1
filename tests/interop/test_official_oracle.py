"""The official mode equals an independent torch program beyond the reference cases: every option, several sizes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import yaml
from official_oracle import Learned, PaddedRows, official_terms
from torch_llama import torch_llama
from watched_step import watched_step

from spt_jax.data.buckets import BucketShape
from spt_jax.data.collate import collate, similar_pairs, training_contexts
from spt_jax.data.packing import Row
from spt_jax.data.similarity import BleuSimilarity
from spt_jax.interop.official_config import read_official_run
from spt_jax.prompting.encoder import to_torch
from spt_jax.training.description import describe, objective_of

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

BOUND = 1e-4
LENGTH, TARGETS, PAD = 28, 16, 0
HEADS, LAYERS, FEED_FORWARD = 4, 2, 2048
PERSONAS = ("i mend old clocks . i have two cats .", "i mend old clocks . i have two dogs .", "we sail alone .")
GRID: dict[str, Sequence[Any]] = {
    "activation": ("softplus", "relu", "leaky_relu"),
    "sides": (("prompt", "lm"), ("prompt",), ("lm",), ()),
    "kind": ("linear", "transformer"),
    "selection": (True, False),
    "lm_off": (False, True),
    "annealing": (None, 0.0, 0.5),
    "tau": ((1.0, 1.0), (0.5, 0.1)),
    "K": (5, 2, 1),
    "B": (3, 1),
    "contrastive": (True, False),
    "ensemble": (True, False),
}
Point = dict[str, Any]


def pairwise(grid: dict[str, Sequence[Any]], seed: int) -> list[Point]:
    """Points that hold every pair of values of every two options (greedy; far fewer than the whole product)."""
    draw = random.Random(seed)
    names = list(grid)
    wanted = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in range(len(grid[a]))
        for y in range(len(grid[b]))
    }
    points: list[Point] = []
    while wanted:
        best: tuple[set[Any], dict[str, int]] = (set(), {})
        for _ in range(60):
            choice = {name: draw.randrange(len(grid[name])) for name in names}
            a, x, b, y = draw.choice(sorted(wanted))
            choice |= {a: x, b: y}
            held = {(a, choice[a], b, choice[b]) for a, b in itertools.combinations(names, 2)} & wanted
            best = max(best, (held, choice), key=lambda candidate: len(candidate[0]))
        wanted -= best[0]
        points.append({name: grid[name][place] for name, place in best[1].items()} | {"lm_alone": False})
    return points


def anywhere(seed: int) -> Point:
    """A point of the whole product; in one of ten only the LM's loss counts, so that the other options are mute."""
    draw = random.Random(seed)
    return {name: draw.choice(values) for name, values in GRID.items()} | {"lm_alone": draw.random() < 0.1}


def named(point: Point) -> str:
    return "-".join("+".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in point.values())


def in_their_words(point: Point) -> dict[str, Any]:
    """The point as a config file of the authors' program."""
    sides = list(point["sides"])
    model: dict[str, Any] = {
        "model_type": "selective_pt",
        "load_bit": 32,
        "peft_type": "prompt_tuning",
        "K": point["K"],
        "peft_config": {"num_virtual_tokens": 3},
        "normalizer": "linear",
        "normalizer_on": sides,
        "score_activation": point["activation"],
    }
    if point["kind"] == "transformer":
        their_sides = ["extra" if side == "prompt" else side for side in sides]
        model["retriever"] = {
            "retriever_type": "transformer_encoder",
            "retriever_on": their_sides,
            "n_head": HEADS,
            "num_layers": LAYERS,
        }
    training: dict[str, Any] = {
        "mode": "causal",
        "task_type": "generate_response",
        "ensemble": point["ensemble"],
        "selective_loss": point["selection"],
        "disable_nll": point["lm_off"],
        "only_nll": point["lm_alone"],
        "selective_loss_weight": 0.4,
        "contrastive_threshold": 20.0,
        "contrastive_weight": 0.7,
        "tau_gold": point["tau"][0],
        "tau_sim": point["tau"][1],
        "freeze_persona": True,
        "freeze_context": True,
    }
    if point["contrastive"]:
        training["contrastive_metric"] = "bleu"
    if point["annealing"] is not None:
        # Weights near 0.6 before progress: some within the bounds, some cut.
        scalar = 0.6 * point["K"] * point["B"]
        training |= {"annealing_nll": True, "annealing_scalar": scalar, "annealing_min": 0.29, "annealing_max": 0.61}
    return {"model": model, "training": training, "dataset": {"max_context_turns": -1, "max_token_length": LENGTH}}


def random_rows(count: int, generator: np.random.Generator) -> list[Row]:
    """Rows of several lengths, learned at their end."""
    rows = []
    for number in range(count):
        length = int(generator.integers(12, LENGTH + 1))
        tokens = generator.integers(1, tiny.CONFIG.vocab_size, length).astype(np.int32)
        positions = np.arange(length - int(generator.integers(2, 10)), length - 1, dtype=np.int32)
        turns = np.zeros(1, np.int32)
        rows.append(
            Row(
                tokens,
                positions[:1] + 1,
                positions,
                tokens[positions + 1],
                np.zeros(len(positions), np.int32),
                number,
                turns,
            )
        )
    return rows


def their_rows(rows: Sequence[Row], personas: Sequence[str]) -> PaddedRows:
    ids, labels, mask = (torch.full((len(rows), LENGTH), PAD, dtype=torch.long) for _ in range(3))
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row.tokens)
        mask[place, : len(row)] = 1
        labels[place, row.target_positions] = torch.tensor(row.target_ids, dtype=torch.long)
    return PaddedRows(ids, mask, labels, PAD, personas)


def our_batch(rows: Sequence[Row], personas: Sequence[str], contrastive: bool) -> dict[str, jax.Array]:
    indices = np.arange(len(rows))
    batch = collate(rows, indices, BucketShape(LENGTH, TARGETS, 1), PAD)
    batch |= training_contexts(rows, indices, LENGTH, PAD)
    if contrastive:
        batch["similar"] = similar_pairs(BleuSimilarity(personas), indices, 20.0)
    return {name: jnp.asarray(array) for name, array in batch.items()}


def in_torch(trainable: Any) -> tuple[Learned, dict[str, Any]]:
    """The trainable tree as the oracle takes it, and its leaves that collect gradients, by torch's names."""
    bank = torch.tensor(np.asarray(trainable["bank"]["prompts"]), requires_grad=True)
    leaves = {"bank": bank}
    retriever = trainable.get("retriever", {})
    width = bank.shape[-1]
    linear, encoder = torch.nn.Linear(width, width), None
    if "lin" in retriever:
        kernel, bias = (torch.tensor(np.asarray(retriever["lin"][name])) for name in ("kernel", "bias"))
        linear.load_state_dict({"weight": kernel.T, "bias": bias})
        leaves |= {f"lin.{name}": leaf for name, leaf in linear.named_parameters()}
    if "encoder" in retriever:
        layer = torch.nn.TransformerEncoderLayer(width, HEADS, FEED_FORWARD, dropout=0.0)
        encoder = torch.nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        encoder.load_state_dict({name: torch.tensor(x) for name, x in to_torch(retriever["encoder"]).items()})
        leaves |= {f"encoder.{name}": leaf for name, leaf in encoder.named_parameters()}
    return Learned(bank, linear, encoder), leaves


def in_our_names(gradients: Any) -> dict[str, np.ndarray]:
    retriever = gradients.get("retriever", {})
    found = {"bank": np.asarray(gradients["bank"]["prompts"])}
    if "lin" in retriever:
        found |= {
            "lin.weight": np.asarray(retriever["lin"]["kernel"]).T,
            "lin.bias": np.asarray(retriever["lin"]["bias"]),
        }
    if "encoder" in retriever:
        found |= {f"encoder.{name}": array for name, array in to_torch(retriever["encoder"]).items()}
    return found


def differences_at(point: Point, folder: Path, seed: int, wrong: dict[str, Any] | None = None) -> dict[str, float]:
    """The relative difference of every term and gradient at a point, on random weights and a random batch.

    `wrong` are options that the oracle is told otherwise.
    """
    words = in_their_words(point)
    (folder / "theirs.yml").write_text(yaml.safe_dump(words))
    config = read_official_run(folder / "theirs.yml", "shape:tiny", {}).config
    config.retriever.dropout, config.retriever.feed_forward = 0.0, FEED_FORWARD
    config.bank.init_stddev = 0.5
    model, objective = describe(config, tiny.CONFIG), objective_of(config)
    rows = random_rows(point["B"], np.random.default_rng(seed))
    personas = PERSONAS[: point["B"]]
    trainable, frozen = model.init(jax.random.key(seed)), tiny.params()
    if "lin" in trainable.get("retriever", {}):
        # A fresh bias outweighs the means, so that every cosine is near 1 and no activation would show.
        trainable["retriever"]["lin"]["bias"] *= 0.1
    batch = our_batch(rows, personas, objective.contrastive_weight > 0)
    progress = point["annealing"] or 0.0
    losses, gradients, _ = watched_step(model, objective, frozen, trainable, batch, progress, once=True)

    learned, leaves = in_torch(trainable)
    options = {f"{section}.{name}": value for section in words for name, value in words[section].items()}
    options |= {f"model.retriever.{name}": value for name, value in words["model"].get("retriever", {}).items()}
    options |= wrong or {}
    terms = official_terms(torch_llama(tiny.CONFIG, frozen), options, learned, their_rows(rows, personas), progress)
    terms["total"].backward()

    ours = {name: getattr(losses, name) for name in terms} | {"scores": losses.scores[:, 0], "nll": losses.nll[:, 0]}
    found = {name: _relative(ours[name], x.detach().numpy(), floor=1e-3) for name, x in terms.items()}
    expected = {name: np.zeros(x.shape) if x.grad is None else x.grad.numpy() for name, x in leaves.items()}
    ours = in_our_names(gradients)
    assert ours.keys() == expected.keys()
    largest = max(float(np.abs(gradient).max()) for gradient in expected.values())
    # One prompt has nothing to select: what is left of the scores' gradient is the rounding of a cosine of two numbers.
    vanishing = (1e-2 if point["K"] == 1 else 1e-4) * largest
    return found | {f"d {name}": _relative(ours[name], x, vanishing=vanishing) for name, x in expected.items()}


def _relative(a: Any, b: Any, *, floor: float = 1e-30, vanishing: float = 0.0) -> float:
    """max |a − b| / max |b|, at least `floor` in the divisor; 0 where both are no more than `vanishing`."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if max(np.abs(a).max(), np.abs(b).max()) <= vanishing:
        return 0.0
    return float(np.abs(a - b).max() / max(np.abs(b).max(), floor))


def check(point: Point, folder: Path, seed: int, record_property: Any) -> None:
    differences = differences_at(point, folder, seed)
    record_property("worst", max(differences.values()))
    outside = {name: difference for name, difference in differences.items() if not difference <= BOUND}
    assert not outside, f"{named(point)}: {outside}"


POINTS = pairwise(GRID, seed=0)


def sampled() -> list[Any]:
    """A third of the pairwise points and one where only the LM's loss counts; the others with ``--all``."""
    rest = [pytest.param(point, marks=pytest.mark.campaign) for place, point in enumerate(POINTS) if place % 3]
    return [*POINTS[::3], POINTS[0] | {"lm_alone": True}, *rest]


@pytest.mark.parametrize("point", sampled(), ids=named)
def test_losses_and_gradients_equal_the_oracle(point: Point, tmp_path: Path, record_property: Any) -> None:
    check(point, tmp_path, 3, record_property)


WRONG: dict[str, Any] = {
    "model.score_activation": "softplus",
    "model.normalizer_on": ["prompt"],
    "training.selective_loss_weight": 0.5,
    "training.tau_gold": 0.8,
    "training.tau_sim": 0.8,
    "training.annealing_scalar": 10.0,
    "training.contrastive_weight": 0.8,
    "training.contrastive_threshold": 90.0,
    "training.ensemble": False,
}


@pytest.mark.parametrize("option", WRONG)
def test_the_oracle_notices_a_wrong_option(option: str, tmp_path: Path) -> None:
    point = {name: values[0] for name, values in GRID.items()}
    point |= {"activation": "leaky_relu", "annealing": 0.5, "lm_alone": False}
    differences = differences_at(point, tmp_path, 3, {option: WRONG[option]})
    assert max(differences.values()) > 10 * BOUND


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(100))
def test_losses_and_gradients_equal_the_oracle_anywhere(seed: int, tmp_path: Path, record_property: Any) -> None:
    check(anywhere(seed), tmp_path, seed, record_property)

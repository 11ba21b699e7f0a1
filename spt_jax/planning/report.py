"""From what a user asks to a plan in lines and facts, and the sentence that refuses what does not fit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from spt_jax.config import Config
from spt_jax.errors import UserError
from spt_jax.planning.advice import Advice, advice
from spt_jax.planning.convai2 import MEAN_LENGTHS
from spt_jax.planning.plan import Plan, plan_generation, plan_training
from spt_jax.planning.search import search
from spt_jax.planning.table import Facts, advice_lines, facts_of, lines_of, search_lines, size
from spt_jax.planning.topology import Topology
from spt_jax.planning.workload import Workload
from spt_jax.training.description import TEXTUAL
from spt_jax.training.experiment import open_lm_of


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        config: A validated configuration.
        workload: Fields of a `Workload`.
        topology: As `Topology.parse` reads it.
        slices: How many.
        what: ``"train"`` or ``"generate"``.
        search: Whether meshes, remat and rows are tried.
        rows: Batch sizes to try, as text; empty for the configuration's, its half and its double.
        tries: How many choices are compiled at most.
    """

    config: Config
    workload: Mapping[str, int]
    topology: str
    slices: int = 1
    what: str = "train"
    search: bool = False
    rows: Sequence[str] = ()
    tries: int = 6


def report(request: Request, say: Callable[[str], None] | None = None) -> tuple[Facts, list[str], str]:
    """Plans what is asked.

    Args:
        request: What is asked.
        say: Takes a line before each compilation; None for silence.

    Returns:
        The facts, the lines for people, and what is lacking in one sentence; empty where it fits.

    Raises:
        UserError: The LM, the topology, the mesh or a number cannot be used, or there is no compiler.
    """
    config, say = request.config, say or (lambda line: None)
    topology = Topology.parse(request.topology, request.slices)
    if config.method.kind in TEXTUAL and request.what == "train":
        raise UserError(f"method.kind = {config.method.kind} trains nothing; allowed: --what=generate")
    if request.what == "generate" and (request.search or topology.chip.kind == "gpu"):
        raise UserError("--what=generate is planned for TPUs and without --search; allowed: --what=train")
    if request.what == "generate" and config.generation.beams > 1:
        raise UserError(
            f"--what=generate plans greedy and sampled decoding, and generation.beams is {config.generation.beams}; "
            "allowed: --config.generation.beams=1"
        )
    decoder, workload = open_lm_of(config).config, _workload(config, request.workload)
    if request.what == "generate":
        plan = plan_generation(config, decoder, topology, workload, say)
        help_ = "a smaller evaluation.batch, model.quantization or a larger mesh.tensor"
        return facts_of(plan), list(lines_of(plan)), "" if plan.fits else f"{_shortfall(plan)}; {help_} needs less"
    if not request.search:
        plan = plan_training(config, decoder, topology, workload, say)
        found = [] if plan.fits else advice(config, decoder, plan, workload)
        return _reported([plan], found)
    plans = search(config, decoder, topology, workload, _rows(config, request.rows), request.tries, say)
    if any(plan.fits for plan in plans):
        return _reported(plans, [])
    best = _least(plans)
    chosen = copy.deepcopy(config)
    chosen.mesh.update(best.mesh)
    chosen.model.remat, chosen.data.batch = best.remat, best.rows
    return _reported(plans, advice(chosen, decoder, best, workload))


def _least(plans: Sequence[Plan]) -> Plan:
    return min(plans, key=lambda plan: plan.needed)


def _workload(config: Config, numbers: Mapping[str, int]) -> Workload:
    layout, longest = config.data.layout, min(numbers["longest"], config.data.max_length)
    mean = min(numbers.get("mean_length") or MEAN_LENGTHS[layout], longest)
    workload = Workload(**{**numbers, "longest": longest, "mean_length": mean}, layout=layout)
    if workload.turns < workload.dialogues:
        raise UserError(f"--turns is {workload.turns}; allowed: --dialogues ({workload.dialogues}) or more")
    if layout == "dialogue" and workload.turns > workload.dialogues * mean:
        raise UserError(
            f"--turns is {workload.turns}; allowed: up to {workload.dialogues * mean}, for a turn takes a token at "
            f"least, and {workload.dialogues} dialogues have rows of {mean} on average"
        )
    if workload.mean_targets > longest:
        raise UserError(f"--mean_targets is {workload.mean_targets}; allowed: up to {longest}, the longest row")
    return workload


def _rows(config: Config, given: Sequence[str]) -> tuple[int, ...]:
    if not given:
        batch = config.data.batch
        return tuple(sorted({max(1, batch // 2), batch, 2 * batch}))
    try:
        rows = tuple(int(text) for text in given)
    except ValueError:
        rows = (0,)
    if min(rows) < 1:
        raise UserError(f"--rows is {','.join(given)!r}; allowed: whole numbers of 1 or more, as in --rows=8,16,32")
    return rows


def _reported(plans: list[Plan], found: list[Advice]) -> tuple[Facts, list[str], str]:
    fitting = [plan for plan in plans if plan.fits]
    best = max(fitting, key=lambda plan: plan.rows_per_second) if fitting else _least(plans)
    lines = [*lines_of(best)]
    if len(plans) > 1:
        lines = [*search_lines(plans), "", *lines]
    if fitting:
        return {**facts_of(best), "tried": [facts_of(plan) for plan in plans if plan is not best]}, lines, ""
    if found:
        lines += ["What would need less, by the estimate:", *advice_lines(found)]
    helpful = [each for each in found if each.fits]
    facts = {**facts_of(best), "advice": [dataclasses.asdict(each) for each in found]}
    return facts, lines, _shortfall(best, helpful[-1].change if helpful else "")


def _shortfall(plan: Plan, change: str = "") -> str:
    what = "the train step" if plan.mean is not None else "generation"
    help_ = f"; {change} would fit by the estimate" if change else ""
    return (
        f"{what} needs {size(plan.needed)} a device, {size(plan.needed - plan.capacity)} more than the "
        f"{size(plan.capacity)} of {plan.topology.chip.name}{help_}"
    )

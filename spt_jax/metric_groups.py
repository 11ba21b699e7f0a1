"""Which figures an evaluation computes: groups with names, the cheap ones by default (`evaluation.metrics`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from spt_jax.errors import UserError, nearest

EVERYDAY = "default"
"""The name that stands for every group that needs nothing but the replies and the LM."""


@dataclass(frozen=True)
class MetricGroup:
    """Figures that are computed together.

    Attributes:
        figures: Their names, as in ``results.json``.
        everyday: Whether it is computed by default.
        needs: What else it takes; empty for nothing.
    """

    figures: tuple[str, ...]
    everyday: bool = True
    needs: str = ""


GROUPS = {
    "perplexity": MetricGroup(("perplexity", "perplexity_per_word", "oracle_perplexity")),
    "f1": MetricGroup(("f1", "f1_parlai")),
    "bleu": MetricGroup(("bleu", "bleu_brevity_penalty", *(f"bleu_precision_{n}" for n in (1, 2, 3, 4)))),
    "rouge": MetricGroup(("rouge_1", "rouge_2", "rouge_l")),
    "dist": MetricGroup(("dist_1", "dist_2", "dist_3")),
    "entropy": MetricGroup(("entropy_4",)),
    "self_bleu": MetricGroup(("self_bleu",)),
    "length": MetricGroup(("reply_words",)),
    "persona": MetricGroup(("persona_recall", "persona_precision", "persona_f1")),
    "meteor": MetricGroup(("meteor",), everyday=False, needs="WordNet on this machine"),
    "bertscore": MetricGroup(
        ("bert_p", "bert_r", "bert_f1"), everyday=False, needs="the extra eval and evaluation.bertscore's encoder"
    ),
    "hits": MetricGroup(
        ("hits_1", "hits_1_total", "hits_turns", "hits_ties"), everyday=False, needs="dialogues with candidates"
    ),
    "nli": MetricGroup(
        ("persona_consistency",), everyday=False, needs="the extra eval and evaluation.nli, a classifier"
    ),
}
"""Name -> group, in the order of the documentation."""

ALWAYS = ("usage", "empty_replies", "pairs")
"""Figures that no group holds: they say what the others were computed from."""


def chosen_groups(names: Iterable[str]) -> frozenset[str]:
    """The groups that `names` stand for.

    Args:
        names: Groups of `GROUPS`, or `EVERYDAY` for all that are computed by default.

    Raises:
        UserError: A name does not exist; the nearest is suggested.
    """
    chosen: set[str] = set()
    for name in names:
        if name != EVERYDAY and name not in GROUPS:
            allowed = (EVERYDAY, *GROUPS)
            raise UserError(
                f"there is no group of metrics {name!r}; allowed: {', '.join(allowed)}.{nearest(name, allowed)}"
            )
        chosen |= {key for key, group in GROUPS.items() if group.everyday} if name == EVERYDAY else {name}
    if not chosen:
        raise UserError(f"no metric is asked for; allowed: {', '.join((EVERYDAY, *GROUPS))}")
    return frozenset(chosen)


def is_chosen(figure: str, groups: Iterable[str]) -> bool:
    """Whether a figure belongs to one of `groups`, or to none at all (`ALWAYS`)."""
    return figure in ALWAYS or any(figure in GROUPS[name].figures for name in groups)

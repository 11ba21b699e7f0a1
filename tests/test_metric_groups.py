"""Groups of figures: what is computed by default, by name, and what a wrong name is told."""

from __future__ import annotations

import pytest

from spt_jax.errors import UserError
from spt_jax.evaluation.text_metrics import text_metrics
from spt_jax.metric_groups import ALWAYS, GROUPS, chosen_groups, is_chosen

REPLIES, RESPONSES, PERSONAS = ["i like dogs", "yes"], ["i like cats", "no"], [["i have dogs"], ["i sail"]]


def test_the_default_is_every_group_that_needs_nothing_else() -> None:
    everyday = chosen_groups(["default"])
    assert everyday == {name for name, group in GROUPS.items() if not group.needs}
    assert everyday.isdisjoint({"meteor", "bertscore", "hits", "nli"})
    assert chosen_groups(["default", "meteor"]) == everyday | {"meteor"}
    assert chosen_groups(["f1", "f1"]) == {"f1"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["f1", "metoer"],
            r"no group of metrics 'metoer'; allowed: default, perplexity, .*nli\. Did you mean 'meteor'\?",
        ),
        (["bert"], r"Did you mean 'bertscore'\?"),
        ([], "no metric is asked for"),
    ],
)
def test_names_that_do_not_exist_are_told_with_the_nearest(names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen_groups(names)


def test_a_figure_belongs_to_one_group() -> None:
    figures = [figure for group in GROUPS.values() for figure in group.figures]
    assert len(figures) == len(set(figures)) and not set(figures) & set(ALWAYS)


def test_every_group_of_texts_gives_its_figures_and_no_others() -> None:
    everyday = text_metrics(REPLIES, RESPONSES, PERSONAS).values
    for name in chosen_groups(["default"]) - {"perplexity"}:
        found = text_metrics(REPLIES, RESPONSES, PERSONAS, metrics=[name])
        assert set(found.values) == {*GROUPS[name].figures, "pairs", "empty_replies"}
        assert set(found.definitions) == set(found.values)
        assert found.values == {key: everyday[key] for key in found.values}
        assert all(is_chosen(figure, [name]) for figure in found.values)
    assert set(everyday) | set(GROUPS["perplexity"].figures) | {"usage"} == {
        *ALWAYS,
        *(figure for name in chosen_groups(["default"]) for figure in GROUPS[name].figures),
    }

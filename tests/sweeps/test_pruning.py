"""Pruning by a run's own metrics: the run is asked to end, and what is decided does not depend on how fast it was."""

from __future__ import annotations

import pytest
from optuna.trial import TrialState
from stand_in_sweep import metrics, outcome, processes, start_worker, work, workplace, write_sweep
from test_workers import ended, wait_until

pytestmark = pytest.mark.first_python

FIELDS = """
    sampler="grid", pruner=ThresholdPruner(upper=15.0, n_warmup_steps=2),
    space={"bank.num_prompts": CategoricalDistribution([3, 8])},
"""


def test_a_run_is_given_up_at_the_step_where_the_pruner_says_so_however_far_it_has_got(tmp_path):
    for name in ("quick", "slow"):
        (tmp_path / name).mkdir()
    quick = work(write_sweep(tmp_path / "quick" / "sweep.py", FIELDS, steps=8))
    file = write_sweep(tmp_path / "slow" / "sweep.py", FIELDS, steps=8)
    worker = start_worker(file, step=0.6)
    with ended([worker]):
        assert worker.wait(60) == 0
    slow = workplace(file)
    assert outcome(slow) == outcome(quick)
    good, bad = slow.trials()
    assert (good.state, bad.state) == (TrialState.COMPLETE, TrialState.PRUNED)
    assert list(good.intermediate_values) == list(range(8)) and list(bad.intermediate_values) == [0, 1, 2]
    # It was asked to end, and saved: nothing of it was left running.
    assert "finished" not in processes(slow, 1) and len(metrics(slow, 1)) < 8


def test_a_pruned_trial_whose_worker_was_lost_before_it_said_so_is_not_trained_on(tmp_path):
    file = write_sweep(tmp_path / "sweep.py", FIELDS, steps=8)
    at = workplace(file)
    worker = start_worker(file, step=0.5)
    with ended([worker]):
        wait_until(lambda: len(at.trials()[1].intermediate_values) == 2)
    trial_id = at.trials()[1]._trial_id
    at.storage.set_trial_intermediate_value(trial_id, 2, 40.0)
    work(file)
    assert at.trials()[1].state == TrialState.PRUNED
    assert list(at.trials()[1].intermediate_values) == [0, 1, 2]


@pytest.mark.parametrize(("take", "value"), [("best", 0), ("last", -1)])
def test_the_objective_is_the_best_value_or_the_last(tmp_path, take, value):
    fields = f"""
        sampler="grid", space={{"bank.num_prompts": CategoricalDistribution([3])}},
        objective=Objective(direction="maximize", take={take!r}),
    """
    at = work(write_sweep(tmp_path / "sweep.py", fields, steps=4))
    assert at.trials()[0].value == metrics(at, 0)[value]["development/perplexity"]

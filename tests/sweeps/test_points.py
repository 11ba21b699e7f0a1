"""Where trials stand: grids in order, and draws that depend on seed, number and history alone."""

from __future__ import annotations

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from stand_in_sweep import outcome, start_worker, work, workplace, write_sweep
from test_workers import ended, wait_until

from spt_jax.config import default_config
from spt_jax.errors import UserError
from spt_jax.sweeps.description import Sweep
from spt_jax.sweeps.points import check_space, grid, num_trials, suggest

SPACE = {
    "optimizer.learning_rate": FloatDistribution(1e-3, 1e-1, log=True),
    "bank.num_prompts": IntDistribution(1, 8),
}
DRAWN = """
    sampler={sampler!r}, num_trials=13, sampler_seed=3,
    space={{
        "optimizer.learning_rate": FloatDistribution(1e-3, 1e-1, log=True),
        "bank.num_prompts": IntDistribution(1, 8),
    }},
"""


def sweep_of(space, **fields) -> Sweep:
    return Sweep("", space, **fields)


def test_a_grid_has_every_combination_the_last_option_fastest():
    space = {
        "a": IntDistribution(1, 5, step=2),
        "b": FloatDistribution(0.0, 0.3, step=0.1),
        "c": CategoricalDistribution(["x"]),
    }
    points = grid(space)
    assert [point["a"] for point in points] == [1] * 4 + [3] * 4 + [5] * 4
    assert [point["b"] for point in points[:4]] == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ({"a": FloatDistribution(0.0, 1.0)}, "a grid cannot take 'a' from FloatDistribution"),
        ({"a": IntDistribution(1, 10_001)}, "the grid has 10,001 combinations; allowed: at most 10,000"),
    ],
)
def test_a_grid_of_a_range_or_too_large_is_refused(space, sentence):
    with pytest.raises(UserError, match=sentence):
        grid(space)


def test_a_grid_takes_all_its_points_or_the_first_so_many_but_no_more():
    space = {"a": CategoricalDistribution([1, 2, 3])}
    assert num_trials(sweep_of(space, sampler="grid")) == 3
    assert num_trials(sweep_of(space, sampler="grid", num_trials=2)) == 2
    with pytest.raises(UserError, match="num_trials is 4, but the grid has 3 combinations"):
        num_trials(sweep_of(space, sampler="grid", num_trials=4))


def test_the_search_space_is_checked_by_the_configurations_own_rules():
    space = {
        "bank.num_prompts": CategoricalDistribution([0, 4]),
        "bank.init": CategoricalDistribution(["normal", "norml"]),
    }
    with pytest.raises(UserError) as raised:
        check_space(sweep_of(space, sampler="random", num_trials=1), default_config())
    told = str(raised.value).splitlines()
    assert len(told) == 2 and all(line.startswith("the search space is not allowed: ") for line in told)
    assert "bank.num_prompts is 0" in told[0] and "bank.init is 'norml'" in told[1]


def draws(sweep: Sweep, order: list[int]) -> dict[int, dict]:
    """The values of trials that are begun in another order than that of their numbers."""
    study = optuna.create_study()
    study.add_trials([optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING) for _ in order])
    return {number: suggest(sweep, study, optuna.Trial(study, number)) for number in order}


def test_random_values_are_functions_of_seed_and_number_whoever_draws_them_when():
    sweep = sweep_of(SPACE, sampler="random", num_trials=6)
    forth, back = draws(sweep, [0, 1, 2, 3, 4, 5]), draws(sweep, [5, 3, 4, 0, 2, 1])
    assert forth == back
    assert len({point["optimizer.learning_rate"] for point in forth.values()}) == 6
    assert draws(sweep_of(SPACE, sampler="random", num_trials=6, sampler_seed=1), list(range(6))) != forth


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_trial_lost_between_two_draws_goes_on_with_what_it_would_have_drawn(sampler):
    sweep = sweep_of(SPACE, sampler=sampler, num_trials=5)
    first = sweep_of({"optimizer.learning_rate": SPACE["optimizer.learning_rate"]}, sampler=sampler, num_trials=5)
    study = optuna.create_study()
    study.add_trials([optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING) for _ in range(5)])
    lost = {}
    for number in range(5):
        suggest(first, study, optuna.Trial(study, number))
        lost[number] = suggest(sweep, study, optuna.Trial(study, number))
    assert lost == draws(sweep, list(range(5)))


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("random", marks=pytest.mark.campaign)])
def test_a_sweep_of_one_worker_killed_and_started_again_suggests_what_an_undisturbed_one_would(tmp_path, sampler):
    for name in ("calm", "killed"):
        (tmp_path / name).mkdir()
        write_sweep(tmp_path / name / "sweep.py", DRAWN.format(sampler=sampler), steps=1)
    calm = work(tmp_path / "calm" / "sweep.py")
    file = tmp_path / "killed" / "sweep.py"
    at = workplace(file)
    worker = start_worker(file)
    with ended([worker]):
        wait_until(lambda: at.trials()[9].state.name != "WAITING")
    work(file)
    assert outcome(at) == outcome(calm)

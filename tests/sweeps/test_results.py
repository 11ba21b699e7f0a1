"""What a sweep leaves: the config file is the config, the pictures show what was found."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from unittest import mock
from xml.etree import ElementTree

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from stand_in_sweep import work, workplace, write_sweep

from spt_jax.config import default_config, flatten, set_option
from spt_jax.errors import UserError
from spt_jax.sweeps.config_file import config_file
from spt_jax.sweeps.description import Sweep
from spt_jax.sweeps.leases import Lease
from spt_jax.sweeps.pictures import importance_chart, parallel_coordinates
from spt_jax.sweeps.results import importances, write_results
from spt_jax.sweeps.watching import table

VALUES = {
    "optimizer.learning_rate": st.floats(1e-9, 1e3) | st.integers(0, 3),
    "bank.num_prompts": st.integers(1, 99),
    "data.train": st.text(),
    "lora.targets": st.lists(st.text(max_size=4)).map(tuple),
    "tracking.tensorboard": st.booleans(),
}


def given_by(text: str):
    names: dict = {}
    exec(compile(text, "config.py", "exec"), names)
    return names["get_config"]()


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional=VALUES), st.text())
def test_a_config_file_gives_exactly_the_config_it_was_written_from(values, title):
    config = default_config()
    for name, value in values.items():
        set_option(config, name, value)
    written = given_by(config_file(config, title.replace("\n", " ").replace("\r", " ").replace("\0", " ")))
    assert flatten(written) == flatten(config)
    defaults = flatten(default_config())
    assert [type(value) for value in flatten(written).values()] == [type(value) for value in defaults.values()]


SPACE = {
    "optimizer.learning_rate": FloatDistribution(1e-3, 1e-1, log=True),
    "bank.num_prompts": IntDistribution(1, 8),
    "bank.init": CategoricalDistribution(["normal", "text"]),
}
TRIALS = [
    (0, {"optimizer.learning_rate": 1e-3, "bank.num_prompts": 1, "bank.init": "normal"}, 9.0),
    (1, {"optimizer.learning_rate": 1e-2, "bank.num_prompts": 8, "bank.init": "text"}, 5.0),
    (2, {"optimizer.learning_rate": 1e-1, "bank.num_prompts": 4, "bank.init": "text"}, 7.0),
    (3, {"optimizer.learning_rate": 1e-1, "bank.num_prompts": 4, "bank.init": "text"}, math.inf),
]


def lines(picture: str) -> list[tuple[str, list[tuple[float, float]], str]]:
    """(tooltip, points, colour) of each trial's line."""
    root = ElementTree.fromstring(picture)
    return [
        (
            line[0].text or "",
            [(float(x), float(y)) for x, y in (point.split(",") for point in line.get("points", "").split())],
            line.get("stroke", ""),
        )
        for line in root.iter("polyline")
    ]


@pytest.mark.parametrize(("minimize", "best"), [(True, 1), (False, 0)])
def test_parallel_coordinates_draw_each_finite_trial_through_its_values_and_the_best_last(minimize, best):
    drawn = lines(parallel_coordinates(SPACE, TRIALS, "perplexity", minimize=minimize))
    assert len(drawn) == 3
    assert drawn[-1][0].startswith(f"trial {best}: ") and drawn[-1][2] not in {color for *_, color in drawn[:-1]}
    heights = {int(re.findall(r"\d+", tooltip)[0]): [y for _, y in points] for tooltip, points, _ in drawn}
    assert all(len(points) == 4 for points in heights.values())
    # A rate in the middle of its logarithmic range lies in the middle of its axis; large is up.
    assert heights[1][0] == pytest.approx((heights[0][0] + heights[2][0]) / 2, abs=0.1)
    assert heights[1][1] < heights[2][1] < heights[0][1]
    assert heights[1][2] == heights[2][2] != heights[0][2]
    assert heights[0][3] < heights[2][3] < heights[1][3]


def test_pictures_of_nothing_say_so():
    assert "no trial is complete" in parallel_coordinates(SPACE, [], "perplexity", minimize=True)
    ElementTree.fromstring(importance_chart({}))


def test_importances_are_optunas_and_tell_the_option_that_matters():
    sweep = Sweep("", {"a": FloatDistribution(0.0, 1.0), "b": FloatDistribution(0.0, 1.0)}, "random", 64)
    trials = [
        create_trial(
            state=TrialState.COMPLETE,
            params={"a": (n % 8) / 8, "b": (n // 8) / 8},
            distributions=dict(sweep.space),
            value=100 * (n % 8) + 0.01 * (n // 8),
        )
        for n in range(64)
    ]
    found = importances(sweep, trials)
    assert sum(found.values()) == pytest.approx(1.0) and found["a"] > 0.9
    study = optuna.create_study()
    study.add_trials(trials)
    assert found == pytest.approx(optuna.importance.get_param_importances(study))
    picture = importance_chart(found)
    assert f"{100 * found['a']:.0f} %" in picture
    widths = [float(bar.get("width", "")) for bar in ElementTree.fromstring(picture).iter("rect")]
    assert widths[1] == pytest.approx(260 * found["a"], abs=0.01)


def test_a_sweeps_files_name_the_best_trial_and_every_other(tmp_path):
    at = work(write_sweep(tmp_path / "sweep.py", steps=2))
    best = write_results(at)
    assert best is not None and best.number == 3
    config = given_by((at.folder / "best.py").read_text())
    assert (config.optimizer.learning_rate, config.bank.num_prompts, config.train.steps) == (0.03, 3, 2)
    report = (at.folder / "report.html").read_text()
    assert report.count("<polyline") >= 4 and "trial 3" in report and "4 complete" in report
    assert "Importance of the options" in report
    assert "http:" not in report and "https:" not in report


def test_before_a_trial_is_complete_there_is_a_report_and_no_best_config(tmp_path):
    fields = 'space={"optimizer.weight_decay": CategoricalDistribution([0.1])}, sampler="grid"'
    file = write_sweep(tmp_path / "sweep.py", fields, steps=2)
    with pytest.raises(UserError, match="this one cannot be trained"):
        work(file)
    at = workplace(file)
    assert write_results(at) is None
    assert not (at.folder / "best.py").exists()
    assert "running, failed before: spt-jax train ended with exit code 2" in (at.folder / "report.html").read_text()


def test_a_value_that_is_not_finite_is_null_in_json_and_no_trials_best(tmp_path):
    at = work(write_sweep(tmp_path / "sweep.py", steps=2))
    study = optuna.create_study()
    study.add_trial(create_trial(value=math.inf, state=TrialState.COMPLETE))
    trials = [*at.trials(), *study.get_trials()]
    at = dataclasses.replace(at, study=mock.Mock(get_trials=lambda **_: trials, study_name="s"), num_trials=9)
    best = write_results(at)
    assert best is not None and best.value is not None and math.isfinite(best.value)
    rows = json.loads((at.folder / "trials.json").read_text(), parse_constant=pytest.fail)
    assert [row["value"] is None for row in rows] == [False] * 4 + [True]


def test_the_live_table_tells_running_from_interrupted_by_the_lease():
    running = [create_trial(state=TrialState.RUNNING, intermediate_values={3: 7.5}) for _ in range(2)]
    for number, trial in enumerate(running):
        trial.number = number
    drawn = table(running, {0: Lease(0, "a", 9.0), 1: Lease(1, "a", -1.0)}, [], "perplexity")
    assert list(drawn.columns[1].cells) == ["running", "interrupted"]
    assert list(drawn.columns[2].cells) == ["7.5", "7.5"] and list(drawn.columns[3].cells) == ["3", "3"]

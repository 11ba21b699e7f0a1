"""Sweep files: what is wrong is told in a sentence, before anything is made."""

from __future__ import annotations

import pytest
from stand_in_sweep import CONFIGS, GRID, workplace, write_sweep

from spt_jax.config import flatten
from spt_jax.errors import UserError
from spt_jax.sweeps.description import base_config, load_sweep, record

SPACE = 'space={"bank.num_prompts": CategoricalDistribution([3])}'


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ("space={}", "space is empty"),
        (
            'space={"bank.num_prompt": CategoricalDistribution([3])}',
            "no option 'bank.num_prompt' .* Did you mean 'bank.num_prompts'",
        ),
        ('space={"bank.num_prompts": [3, 4]}', r"space\['bank.num_prompts'\] is a list; allowed: a distribution"),
        ('space={"seed": IntDistribution(0, 3)}', "'seed' cannot vary in a sweep"),
        ('space={"train.steps": IntDistribution(1, 3)}', "'train.steps' is both in space and in fixed"),
        (SPACE + ', sampler="gird"', "sampler is 'gird'; allowed: grid, random, tpe. Did you mean 'grid'?"),
        (SPACE, "num_trials is 0; allowed for tpe: 1 or more"),
        (SPACE + ", num_trials=1, seeds=()", r"seeds is \(\); allowed: one or more"),
        (SPACE + ", num_trials=1, seeds=(1, 1)", r"seeds is \(1, 1\); allowed: one or more different"),
        (SPACE + ', num_trials=1, pruner="median"', "pruner is a str; allowed: a pruner of optuna.pruners"),
        (
            SPACE + ', num_trials=1, objective=Objective(direction="down")',
            "objective.direction is 'down'; allowed: minimize, maximize",
        ),
        (
            SPACE + ', num_trials=1, pruner=MedianPruner(), objective=Objective("f1", file="results.json")',
            "a pruner needs an objective of metrics.jsonl",
        ),
    ],
)
def test_a_field_that_cannot_be_used_is_told(tmp_path, fields, sentence):
    with pytest.raises(UserError, match=sentence):
        load_sweep(write_sweep(tmp_path / "sweep.py", fields))


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("base", 3, "a config file, as text"),
        ("space", None, "a dictionary from names of options"),
        ("space", {3: None}, "a dictionary from names of options"),
        ("fixed", [("train.steps", 3)], "a dictionary from names of options to their values"),
        ("sampler", 3, "grid, random, tpe"),
        ("objective", "development/perplexity", "an Objective"),
        ("seeds", 3, "a tuple of whole numbers"),
        ("seeds", ("a",), "a tuple of whole numbers"),
        ("seeds", (True,), "a tuple of whole numbers"),
        ("seeds", (0, -1), "a tuple of whole numbers of 0 or more"),
        ("sampler_seed", -1, "a whole number of 0 or more"),
        ("sampler_seed", None, "a whole number of 0 or more"),
        ("num_trials", "9", "1 or more"),
        ("num_trials", True, "1 or more"),
    ],
)
def test_a_field_of_another_type_is_told_with_what_is_allowed(tmp_path, field, value, allowed):
    path = write_sweep(tmp_path / "sweep.py", f"{SPACE}, num_trials=1")
    changed = f"sound = get_sweep\n\ndef get_sweep():\n    return dataclasses.replace(sound(), {field}={value!r})\n"
    path.write_text(f"import dataclasses\n{path.read_text()}\n{changed}")
    with pytest.raises(UserError) as caught:
        load_sweep(path)
    assert str(caught.value).startswith(f"{path}: {field} is {value!r}; allowed")
    assert allowed in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_seeds_may_be_a_range(tmp_path):
    assert load_sweep(write_sweep(tmp_path / "sweep.py", f"{SPACE}, num_trials=1, seeds=range(3)")).seeds == (0, 1, 2)


def test_an_objective_whose_metric_is_no_name_is_told(tmp_path):
    with pytest.raises(UserError, match=r"sweep\.py: objective\.metric is 3; allowed: the name of a figure, as text$"):
        load_sweep(write_sweep(tmp_path / "sweep.py", f"{SPACE}, num_trials=1, objective=Objective(3)"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def get_sweep(:", r"sweep.py:1: the sweep file is not Python"),
        ("x = 1", r"sweep.py has no function get_sweep\(\)"),
        ("def get_sweep():\n    return 1 / 0", r"sweep.py:2: the sweep file fails with ZeroDivisionError"),
        ("def get_sweep():\n    return 3", r"returns a int; it must return a spt_jax Sweep"),
    ],
)
def test_a_file_that_gives_no_sweep_is_told_with_its_line(tmp_path, text, sentence):
    (tmp_path / "sweep.py").write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_sweep(tmp_path / "sweep.py")
    with pytest.raises(UserError, match=r"does not exist. Did you mean '.*sweep.py'"):
        load_sweep(tmp_path / "sweeps.py")


def test_the_base_is_found_beside_the_sweep_file_and_fixed_options_come_over_it(tmp_path):
    file = write_sweep(tmp_path / "sweep.py", SPACE + ', sampler="grid"', steps=7, base="base.py")
    (tmp_path / "base.py").write_text((CONFIGS / "quickstart.py").read_text())
    config = base_config(load_sweep(file), {"data.batch": 8})
    assert (config.train.steps, config.data.batch, config.data.max_length) == (7, 8, 384)
    with pytest.raises(UserError, match="varies in this sweep"):
        base_config(load_sweep(file), {"bank.num_prompts": 2})


def test_another_sweep_of_the_same_name_is_refused_and_the_difference_named(tmp_path):
    workplace(write_sweep(tmp_path / "sweep.py", steps=8))
    workplace(write_sweep(tmp_path / "sweep.py", steps=8))
    with pytest.raises(UserError, match=r"another sweep of the name .*: base.train.steps \(8 there, 9 here\); choose"):
        workplace(write_sweep(tmp_path / "sweep.py", steps=9))


def test_a_sweep_older_than_an_option_goes_on_with_its_default(tmp_path, monkeypatch):
    def older(sweep, base):
        found = record(sweep, base)
        del found["base"]["evaluation.seed"]
        return found

    with monkeypatch.context() as patched:
        patched.setattr("stand_in_sweep.record", older)
        workplace(write_sweep(tmp_path / "sweep.py"))
    workplace(write_sweep(tmp_path / "sweep.py"))


def test_more_trials_go_on_with_the_same_sweep(tmp_path):
    space = 'space={"optimizer.learning_rate": FloatDistribution(1e-3, 1e-1)}, sampler="random"'
    assert len(workplace(write_sweep(tmp_path / "sweep.py", space + ", num_trials=3")).study.trials) == 3
    assert len(workplace(write_sweep(tmp_path / "sweep.py", space + ", num_trials=5")).study.trials) == 5


def test_a_sweeps_record_tells_pruners_and_everything_else_apart(tmp_path):
    def told(fields: str) -> dict:
        sweep = load_sweep(write_sweep(tmp_path / "sweep.py", fields))
        return record(sweep, base_config(sweep))

    same = [told(SPACE + ", num_trials=3, pruner=PercentilePruner(25.0)") for _ in range(2)]
    assert same[0] == same[1]
    for other in ("PercentilePruner(50.0)", "PercentilePruner(25.0, n_warmup_steps=2)", "MedianPruner()", "None"):
        assert told(SPACE + f", num_trials=3, pruner={other}") != same[0]
    assert told(GRID)["space"] != same[0]["space"]


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.py")), ids=lambda path: path.stem)
def test_the_projects_sweeps_are_valid_and_their_docstrings_name_their_own_command(path):
    from spt_jax.sweeps.points import check_space, num_trials

    sweep = load_sweep(path)
    base = base_config(sweep)
    check_space(sweep, base)
    assert num_trials(sweep) > 1
    assert all(flatten(base)[name] is not None for name in sweep.space)
    assert f"launch/sweep.py --sweep=configs/sweeps/{path.name}" in path.read_text()

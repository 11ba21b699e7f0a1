"""Every option is described and guarded, and a config survives its JSON."""

from __future__ import annotations

import inspect
import json
import math
import re
from typing import Any

import pytest

from spt_jax import config as module
from spt_jax.config import RULES, UNRULED, default_config, flatten, from_dict, set_option, validate
from spt_jax.errors import UserError

DEFAULTS = flatten(default_config())
BAD_VALUES: dict[str, list[Any]] = {
    "at least 0 and below 1": [-0.1, 1.0, math.nan],
    "0 or more": [-1],
    "1 or more": [0, -3],
    "more than 0": [0.0, -1.0, math.nan, math.inf],
    "0 to 1": [-0.1, 1.1, math.nan],
    "0 to 4294967295": [-1, 2**32],
    "0, or 1e-30 or more": [-1.0, 1e-31, math.inf, math.nan],
    "0 to 100": [-0.5, 100.5, math.nan],
    "16 or more": [15, 0],
    "1 or more, or -1 for the rest": [0, -2],
    "1 or more, or -1 for those that are there": [0, -2],
    "0 to 2147483647, or -1 for the run's": [-2, 2**31],
    "more than 0, up to 1": [0, 1.5],
    "names of projections": [(), (3,)],
    "texts": [(3,), ("a", None)],
    RULES["evaluation.metrics"].allowed: [(), ("f1", "rogue"), (3,)],
    "texts, none empty": [(3,), ("a", "")],
    "a finite number": [math.nan, math.inf],
}


def nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def test_the_defaults_are_valid():
    validate(default_config())


def test_every_option_has_a_rule_or_the_reason_why_it_has_none():
    assert set(RULES) | set(UNRULED) == set(DEFAULTS)
    assert not set(RULES) & set(UNRULED)
    assert all(UNRULED.values())


def test_every_option_has_a_description():
    lines = inspect.getsource(default_config).splitlines()
    described = {m[1]: m[2] for line in lines if (m := re.match(r"    c\.([\w.]+) = .*?  # (.+)$", line))}
    assert set(described) == set(DEFAULTS)
    assert all(len(text) > 8 for text in described.values())


@pytest.mark.parametrize("name", sorted(RULES))
def test_each_rule_refuses_a_bad_value_by_name_and_says_what_is_allowed(name):
    allowed = RULES[name].allowed
    for bad in BAD_VALUES.get(allowed, ["no_such_name" if allowed.startswith("one of") else ""]):
        if isinstance(DEFAULTS[name], int) and isinstance(bad, float):
            continue
        if isinstance(DEFAULTS[name], float):
            bad = float(bad)
        with pytest.raises(UserError) as told:
            from_dict(nested(name, bad))
        assert str(told.value) == f"{name} is {bad!r}; allowed: {allowed}"


@pytest.mark.parametrize("name", sorted(name for name, value in DEFAULTS.items() if type(value) is int))
def test_no_whole_number_is_larger_than_what_a_step_counts_with(name):
    with pytest.raises(UserError, match=f"{re.escape(name)} is {2**32}; allowed: "):
        from_dict(nested(name, 2**32))


@pytest.mark.parametrize("name", sorted(name for name, value in DEFAULTS.items() if isinstance(value, float)))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_option_is_infinite_or_not_a_number(name, bad):
    with pytest.raises(UserError, match=re.escape(name)):
        from_dict(nested(name, bad))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("bank.num_promts", "bank.num_prompts"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        ("optimizer.lr_schedule", "optimizer.schedule"),
        ("data.column.persona", "data.columns.persona"),
        ("sed", "seed"),
    ],
)
def test_an_unknown_option_is_told_with_the_nearest_one(typed, meant):
    with pytest.raises(UserError, match=re.escape(f"no option '{typed}' in the configuration. Did you mean '{meant}'")):
        from_dict(nested(typed, 1))
    config = default_config()
    with config.unlocked():
        config.update(nested(typed, 1))
    with pytest.raises(UserError, match=re.escape(f"Did you mean '{meant}'")):
        validate(config)


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_a_value_of_another_type_is_refused_by_name(name):
    for bad in ({"text"}, None, [["a"]]):
        with pytest.raises(UserError, match=re.escape(name)):
            from_dict(nested(name, bad))
    if not isinstance(DEFAULTS[name], bool):
        with pytest.raises(UserError, match=re.escape(f"{name} is True; allowed: a value of type")):
            from_dict(nested(name, True))


def test_a_config_made_without_the_defaults_is_checked_too():
    config = default_config().copy_and_resolve_references()
    with config.ignore_type():
        config.bank.num_prompts = "4"
        config.train.epochs = 1.5
    del config.data.batch
    with pytest.raises(UserError) as told:
        validate(config)
    assert str(told.value).splitlines() == [
        "the option 'data.batch' is missing from the configuration",
        "bank.num_prompts is '4'; allowed: a value of type int",
        "train.epochs is 1.5; allowed: a value of type int",
    ]


@pytest.mark.parametrize("name", ["objective.selection_weight", "optimizer.learning_rate", "bank.init_stddev"])
def test_a_whole_number_serves_as_a_float_and_a_fraction_not_as_a_whole_number(name):
    config = from_dict(nested(name, 2))
    assert flatten(config)[name] == 2.0
    assert isinstance(flatten(config)[name], float)
    with pytest.raises(UserError, match=r"bank\.num_prompts is 2\.5; allowed: a value of type int"):
        from_dict({"bank": {"num_prompts": 2.5}})


def test_all_problems_are_told_at_once_one_a_line():
    values = {"bank": {"num_prompts": 0, "init": "norml"}, "optimizer": {"learning_rate": -1.0}}
    with pytest.raises(UserError) as told:
        from_dict(values)
    lines = str(told.value).splitlines()
    assert [line.split()[0] for line in lines] == ["bank.init", "bank.num_prompts", "optimizer.learning_rate"]


def test_a_config_survives_json():
    config = default_config()
    config.bank.init, config.bank.init_text = "text", ("be kind", "be brief")
    config.optimizer.learning_rate = 3e-3
    config.data.columns.persona = "who"
    again = from_dict(json.loads(json.dumps(config.to_dict())))
    assert flatten(again) == flatten(config)
    assert {n: type(v) for n, v in flatten(again).items()} == {n: type(v) for n, v in DEFAULTS.items()}


def test_missing_keys_take_their_defaults():
    assert flatten(from_dict({})) == DEFAULTS
    assert flatten(from_dict({"bank": {"num_prompts": 7}})) == DEFAULTS | {"bank.num_prompts": 7}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer": {"micro_batches": 3}}, "optimizer.micro_batches is 3; allowed: a divisor of data.batch (8)"),
        ({"data": {"max_turns": 2}}, "data.max_turns is 2, which needs data.layout = turn"),
        ({"bank": {"init": "file"}}, "bank.init is 'file', so bank.init_file must name a"),
        ({"bank": {"init": "text"}}, "bank.init is 'text', so bank.init_text must hold a text"),
    ],
)
def test_options_that_contradict_each_other_are_told(values, words):
    with pytest.raises(UserError, match=re.escape(words)):
        from_dict(values)


def test_options_that_agree_are_accepted():
    from_dict({"data": {"max_turns": 2, "layout": "turn"}, "optimizer": {"micro_batches": 4}})
    from_dict({"bank": {"init": "text", "init_text": ["hello"]}})
    config = default_config()
    set_option(config, "mesh.data", -1)
    validate(config)


def test_public_names_of_the_module_are_described():
    for name, member in inspect.getmembers(module, inspect.isfunction):
        if member.__module__ == module.__name__ and not name.startswith("_"):
            assert member.__doc__, name


def test_a_subset_of_prompts_does_not_go_with_scores_that_may_cancel():
    config = from_dict({"objective": {"prompts_per_step": 2}})
    config.retriever.activation = "leaky_relu"
    with pytest.raises(UserError, match=r"retriever\.activation is 'leaky_relu'; allowed with objective\.prompts_per"):
        validate(config)


def test_a_subset_of_all_prompts_is_no_subset():
    from_dict({"objective": {"prompts_per_step": 4}, "retriever": {"activation": "leaky_relu"}})


def test_a_subset_of_more_prompts_than_memory_holds_is_counted_without_them():
    config = from_dict({"bank": {"num_prompts": 2**31 - 1}, "objective": {"prompts_per_step": 3}})
    config.objective.prompts_per_step = 1
    with pytest.raises(UserError, match=r"objective\.prompts_per_step is 1; allowed: 0 for all, or 2 up to"):
        validate(config)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"method": {"kind": "lora"}, "bank": {"init": "clusters"}},
            "bank.init is 'clusters'; allowed with method.kind",
        ),
        ({"method": {"kind": "prefix_tuning"}, "bank": {"init": "file", "init_file": "x.npy"}}, "bank.init is 'file'"),
        ({"method": {"kind": "prompt_tuning"}, "bank": {"kind": "prefixes"}}, "bank.kind is 'prefixes'; allowed with"),
        ({"method": {"hidden_size": 8}}, "method.hidden_size is 8; allowed with method.kind = spt: 0"),
        ({"data": {"freeze_persona": False}}, "data.freeze_persona is False; allowed with retriever.context = context"),
        ({"data": {"freeze_context": False}}, "data.freeze_context is False; allowed with"),
        ({"data": {"official_pad": "bos"}}, "data.official_pad is 'bos'; allowed with"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(values, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        from_dict(values)

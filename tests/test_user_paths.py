"""A path that cannot be looked up is one sentence, wherever a user may write it."""

from __future__ import annotations

from pathlib import Path

import pytest

from spt_jax.config import default_config, set_option
from spt_jax.data.sources import read_dialogues
from spt_jax.errors import UserError
from spt_jax.prompting.bank import from_file
from spt_jax.prompting.peft_prompts import adapter_folders
from spt_jax.training.absolute_paths import absolute_paths
from spt_jax.training.workdir import check_workdir, read_config
from spt_jax.user_paths import expanded, present

LONG = "x" * 300
NOBODY = "~nobody-of-this-name/talk.txt"

READERS = {
    "dialogues": read_dialogues,
    "a bank": lambda text: from_file(text, (1, 1, 1)),
    "adapters": adapter_folders,
    "several adapters": lambda text: adapter_folders(f"{text},{text}"),
    "an option": lambda text: absolute_paths(changed("data.train", text)) or expanded(text, "data.train"),
    "the bank's option": lambda text: absolute_paths(changed("bank.init_file", text)),
}


def changed(name: str, value: str):
    config = default_config()
    set_option(config, name, value)
    return config


@pytest.mark.parametrize("text", [LONG, NOBODY])
@pytest.mark.parametrize("reader", READERS)
def test_a_name_too_long_and_the_home_of_nobody_are_told(reader, text):
    with pytest.raises(UserError, match=r"x{300}.*cannot be looked up|nobody-of-this-name/.* cannot be looked up"):
        READERS[reader](text)


def test_a_folder_that_may_not_be_searched_is_told(monkeypatch, tmp_path):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", refused)
    for ask in (lambda: check_workdir(tmp_path / "run", default_config()), lambda: read_config(tmp_path / "run")):
        with pytest.raises(UserError, match=r"--workdir .*run.* cannot be looked up: Permission denied"):
            ask()


def test_what_is_there_and_what_is_not_is_known(tmp_path):
    (tmp_path / "file").write_text("")
    found = [present(tmp_path / name, "it") for name in ("file", "none", "file/below", "a\0b")]
    assert found == [True, False, False, False]


def test_a_home_is_expanded_in_the_name_of_a_bank(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = changed("bank.init_file", "~/bank.npy")
    absolute_paths(config)
    assert config.bank.init_file == str(tmp_path / "bank.npy")


def test_adapters_whose_names_together_are_too_long_for_one_are_found(tmp_path):
    names = [f"{tmp_path}/{letter * 200}" for letter in "ab"]
    for name in names:
        Path(name).mkdir()
    assert [str(folder) for folder in adapter_folders(",".join(names))] == names

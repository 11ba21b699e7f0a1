"""Paths of a configuration's files that mean the same from any folder."""

from __future__ import annotations

from pathlib import Path

from spt_jax.config import Config
from spt_jax.user_paths import expanded, present


def absolute_paths(config: Config) -> None:
    """Makes the paths of files in a config absolute, so that a restore works from any folder; the config is changed.

    Raises:
        UserError: A path cannot be looked up.
    """
    for section, name in (("model", "source"), ("data", "train"), ("data", "development"), ("data", "test")):
        value = config[section][name]
        # A home is the same from any folder.
        if value and not value.startswith("~") and present(Path(value), f"{section}.{name}"):
            config[section][name] = str(Path(value).absolute())
    if config.bank.init == "peft":
        # JAX is needed for this alone; a sweep's workers do without.
        from spt_jax.prompting.peft_prompts import absolute_source

        config.bank.init_file = absolute_source(config.bank.init_file)
    elif config.bank.init_file:
        config.bank.init_file = str(expanded(config.bank.init_file, "bank.init_file").absolute())

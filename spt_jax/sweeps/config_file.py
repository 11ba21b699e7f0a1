"""A configuration as a Python file that ``spt-jax train --config`` takes."""

from __future__ import annotations

import spt_jax
from spt_jax.config import Config, default_config, flatten


def config_file(config: Config, title: str) -> str:
    """The text of a file whose ``get_config()`` gives exactly `config`: the defaults, and what differs from them.

    Args:
        config: A valid configuration.
        title: The first line of the file's docstring, one line.
    """
    defaults, values = flatten(default_config()), flatten(config)
    differing = {name: value for name, value in values.items() if value != defaults[name]}
    lines = [f"    config.{name} = {value!r}" for name, value in differing.items()]
    # The title may quote a path; it must not end the docstring.
    title = title.replace("\\", "/").replace('"', "'")
    return "\n".join(
        [
            f'"""{title}',
            "",
            f"Written by a sweep of spt_jax {spt_jax.__version__}; spt-jax train --config=FILE --workdir=DIR takes it.",
            '"""',
            "",
            "from spt_jax.config import default_config",
            "",
            "",
            "def get_config():",
            '    """The configuration."""',
            "    config = default_config()",
            *lines,
            "    return config",
            "",
        ]
    )

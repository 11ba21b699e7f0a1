"""The package's defaults as a config file, the smallest there can be: copy it to begin your own.

    spt-jax train --config=configs/common.py --workdir=runs/defaults

docs/configuration.md lists every option.
"""

from spt_jax.config import default_config


def get_config():
    """The defaults."""
    return default_config()

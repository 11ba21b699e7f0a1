"""What every config starts from: the package's defaults. Run nothing with it; import it."""

from spt_jax.config import default_config


def get_config():
    """The defaults; see docs/configuration.md."""
    return default_config()

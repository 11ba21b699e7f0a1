"""``python -m spt_jax`` is the command ``spt-jax``."""

from spt_jax.commands.main import run

if __name__ == "__main__":
    run()

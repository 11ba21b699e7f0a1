"""Sweeps over options of a configuration: ``python launch/sweep.py --help``, and docs/sweeps.md."""

import sys

from spt_jax.commands.terminal import OutputError, flushed, never_miss_an_interrupt, prepare_streams, unwritable


def main() -> int:
    """Runs the program; returns its exit code."""
    never_miss_an_interrupt("sweep")
    prepare_streams()
    try:
        return flushed(_sweep(), "sweep")
    except (BrokenPipeError, OutputError) as error:
        return unwritable(error, "sweep")


def _sweep() -> int:
    try:
        import optuna  # noqa: F401
    except ImportError:
        print(
            "sweep: a sweep needs Optuna; install spt_jax with the extra sweep: pip install '.[sweep]'", file=sys.stderr
        )
        return 2
    from spt_jax.sweeps.door import main as run

    return run(__file__, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

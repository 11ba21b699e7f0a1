"""Sweeps over options of a configuration: ``python launch/sweep.py --help``, and docs/sweeps.md."""

import sys


def main() -> int:
    """Runs the program; returns its exit code."""
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

"""The flags of a command that may run as several processes, and what becomes of its errors then."""

from __future__ import annotations

import contextlib
import math
import os
import time
import traceback
from collections.abc import Iterator
from functools import partial
from typing import Any

from absl import flags

from spt_jax.commands.failures import sentence_of
from spt_jax.exit_codes import FAILED

_PATIENCE_SECONDS = 3.0
"""An error that is no user's may be the echo of a peer's end, which its connection tells soon."""


def define_joining_flags(flag_values: flags.FlagValues) -> None:
    """Adds --distributed and --heartbeat."""
    fv: dict[str, Any] = {"flag_values": flag_values}
    flags.DEFINE_string(
        "distributed",
        "auto",
        "How several processes become one run: auto takes the settings of TPU hosts, SLURM, Open MPI, Kubernetes or "
        "JAX_COORDINATOR_ADDRESS; off; or HOST:PORT,PROCESSES,INDEX, or HOST:PORT alone under a launcher.",
        **fv,
    )
    define_seconds("heartbeat", 30.0, "Seconds of silence after which another process counts as lost.", flag_values)


def define_seconds(name: str, default: float, text: str, flag_values: flags.FlagValues) -> None:
    """Adds a flag of between one second and a day."""
    flags.DEFINE_float(name, default, text, lower_bound=1.0, upper_bound=86_400.0, flag_values=flag_values)
    # The bounds let nan pass.
    flags.register_validator(name, math.isfinite, flag_values=flag_values)


@contextlib.contextmanager
def joined_processes(name: str, flag_values: flags.FlagValues) -> Iterator[None]:
    """Joins the processes that the flags, or the launcher, speak of; an error of one of them ends all.

    Args:
        name: The command, for messages.
        flag_values: With the flags of `define_joining_flags`.

    Raises:
        UserError: The flags, or the launcher's settings, cannot be used.
    """
    from spt_jax.parallel.launchers import find_launch

    given: Any = flag_values.flag_values_dict()
    launch = find_launch(given["distributed"], os.environ)
    if launch is None:
        yield
        return
    from spt_jax.parallel.distributed import joined
    from spt_jax.parallel.peers import end_process

    with joined(launch, silence_seconds=given["heartbeat"], end=partial(end_process, name)) as peers:
        try:
            yield
        except BaseException as error:
            if peers is None:
                raise
            told = sentence_of(error)
            if told is None:
                time.sleep(_PATIENCE_SECONDS)
                traceback.print_exc()
                first = next(iter(str(error).splitlines()), "")
                told = f"{type(error).__name__}: {first[:200]}; its own output has the traceback", FAILED
            peers.fail(*told)

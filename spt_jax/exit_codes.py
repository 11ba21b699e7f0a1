"""The exit codes of the command ``spt-jax``: a job scheduler tells by them what to do next; see docs/operations.md."""

from __future__ import annotations

FINISHED = 0
"""Everything that was asked for is done."""

FAILED = 1
"""Something that may be over at another try: a process that was lost, a store that did not answer at the start."""

MISTAKE = 2
"""Something must be changed first: a flag, a file, a full disk, a model too large; one sentence says what."""

STOPPED = 75
"""A run was asked to stop and saved, or its bucket could not take its last files: the same command goes on.

It is EX_TEMPFAIL of sysexits.h, "try again later".
"""

INTERRUPTED = 130
"""A second Ctrl-C, or one where nothing is saved; what was saved before is whole."""

TERMINATED = 143
"""SIGTERM where nothing is saved, of a process that a shell or a container runtime would report so."""

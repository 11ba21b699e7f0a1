"""What a user is told of an error that ends a command."""

from __future__ import annotations

from spt_jax.errors import UserError
from spt_jax.exit_codes import INTERRUPTED, MISTAKE

_SMALLER = (
    "less is needed with a smaller data.batch or evaluation.batch (--batch), a larger optimizer.micro_batches, "
    "model.remat = full, model.quantization, a smaller model.max_logit_rows, or more devices (mesh.fsdp); where "
    "another process shares a GPU, see XLA_PYTHON_CLIENT_PREALLOCATE"
)


def sentence_of(error: BaseException) -> tuple[str, int] | None:
    """The sentence and the exit code of an error that a user can mend; None for one of the program's own."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if _memory_is_full(error):
        first = next(iter(str(error).splitlines()), "the host's memory is full")
        return f"out of memory ({first[:200]}); {_SMALLER}", MISTAKE
    return None


def _memory_is_full(error: BaseException) -> bool:
    """Whether XLA, or Python, found no memory; JAX need not have been imported to ask."""
    return isinstance(error, MemoryError) or (
        type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
        and ("RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error))
    )

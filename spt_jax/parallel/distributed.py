"""Several processes as one program: joining, agreeing, and leaving together."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spt_jax.errors import UserError
from spt_jax.parallel.launchers import LAST_PORT, Launch
from spt_jax.parallel.peers import End, Peers, connect, listening, serve

JOIN_SECONDS = 300
"""How long a process waits for the others to start; a queue may start hosts minutes apart."""

TOLD_AT_ONCE = 64 * 2**20
"""Bytes that the devices take, once each, when the first process tells the others something."""

_PUBLISHED = "spt_jax/peers"


def is_lead() -> bool:
    """Whether this process says, shows and writes what is said, shown and written once."""
    return jax.process_index() == 0


@contextlib.contextmanager
def joined(
    launch: Launch | None, *, silence_seconds: float, end: End, join_seconds: float = JOIN_SECONDS
) -> Iterator[Peers | None]:
    """Makes this process one of several for as long as the context is open.

    After an error inside, call `Peers.fail`, which ends the process: to leave the context waits for the others.

    Args:
        launch: How to join; None leaves the process alone.
        silence_seconds: A process that has not been heard for so long is lost.
        end: See `spt_jax.parallel.peers.Peers`.
        join_seconds: How long to wait for the others.

    Yields:
        The connection to the others; None for a process alone.

    Raises:
        UserError: The launcher's settings cannot be used. Where the others do not come, or cannot be reached, which
            another start may mend, this process ends with 1 instead.
    """
    if launch is None or not _initialize(launch, silence_seconds, join_seconds, end):
        yield None
        return
    if jax_distributed.global_state.num_processes == 1:
        yield None
        jax.distributed.shutdown()
        return
    # Before the devices are asked for anything, which would wait for a process that is gone already.
    peers = _watched(silence_seconds, join_seconds, end)
    yield peers
    barrier("leaving")
    peers.close()
    jax.distributed.shutdown()


def _initialize(launch: Launch, silence_seconds: float, join_seconds: float, end: End) -> bool:
    """Connects to JAX's coordination service; False where a TPU host turns out to be the only one."""
    where = f" at {launch.coordinator}" if launch.coordinator else ""
    who = "" if launch.index is None else f" (this is process {launch.index} of {launch.count})"
    alone = (
        f"the processes did not find one another{where} within {join_seconds:g} seconds{who}; every one must be "
        "started, with the same address, and the port be open on the host of process 0"
    )
    if launch.index == 0 and launch.coordinator and _is_taken(launch.coordinator):
        # JAX's service would end this process by a segmentation fault.
        end(f"the port of {launch.coordinator} is taken{who}; free it, or give every process another", 1, True)
    # JAX waits in a call that aborts the process with a stack trace in the end; so it is not left to come to that.
    patience = threading.Timer(join_seconds, end, (alone, 1, True))
    patience.daemon = True
    patience.start()
    # SIGTERM is ours: JAX's notifier would swallow it before the training loop asks, and there for Ctrl-C do nothing.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.count,
            launch.index,
            local_device_ids=launch.local_devices,
            cluster_detection_method=launch.method,
            initialization_timeout=int(join_seconds) + 30,
            # The watch of `Peers` says in a sentence what JAX's service, the last resort, aborts for.
            heartbeat_timeout_seconds=max(10, int(2 * silence_seconds)),
            shutdown_timeout_seconds=60,
        )
    except ValueError as error:
        if launch.found == "TPU" and "should be defined" in str(error):
            return False
        raise UserError(f"the processes cannot be joined by the settings of {launch.found}: {error}") from error
    except RuntimeError as error:
        # Nothing that a queue could not mend by another start: a port that is taken still, a host that died meanwhile.
        reason = " ".join(str(error).split())[:300]
        end(f"the processes cannot be joined{where}{who}: {reason}", 1, True)
        raise
    finally:
        patience.cancel()
    return True


def _is_taken(address: str) -> bool:
    """Whether another program listens at the port of an address of this host."""
    port = address.rpartition(":")[2]
    if not port.isdecimal() or int(port) > LAST_PORT:
        return False  # JAX says what is wrong with it
    try:
        listening(int(port)).close()
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def _watched(silence_seconds: float, join_seconds: float, end: End) -> Peers:
    # JAX has no public way to its service's store of keys and values, which Orbax uses the same way.
    state = jax_distributed.global_state
    client: Any = state.client
    index, count, address = state.process_id, state.num_processes, str(state.coordinator_address)
    try:
        if index == 0:
            links = serve(count, functools.partial(client.key_value_set, _PUBLISHED), join_seconds)
        else:
            published = client.blocking_key_value_get(_PUBLISHED, int(1000 * join_seconds))
            links = connect(index, address.rsplit(":", 1)[0], published, join_seconds)
    except (OSError, RuntimeError) as error:
        end(
            f"process {index} of {count} ({socket.gethostname()}) cannot reach the others beside {address}: "
            f"{' '.join(str(error).split())[:300]}; the hosts must accept connections from one another on any port",
            1,
            True,
        )
        raise
    return Peers(index, links, count, silence_seconds, end)


def barrier(name: str) -> None:
    """Waits until every process has come here; a process alone does not wait."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; every process must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def told_by_lead(content: bytes) -> bytes:
    """What the first process has, on every process; all must ask. What the others have is not looked at."""
    if jax.process_count() == 1:
        return content
    length = int.from_bytes(_broadcast(len(content).to_bytes(8, "little"), 8), "little")
    starts = range(0, length, TOLD_AT_ONCE)
    return b"".join(_broadcast(content[i : i + TOLD_AT_ONCE], min(TOLD_AT_ONCE, length - i)) for i in starts)


def json_told_by_lead(value: Any) -> Any:
    """A JSON value of the first process, on every process, where tuples are lists; all must ask."""
    return json.loads(told_by_lead(json.dumps(value).encode()))


def _broadcast(content: bytes, length: int) -> bytes:
    mine = np.frombuffer(content, np.uint8) if is_lead() else np.zeros(length, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).tobytes()


def on_host(tree: Any) -> Any:
    """A tree's arrays as NumPy arrays, whole on every process; all must ask for it where one is spread over hosts."""

    def gathered(array: Any) -> Any:
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            return multihost_utils.process_allgather(array, tiled=True)
        return array

    return jax.device_get(jax.tree.map(gathered, tree))  # all arrays at once


def one_at_a_time(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step itself, or on the CPUs of several processes one that waits for its end.

    There programs queued behind one another may each wait for the other's processes (seen with jax 0.10.2).
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return step
    return lambda *arguments: jax.block_until_ready(step(*arguments))


class SharedFlag:
    """A flag that any process may raise, of which all learn at the same call.

    With several processes an answer is the one to the call before: the devices, which compute it, need not be waited
    for. A process alone has its own answer at once.
    """

    def __init__(self) -> None:
        self._several = jax.process_count() > 1
        if self._several:
            mesh = Mesh(np.asarray(jax.devices()), ("devices",))
            self._spread = NamedSharding(mesh, PartitionSpec("devices"))
            self._any = one_at_a_time(jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec())))
        self._asked: jax.Array | None = None
        self._raised = False

    def ask(self, raised: bool) -> bool:
        """Whether any process had raised its flag by the call before; every process must ask equally often."""
        if not self._several:
            return raised
        mine = np.full(jax.local_device_count(), raised, np.int32)
        answer = self._any(jax.make_array_from_process_local_data(self._spread, mine))
        before, self._asked = self._asked, answer
        self._raised = self._raised or (before is not None and bool(before))
        return self._raised

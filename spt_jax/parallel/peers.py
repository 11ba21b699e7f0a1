"""Every process of a job learns at once when another one ends, and why.

JAX's own service notices a dead process after a time without heartbeats, or not before the next collective, and then
aborts the others from the inside with a stack trace. Here a thread of each process holds a connection to process 0: a
process that is killed closes it, one that fails says why first, and a host that vanishes stops sending.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

_HELLO_SECONDS = 10.0
"""How long a connection may take to say whose it is, and process 0 to answer a failure."""
_DELIVERY_SECONDS = 0.2
_AGAIN_SECONDS = 0.5
"""Between two attempts to reach process 0."""


@dataclasses.dataclass
class _Link:
    """A connection to another process."""

    index: int
    host: str
    socket: socket.socket
    heard: float = dataclasses.field(default_factory=time.monotonic)
    unread: bytes = b""
    done: bool = False


End = Callable[[str, int, bool], None]
"""Ends this process: with what sentence, with what exit code, and whether this process shall say it."""


class Peers:
    """This process's connection to the others; all of them through process 0.

    Args:
        index: This process.
        links: Process 0: one to each of the others; another process: one to process 0.
        count: Number of processes.
        silence_seconds: A process that has not been heard for so long is lost.
        end: Called on the watching thread when another process is gone or has failed.
    """

    def __init__(self, index: int, links: list[_Link], count: int, silence_seconds: float, end: End) -> None:
        self._index, self._count, self._silence, self._end = index, count, silence_seconds, end
        self._links = links
        self._ending = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def fail(self, sentence: str, code: int) -> None:
        """Ends all processes because this one failed; process 0 alone says why, once.

        Args:
            sentence: What went wrong.
            code: The exit code of all.
        """
        if self._index:
            # Process 0 answers with the end of everything, which the watching thread obeys.
            self._send(self._links[0], {"failed": sentence, "code": code})
            self._thread.join(_HELLO_SECONDS)
            self._end(sentence, code, True)
        else:
            self._ending.acquire()  # whatever the others report from now on comes too late
            self._tell_end(sentence, code, said=True)

    def close(self) -> None:
        """Leaves in peace; the others do not take it for a loss."""
        self._closed.set()
        self._send_all({"done": True})
        self._thread.join()
        for link in self._links:
            link.socket.close()

    def _watch(self) -> None:
        # A third of the silence at most, so that one message that is late is no loss.
        interval, pause = min(1.0, self._silence / 3), 0.1
        with selectors.DefaultSelector() as selector:
            for link in self._links:
                selector.register(link.socket, selectors.EVENT_READ, link)
            told = 0.0
            while not self._closed.is_set():
                for key, _ in selector.select(pause):
                    if self._receive(key.data):
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                if now - told >= interval:
                    self._send_all({})
                    told = now
                for link in self._links:
                    if not link.done and now - link.heard > self._silence:
                        self._lost(link, f"has not been heard for {self._silence:g} seconds")

    def _receive(self, link: _Link) -> bool:
        """Reads what there is; True at the end of the connection."""
        try:
            content = link.socket.recv(1 << 16)
        except OSError:
            content = b""
        link.heard = time.monotonic()
        *lines, link.unread = (link.unread + content).split(b"\n")
        for line in lines:
            self._obey(link, json.loads(line))
        if not content and not link.done:
            self._lost(link, "is gone: it was killed, or its host is down")
        return not content

    def _obey(self, link: _Link, message: Mapping[str, Any]) -> None:
        if message.get("done"):
            link.done = True
        elif "failed" in message:
            sentence = f"on {self._name(link)}: {message['failed']}"
            self._end_all(sentence, message["code"], said=True)
        elif "end" in message:
            self._end(message["end"], message["code"], not message["said"])

    def _lost(self, link: _Link, how: str) -> None:
        sentence = (
            f"{self._name(link)} {how}, so the others stopped too; its own output may say more. What was saved "
            "is intact: start the same command on every host again to go on from there"
        )
        self._end_all(sentence, 1, said=False)

    def _end_all(self, sentence: str, code: int, *, said: bool) -> None:
        """Tells the others, if this is process 0; `said` when that is enough for them to be silent."""
        if self._ending.acquire(blocking=False):
            self._tell_end(sentence, code, said=said)

    def _tell_end(self, sentence: str, code: int, *, said: bool) -> None:
        self._send_all({"end": sentence, "code": code, "said": said})
        if self._index == 0:
            # A connection that closes with something unread drops what it has not delivered. The others have nobody to
            # tell, and hurry: JAX's service, gone with process 0, makes its clients abort with a stack trace.
            time.sleep(_DELIVERY_SECONDS)
        self._end(sentence, code, True)

    def _name(self, link: _Link) -> str:
        return f"process {link.index} of {self._count} ({link.host})"

    def _send_all(self, message: Mapping[str, Any]) -> None:
        for link in self._links:
            self._send(link, message)

    def _send(self, link: _Link, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # whoever cannot be reached is found lost by what it does not send
            link.socket.sendall(json.dumps(message).encode() + b"\n")


def serve(count: int, publish: Callable[[str], None], join_seconds: float) -> list[_Link]:
    """Process 0's side: waits until every other process has connected.

    Args:
        count: Number of processes.
        publish: Makes a text known to the others.
        join_seconds: How long to wait for all.

    Raises:
        TimeoutError: Not all came.
    """
    token = secrets.token_hex(16)  # whoever else finds the port is not listened to
    deadline = time.monotonic() + join_seconds
    links: dict[int, _Link] = {}
    with listening(0, count) as server:
        publish(f"{server.getsockname()[1]} {token}")
        while len(links) < count - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            connection, _ = server.accept()
            hello = _hello(connection)
            if hello.get("token") == token:
                links[hello["index"]] = _Link(hello["index"], hello["host"], connection)
            else:
                connection.close()
    return [links[index] for index in sorted(links)]


def connect(index: int, host: str, published: str, join_seconds: float) -> list[_Link]:
    """Another process's side.

    Args:
        index: This process.
        host: Of process 0.
        published: What process 0 made known.
        join_seconds: How long to try.

    Raises:
        OSError: Process 0 cannot be reached.
    """
    port, token = published.split()
    connection = _reached((host.strip("[]"), int(port)), time.monotonic() + join_seconds)
    hello = {"index": index, "host": socket.gethostname(), "token": token}
    connection.sendall(json.dumps(hello).encode() + b"\n")
    connection.settimeout(_HELLO_SECONDS)
    return [_Link(0, host, connection)]


def listening(port: int, backlog: int | None = None) -> socket.socket:
    """A server on every address of this host, of both families where it has both; port 0 is one that is free.

    Raises:
        OSError: The port cannot be had.
    """
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=backlog)


def _reached(address: tuple[str, int], deadline: float) -> socket.socket:
    """A connection, tried for until the deadline: a name may not be known yet, or a network have its moment."""
    while True:
        try:
            return socket.create_connection(address, timeout=max(0.01, deadline - time.monotonic()))
        except OSError:
            if time.monotonic() + _AGAIN_SECONDS > deadline:
                raise
            time.sleep(_AGAIN_SECONDS)


def _hello(connection: socket.socket) -> Mapping[str, Any]:
    """The first line of a connection; empty when it is none of ours."""
    connection.settimeout(_HELLO_SECONDS)
    content = b""
    try:
        while not content.endswith(b"\n") and len(content) < 4096:
            if not (more := connection.recv(1)):  # one byte a time: what follows the line belongs to the watch
                break
            content += more
        hello = json.loads(content)
    except (OSError, ValueError):
        return {}
    return hello if isinstance(hello, dict) else {}


def end_process(name: str, sentence: str, code: int, said_here: bool) -> None:
    """Ends this process at once, from any thread, after saying why.

    An orderly exit would wait in JAX's own shutdown for processes that are no more.
    """
    if said_here:
        print(f"{name}: {sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)

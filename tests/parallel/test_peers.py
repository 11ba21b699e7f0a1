"""Connections between threads that stand for processes: who ends, of whose fault, and who says it."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from spt_jax.parallel import peers
from spt_jax.parallel.peers import Peers, connect, serve

Ends = list["queue.Queue[tuple[str, int, bool]]"]


class Star:
    """`count` ends of the connections in one process; what would end each lands in its queue."""

    def __init__(self, count: int, silence_seconds: float = 30.0) -> None:
        self.ends: Ends = [queue.Queue() for _ in range(count)]
        published: queue.Queue[str] = queue.Queue()
        links = {}

        def join(index: int, text: str) -> None:
            links[index] = connect(index, "127.0.0.1", text, 10)

        def publish(text: str) -> None:
            published.put(text)
            for index in range(1, count):
                threading.Thread(target=join, args=(index, text)).start()

        links[0] = serve(count, publish, 10)
        while len(links) < count:
            time.sleep(0.01)
        self.peers = [Peers(i, links[i], count, silence_seconds, self._end(i)) for i in range(count)]

    def _end(self, index: int) -> Callable[[str, int, bool], None]:
        return lambda *end: self.ends[index].put(end)

    def end_of(self, index: int) -> tuple[str, int, bool]:
        return self.ends[index].get(timeout=10)

    def kill(self, index: int) -> None:
        """What the kernel does to the connections of a process that is gone."""
        self.peers[index]._closed.set()
        self.peers[index]._thread.join()
        for link in self.peers[index]._links:
            link.socket.close()

    def still(self) -> bool:
        return all(end.empty() for end in self.ends)


@pytest.fixture
def star() -> Iterator[Star]:
    made = Star(3)
    yield made
    for index in range(3):
        made.kill(index)


def test_a_process_that_cannot_reach_the_first_at_once_tries_again(monkeypatch):
    attempts = []
    reach = socket.create_connection

    def busy(address: tuple[str, int], timeout: float) -> socket.socket:
        attempts.append(timeout)
        if len(attempts) < 3:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return reach(address, timeout)

    monkeypatch.setattr(peers, "_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(socket, "create_connection", busy)
    star = Star(2)
    assert len(attempts) == 3
    star.kill(0)
    star.kill(1)
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: attempts.append(timeout) or busy([], 0))
    attempts.clear()
    with pytest.raises(OSError, match="Temporary"):
        peers.connect(1, "127.0.0.1", "1 token", 0.005)
    assert 0 < attempts[0] <= 0.01


def test_a_process_that_is_gone_ends_all_others_who_all_say_which(star):
    star.kill(2)
    for index in (0, 1):
        sentence, code, says = star.end_of(index)
        assert sentence.startswith("process 2 of 3 (")
        assert "is gone" in sentence
        assert (code, says) == (1, True)


def test_the_first_process_is_missed_by_all_others(star):
    star.kill(0)
    for index in (1, 2):
        sentence, code, says = star.end_of(index)
        assert sentence.startswith("process 0 of 3 (127.0.0.1) is gone")
        assert (code, says) == (1, True)


def test_a_failure_is_said_once_by_the_first_process(star):
    threading.Thread(target=star.peers[1].fail, args=("data.train is empty", 2)).start()
    sentence, code, says = star.end_of(0)
    assert sentence.startswith("on process 1 of 3 (") and sentence.endswith("): data.train is empty")
    assert (code, says) == (2, True)
    assert star.end_of(2)[1:] == (2, False)
    assert star.end_of(1)[1:] == (2, False)


def test_a_failure_of_all_at_once_is_said_once(star):
    for index in (2, 1, 0):
        threading.Thread(target=star.peers[index].fail, args=("data.train is empty", 2), daemon=True).start()
    assert "data.train is empty" in star.end_of(0)[0]
    assert star.end_of(1)[2] is star.end_of(2)[2] is False
    with pytest.raises(queue.Empty):
        star.ends[0].get(timeout=0.5)


def test_a_failure_of_the_first_process_is_said_by_it(star):
    star.peers[0].fail("data.train is empty", 2)
    assert star.end_of(0) == ("data.train is empty", 2, True)
    assert star.end_of(1)[1:] == star.end_of(2)[1:] == (2, False)


def test_leaving_in_peace_is_no_loss_in_any_order():
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        star = Star(3)
        for index in order:
            star.peers[index].close()
        assert star.still()


def test_a_silent_process_is_lost_and_one_that_only_waits_is_not():
    star = Star(3, silence_seconds=3.0)
    time.sleep(4.5)
    assert star.still()
    star.peers[1]._closed.set()  # its thread ends, its connection stays open: a host that vanished
    sentence, code, _ = star.end_of(0)
    assert sentence.startswith("process 1 of 3 (") and "has not been heard for 3 seconds" in sentence
    assert code == 1
    assert star.end_of(2)[0] == sentence
    for index in range(3):
        star.kill(index)


def test_a_stranger_at_the_port_is_not_listened_to():
    links = []

    def publish(text: str) -> None:
        port, token = text.split()
        strangers = [connect(1, "127.0.0.1", f"{port} {'0' * len(token)}", 10)]
        links.extend([*strangers, connect(1, "127.0.0.1", text, 10)])

    (link,) = serve(2, publish, 10)
    assert link.socket.getpeername()[1] == links[1][0].socket.getsockname()[1]
    for end in (link, links[0][0], links[1][0]):
        end.socket.close()


def test_processes_that_do_not_come_are_not_waited_for_forever():
    with pytest.raises(TimeoutError):
        serve(2, lambda text: None, 0.2)

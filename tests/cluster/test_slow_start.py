"""Ray that comes up slowly is waited for; every other error is the user's at once."""

import logging
import socket
from collections.abc import Iterator

import pytest

from cluster.slow_start import ATTEMPTS, start_patiently, wait_for_head
from tests.cluster.ray_head import free_ports

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


def errors_of(*errors: Exception | None) -> tuple[list[str], BaseException | None]:
    """What was called, and what came of it, where the starts one after the other end with `errors`."""
    calls, left = [], list(errors)

    def start() -> None:
        calls.append("start")
        if error := left.pop(0):
            raise error

    try:
        start_patiently(start, lambda: calls.append("clean up"))
    except Exception as error:  # noqa: BLE001 - it is what is looked at
        return calls, error
    return calls, None


@pytest.mark.parametrize("slow", [Exception(SLOW), TimeoutError("no answer"), RuntimeError("Failed to start GCS.")])
def test_a_slow_start_is_tried_again(slow: Exception, caplog: pytest.LogCaptureFixture) -> None:
    assert errors_of(slow, slow, None) == (["start", "clean up", "start", "clean up", "start"], None)
    assert str(slow)[:20] in caplog.text


def test_one_that_never_comes_up_says_why() -> None:
    calls, error = errors_of(*[Exception(SLOW)] * ATTEMPTS)
    assert calls == ["start", "clean up"] * ATTEMPTS
    assert isinstance(error, ConnectionError)
    assert SLOW in str(error)


def test_other_errors_are_not_tried_again() -> None:
    wrong = ValueError("object_store_memory is too small")
    assert errors_of(wrong) == (["start"], wrong)


class Opens(logging.Handler):
    """Begins to listen at a port with the first word that nobody does."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port
        self.told: list[str] = []
        self.servers: list[socket.socket] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Open the port."""
        self.told.append(record.getMessage())
        self.servers.append(socket.create_server(("127.0.0.1", self._port)))


@pytest.fixture
def late_head() -> Iterator[tuple[int, Opens]]:
    """A port, and who opens it."""
    [port] = free_ports(1)
    opens, logger = Opens(port), logging.getLogger("cluster.slow_start")
    logger.addHandler(opens)
    yield port, opens
    logger.removeHandler(opens)
    for server in opens.servers:
        server.close()


def test_a_head_that_listens_late_is_waited_for(late_head: tuple[int, Opens]) -> None:
    port, opens = late_head
    wait_for_head("127.0.0.1", port)
    [told] = opens.told
    assert f"127.0.0.1:{port}" in told
    wait_for_head("127.0.0.1", port)
    assert opens.told == [told], "nothing is said of one that listens"


def test_a_head_that_never_listens_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.slow_start.HEAD_PATIENCE_S", 0.2)
    [port] = free_ports(1)
    with pytest.raises(ConnectionRefusedError):
        wait_for_head("127.0.0.1", port)


def test_a_host_that_does_not_exist_is_not_waited_for(late_head: tuple[int, Opens]) -> None:
    _, opens = late_head
    with pytest.raises(socket.gaierror):
        wait_for_head("no-such-host.invalid", 6379)
    assert opens.told == []

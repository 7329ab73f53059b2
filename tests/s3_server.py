"""A real S3 server in a process of its own, behind a connection that can be cut."""

import contextlib
import os
import secrets
import socket
import subprocess
import sysconfig
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
BUCKET = "reelquant-tests"
SECRET = f"secret-{secrets.token_hex(12)}"
"""Must never be seen again outside of the environment."""


class S3Server:
    """moto's server, and a relay in front of it: while the relay is cut, connections break and new ones are refused."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._port = 0
        self._lose_answers = self._pass_answers = 0
        self.credentials_expired = False
        """Answer as S3 does to a token whose hour is over."""
        self.connect()

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {
            "AWS_ACCESS_KEY_ID": "key-of-the-tests",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_ALLOW_HTTP": "true",
        }

    def connect(self) -> None:
        """Let clients through, at the same port as before."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Break all connections and refuse new ones."""
        assert self._listener is not None
        # Wakes the thread that accepts, which holds the port otherwise.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def lose_answers(self, num: int, *, after: int = 0) -> None:
        """Break the connection instead of passing the server's answers on, the first `after` excepted."""
        self._lose_answers, self._pass_answers = num, after

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._address)
            self._open |= {client, server}
            for source, target, answers in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._relay, args=(source, target, answers), daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self.credentials_expired and not answers:
                    head = f"HTTP/1.1 403 Forbidden\r\nContent-Length: {len(EXPIRED)}\r\nConnection: close\r\n\r\n"
                    source.sendall(head.encode() + EXPIRED)
                    break
                if answers and self._lose_answers > 0:
                    if self._pass_answers == 0:
                        self._lose_answers -= 1
                        break
                    self._pass_answers -= 1
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            self._open.discard(end)


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[S3Server]:
    """A server with one empty bucket; its output goes to `log`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = Path(sysconfig.get_path("scripts")) / "moto_server"
    with log.open("wb") as output:
        process = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stdout=output, stderr=output)
    try:
        _create_bucket(process, f"http://127.0.0.1:{port}/{BUCKET}")
        server = S3Server(("127.0.0.1", port))
        yield server
        server.cut()
    finally:
        process.kill()
        process.wait()


def _create_bucket(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, "the S3 server did not start: pip install 'moto[server]'"
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=10).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def new_prefix(name: str) -> str:
    """URL of a run that nobody else has."""
    return f"s3://{BUCKET}/{secrets.token_hex(4)}/{name}"


def with_settings(server: S3Server, **settings: str) -> dict[str, str]:
    """The environment of a process that uses the server."""
    return {**os.environ, **server.environment, **settings}

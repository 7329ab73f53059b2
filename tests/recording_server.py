"""An HTTP server that refuses everything and remembers what it was asked: a stranger's proxy, or a dashboard."""

import contextlib
import http.server
import threading
from collections.abc import Iterator


class RecordingServer(http.server.ThreadingHTTPServer):
    """Answers 503."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[str] = []
        """Request line and headers of each, as text."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: RecordingServer

    def _refuse(self) -> None:
        self.server.requests.append(f"{self.requestline}\n{self.headers}")
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = _refuse

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def recording_server() -> Iterator[RecordingServer]:
    """A server that is gone in the end."""
    with RecordingServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()

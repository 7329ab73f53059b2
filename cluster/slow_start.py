"""Starting Ray on a busy machine: its daemons may take longer than Ray waits for them, and come up at the next try.
The head of a cluster that was started at the same time may not listen yet."""

import logging
import socket
import time
from collections.abc import Callable

_logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Each takes up to half a minute, which is as long as Ray waits."""
HEAD_PATIENCE_S = 60.0
"""How long the head of a cluster is waited for."""
_SLOW = (
    "timed out",
    "timeout",
    "failed to start",
    "failed to startup",
    "failed to connect to gcs",
    "node_ip_address.json",
)
"""In Ray's words, which has no exception of its own for it."""


def start_patiently(start: Callable[[], object], clean_up: Callable[[], object]) -> None:
    """Call `start`, which starts Ray or connects to it, until Ray has come up.

    Args:
        start: raises what Ray raises.
        clean_up: ends what a failed `start` has left.

    Raises:
        ConnectionError: Ray has not come up in `ATTEMPTS` tries.
        Exception: every other error of `start`, at once.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            start()
        except Exception as error:
            words = " ".join(str(error).split())
            if not (isinstance(error, TimeoutError) or any(text in words.lower() for text in _SLOW)):
                raise
            clean_up()
            if attempt == ATTEMPTS:
                raise ConnectionError(
                    f"Ray has not come up in {ATTEMPTS} tries ({words[:300]}): the machine is too busy or short of memory; end "
                    "what else runs on it, then run the same command again"
                ) from error
            _logger.warning("Ray is slow to come up, try %d of %d: %s", attempt, ATTEMPTS, words[:300])
        else:
            return


def wait_for_head(host: str, port: int) -> None:
    """Wait until somebody listens at a cluster's address, `HEAD_PATIENCE_S` at most, and say so once.

    Raises:
        OSError: why nobody could be reached; at once where there is no such host.
    """
    deadline, told = time.monotonic() + HEAD_PATIENCE_S, False
    while True:
        try:
            socket.create_connection((host, port), timeout=10.0).close()
        except socket.gaierror:
            raise
        except OSError as error:
            if time.monotonic() > deadline:
                raise
            if not told:
                wait = "nobody listens at %s:%d yet (%s): waiting up to %.0f s for the head of the cluster to come up"
                _logger.warning(wait, host, port, error, HEAD_PATIENCE_S)
                told = True
            time.sleep(min(0.5, HEAD_PATIENCE_S / 10))
        else:
            return

"""Starting Ray on a busy machine: its daemons may take longer than Ray waits for them, and come up at the next try."""

import logging
from collections.abc import Callable

_logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Each takes up to half a minute, which is as long as Ray waits."""
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

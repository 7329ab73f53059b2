"""What a session changes in the driver's process, and takes back at its end."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray._private import ray_constants
from ray._private import worker as ray_driver
from ray._raylet import AuthenticationTokenLoader, Config

from cluster.session_directory import restrict_token

_logger = logging.getLogger(__name__)

NO_GRPC_PROXY: Mapping[str, str] = {"RAY_grpc_enable_http_proxy": "0"}
"""Ray's control service is asked directly: its calls carry the token too."""


@contextlib.contextmanager
def environment(values: Mapping[str, str], removed: tuple[str, ...] = ()) -> Iterator[None]:
    """Set and remove environment variables for a while. Ray caches its settings and its token: both are read anew."""
    names = (*values, *removed, "PYTHONBREAKPOINT")  # Ray sets the last one and leaves it
    before = {name: os.environ.get(name) for name in names}
    for name in removed:
        os.environ.pop(name, None)
    os.environ.update(values)
    _reread_ray_settings()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _reread_ray_settings()


def _reread_ray_settings() -> None:
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def cluster_environment() -> dict[str, str]:
    """What a driver of an existing cluster must have in its environment; Ray finds the token by itself.

    An explicit address never switches authentication on, so its mode is always given. The token is, as Ray has it, the value
    of RAY_AUTH_TOKEN, the content of the file RAY_AUTH_TOKEN_PATH, or that of ~/.ray/auth_token.

    Raises ConnectionError when there is none.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode != "token":
        _logger.warning("RAY_AUTH_MODE is %r: whoever reaches the cluster's ports can run code on it", mode)
        return {"RAY_AUTH_MODE": mode, **NO_GRPC_PROXY}
    if not os.environ.get("RAY_AUTH_TOKEN"):
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        if not path.is_file():
            raise ConnectionError(
                f"no token for the cluster: {path} does not exist; copy the cluster's token there, name its file in "
                "RAY_AUTH_TOKEN_PATH, or set RAY_AUTH_MODE=disabled if the cluster really runs without authentication"
            )
        restrict_token(path)
    return {"RAY_AUTH_MODE": "token", **NO_GRPC_PROXY}


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """Keep the node's address at 127.0.0.1, in this process and in those it starts.

    Ray replaces a loopback address by the machine's own unless this switch is off. It is named for other systems but
    works on all, and this process has read its environment already.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with environment({ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def ray_messages_logged() -> Iterator[None]:
    """Ray prints the cluster's messages ("A worker died ...") into the driver's standard output: log them instead."""

    def log_message(data: dict[str, Any], ignore_prefix: bool) -> None:
        _logger.info("%s: %s", data.get("pid"), " ".join(data["lines"]))

    before = ray_driver.print_to_stdstream
    ray_driver.print_to_stdstream = log_message
    try:
        yield
    finally:
        ray_driver.print_to_stdstream = before


@contextlib.contextmanager
def previous_sigterm_handler_restored() -> Iterator[None]:
    """`ray.init` puts in a SIGTERM handler that raises SystemExit, which closes the session; it is only wanted inside."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def reinstall_sigterm_handler() -> None:
    """Put Python's SIGTERM handler back in front of that of Ray's core, which prints a dump of its stack and ends the process
    before the session is closed."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))

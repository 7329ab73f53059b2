"""Addresses that are never asked through an HTTP proxy.

On many machines `http_proxy` is set and `no_proxy` is not. Clients then send requests for `http://127.0.0.1:8265` to the
proxy, which cannot reach it, and with them the cluster's token, in the clear.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping

_NAMES = ("no_proxy", "NO_PROXY")
"""Clients differ in which of the two they read first."""
_LOOPBACK = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1")
"""Some clients take a range of addresses, others single ones only."""


def loopback_excluded(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables to set so that clients ask no proxy for loopback addresses; other exceptions stay.

    Args:
        variables: an environment, with or without exceptions.
    """
    found = {}
    for name, other in zip(_NAMES, reversed(_NAMES), strict=True):
        present = variables.get(name) or variables.get(other) or ""
        entries = [entry.strip() for entry in present.split(",") if entry.strip()]
        missing = [] if "*" in entries else [host for host in _LOOPBACK if host not in entries]
        found[name] = ",".join([*entries, *missing])
    return found


@contextlib.contextmanager
def without_proxies() -> Iterator[None]:
    """Have this process's HTTP clients ask no proxy at all inside: for requests that carry a token."""
    before = {name: os.environ.get(name) for name in _NAMES}
    os.environ.update(dict.fromkeys(_NAMES, "*"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

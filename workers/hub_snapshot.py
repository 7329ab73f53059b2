"""A model of the Hugging Face Hub at one commit. Every node fetches it by that hash into the Hub's own cache, once: processes
of a node wait for each other at the locks of `huggingface_hub`.

Its settings are the environment's: `HF_HOME` or `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_ENDPOINT`, and `HF_TOKEN` or the login of
`hf auth login`. A token is in no message, and an endpoint without encryption is asked directly, through no proxy, where there
is one.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from httpx2 import HTTPError  # the client of huggingface_hub 2
from huggingface_hub import HfApi, close_session, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

HUB_ERRORS = (HTTPError, HFValidationError, EntryNotFoundError, RevisionResolutionError, OSError)
"""Whatever `huggingface_hub` raises where a repository cannot be read."""
_LOGIN = "set HF_TOKEN, or run `hf auth login`"

_fetching = threading.Event()


@dataclass(frozen=True)
class HubSnapshot:
    """The files of a repository at one commit that a model's loaders read."""

    repo_id: str
    """`owner/name`."""
    commit: str
    """40 hexadecimal digits."""
    files: tuple[str, ...]
    """Names relative to the repository, `/` between their parts."""

    def __str__(self) -> str:
        return f"{self.repo_id} at commit {self.commit}"


class SilentBar(tqdm):
    """A progress bar that is not shown."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]


def model_folder(model: Path | HubSnapshot, *, bars: bool = False) -> Path:
    """The folder of a model on this node; a snapshot is fetched, as far as the cache lacks it.

    Args:
        bars: show progress bars in a terminal.

    Raises:
        OSError: it cannot be fetched; says why, and every way out.
    """
    if isinstance(model, Path):
        return model
    try:
        with fetching():
            folder = fetch_files(model.repo_id, model.commit, model.files, bars=bars)
    except HUB_ERRORS as error:
        raise OSError(f"model: {hub_problem(error, model.repo_id, model.commit)}") from error
    if missing := [name for name in model.files if not (folder / name).is_file()]:
        raise OSError(
            f"model: {folder} lacks {', '.join(missing[:8])} of {model}, and the Hub is not asked or does not answer"
        )
    return folder


@contextlib.contextmanager
def fetching() -> Iterator[None]:
    """`is_fetching` is true inside."""
    _fetching.set()
    try:
        yield
    finally:
        _fetching.clear()


def is_fetching() -> bool:
    """Whether this process is fetching a snapshot. The library itself gives up where no bytes arrive."""
    return _fetching.is_set()


def fetch_files(repo_id: str, commit: str, names: Iterable[str], *, bars: bool = False) -> Path:
    """Fetches files of a repository, as far as the cache lacks them; returns the snapshot's folder in the cache.

    Args:
        bars: show progress bars in a terminal.

    Raises:
        HTTPError, EntryNotFoundError, RevisionResolutionError, ValueError, OSError: `HUB_ERRORS`.
    """
    ask_directly()
    patterns = [escape(name) for name in names]
    shown = None if bars else SilentBar
    return Path(snapshot_download(repo_id, revision=commit, allow_patterns=patterns, tqdm_class=shown))


def ask_directly() -> None:
    """Has this process ask an endpoint `http://...` through no proxy, if it is this machine or there is a token, which the
    proxy would see. Through an encrypted endpoint's tunnel nobody sees it."""
    endpoint = urlsplit(constants.ENDPOINT)
    host, proxies = endpoint.hostname or "", getproxies()
    if endpoint.scheme != "http" or not (proxies.get("http") or proxies.get("all")):
        return
    excluded = [entry.strip() for entry in proxies.get("no", "").split(",") if entry.strip()]
    if host in excluded or "*" in excluded or not (_is_loopback(host) or get_token()):
        return
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join([*excluded, host])
    close_session()  # the library's client has read the environment already


def hub_problem(error: BaseException, repo_id: str, revision: str) -> str:
    """What is wrong with a repository or the way to it, and every way out.

    Args:
        error: one of `HUB_ERRORS`.
        revision: the branch, tag or commit that was asked for.
    """
    page = f"{constants.ENDPOINT}/{repo_id}"
    if isinstance(error, HFValidationError):
        return f"{repo_id} is no id of the Hub, which is owner/name ({error})"
    if isinstance(error, GatedRepoError):
        return (
            f"{repo_id} is gated: open {page} in a browser and accept its terms, then {_LOGIN}, with a token of the account "
            "that was granted access, on every node"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"the Hub has no model {repo_id}, or it is private: see whether {page} opens; for a private one {_LOGIN}, with a "
            "token that may read it"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}{_revisions(repo_id)}: set model_revision to a branch, tag or commit"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return (
            f"the Hub refuses {repo_id} with status {error.response.status_code}: the token is expired, or may not read it. "
            f"For a new one {_LOGIN}"
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
        return f"the Hub answers {repo_id} with status {error.response.status_code}: see whether {page} opens"
    if isinstance(error, OSError) and not isinstance(error, (HTTPError, EntryNotFoundError, ConnectionError)):
        return (
            f"{repo_id} cannot be fetched into the cache {constants.HF_HUB_CACHE} ({_first_line(error)}): free room there, or "
            "set HF_HUB_CACHE to a folder that can be written"
        )
    said = _first_line(error.__cause__ or error)
    cached = ", ".join(_cached_commits(repo_id))
    held = f"set model_revision to a commit that the cache holds ({cached}), or " if cached else ""
    way = "unset HF_HUB_OFFLINE" if constants.is_offline_mode() else f"see whether {page} opens from this machine"
    return (
        f"{repo_id} at {revision} is not in the cache {constants.HF_HUB_CACHE}, and the Hub cannot be asked ({said}): {way}, "
        f"or {held}give a local folder"
    )


def _revisions(repo_id: str) -> str:
    """The branches and tags that a repository has, if the Hub tells."""
    with contextlib.suppress(*HUB_ERRORS):
        refs = HfApi().list_repo_refs(repo_id)
        return f" (it has {', '.join(ref.name for ref in [*refs.branches, *refs.tags][:12])})"
    return ""


def _cached_commits(repo_id: str) -> Iterator[str]:
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "snapshots"
    if folder.is_dir():
        yield from sorted(path.name for path in folder.iterdir())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"

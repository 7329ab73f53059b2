"""Requests to one prefix of an S3 bucket through obstore: credentials from the environment, and patience with outages.

Credentials, region and endpoint are read by obstore from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``, ``AWS_ALLOW_HTTP``; or the instance's role) and nowhere else.

A request that meets no answer, or a server's error, is made again with growing pauses until the store has been silent for
``REELQUANT_STORE_PATIENCE_S``. A put that was answered, but whose answer was lost, looks like somebody else's: the content
is compared.
"""

import errno
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import S3Store

from storage.location import StoreUrl
from storage.run_store import StoreUnreachable

if TYPE_CHECKING:
    from obstore.store import BackoffConfig, ClientConfig

_logger = logging.getLogger(__name__)

PART_BYTES = 16 * 2**20
"""Of an upload in parts, and of a download."""
_MOST_PARTS = 9_000
"""S3 takes 10,000."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_FINAL_STATUS = re.compile(r"status code: 4(?!08|09|29)\d\d")
"""Answers that another try does not change."""
_CODE = re.compile(r"<Code>(\w+)</Code>(?:\s*<Message>([^<]*)</Message>)?")
_INSTANCE_ROLE = "169.254.169.254"
"""Where obstore asks for credentials when the environment has none."""

T = TypeVar("T")


@dataclass(frozen=True)
class StoredObject:
    """An object as a listing or a head shows it."""

    key: str
    """Relative to the prefix."""
    num_bytes: int
    e_tag: str


class Requests:
    """The requests that the store and its lease are made of.

    Raises, from every method: StoreUnreachable when the store stays silent, PermissionError when it refuses the credentials,
    OSError for what it cannot do; FileNotFoundError where a key is read that is not there.
    """

    def __init__(self, url: StoreUrl) -> None:
        self.url = url
        self._patience_s = seconds_from_environment("REELQUANT_STORE_PATIENCE_S", 300.0)
        endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3") or ""
        plain = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes")
        if endpoint.startswith("http://") and not plain:
            raise ValueError(
                f"AWS_ENDPOINT_URL is {endpoint}: over http, which nobody encrypts; use https, or set AWS_ALLOW_HTTP=true"
            )

        self._options: ClientConfig = {"connect_timeout": "5s", "timeout": "60s", "allow_http": plain}
        self._store = self._client(url.key, self._options)

    def get(self, key: str) -> tuple[bytes, str]:
        """Content and e_tag."""

        def request() -> tuple[bytes, str]:
            result = obstore.get(self._store, key)
            return bytes(result.bytes()), str(result.meta["e_tag"])

        return self._attempt(f"reading {key}", request)

    def get_range(self, key: str, offset: int, num_bytes: int) -> memoryview:
        """Fewer bytes only where the object ends."""
        return self._attempt(
            f"reading {num_bytes} bytes of {key}",
            lambda: memoryview(obstore.get_range(self._store, key, start=offset, length=num_bytes)),
        )

    def head(self, key: str) -> StoredObject:
        """Size and e_tag."""
        return self._attempt(f"looking at {key}", lambda: _stored(obstore.head(self._store, key)))

    def put(self, key: str, content: bytes | Path) -> str:
        """Write or replace an object, a large one in parts; returns its e_tag."""
        num_bytes = content.stat().st_size if isinstance(content, Path) else len(content)
        part_bytes = max(PART_BYTES, -(-num_bytes // _MOST_PARTS))
        return self._attempt(
            f"writing {num_bytes} bytes to {key}",
            lambda: str(obstore.put(self._store, key, content, chunk_size=part_bytes, max_concurrency=4)["e_tag"]),
        )

    def copy(self, key: str, source: StoreUrl) -> None:
        """Have the server copy the object ``key`` of another prefix of this bucket; it may have 5 GiB."""
        assert source.bucket == self.url.bucket
        self._attempt(
            f"copying {key} from {source}",
            lambda: obstore.copy(self._bucket, f"{source.key}/{key}", f"{self.url.key}/{key}"),
        )

    def create(self, key: str, data: bytes) -> str:
        """Write an object that must not exist; returns its e_tag.

        Raises:
            FileExistsError: it does, with other content.
        """
        return self._conditional(key, data, "create")

    def replace(self, key: str, data: bytes, *, e_tag: str) -> str:
        """Replace an object that must still have this e_tag; returns the new one.

        Raises:
            FileExistsError: it has another one.
        """
        return self._conditional(key, data, {"e_tag": e_tag})

    def refuses(self, key: str, data: bytes, *, e_tag: str | None) -> bool:
        """Whether the store refuses to create an object that exists (None), or to replace one of another e_tag."""
        mode: Any = "create" if e_tag is None else {"e_tag": e_tag}
        try:
            self._attempt(f"trying a conditional put of {key}", lambda: obstore.put(self._store, key, data, mode=mode))
        except (AlreadyExistsError, PreconditionError):
            return True
        return False

    def delete(self, keys: list[str]) -> None:
        """Those that are not there are fine."""
        if keys:
            self._attempt(f"removing {', '.join(keys[:3])}", lambda: obstore.delete(self._store, keys))

    def list_all(self, prefix: str) -> list[StoredObject]:
        """All objects below a folder (all of the run for an empty name), by key."""

        def request() -> list[StoredObject]:
            pages = obstore.list(self._store, f"{prefix}/" if prefix else None)
            return sorted((_stored(found) for page in pages for found in page), key=lambda found: found.key)

        return self._attempt(f"listing {prefix or 'the run'}", request)

    def list_folder(self, prefix: str) -> tuple[list[str], list[str]]:
        """Names of the objects and of the folders directly in a folder."""

        def request() -> tuple[list[str], list[str]]:
            found = obstore.list_with_delimiter(self._store, f"{prefix}/" if prefix else None)
            objects = [str(entry["path"]).rpartition("/")[2] for entry in found["objects"]]
            return sorted(objects), sorted(str(path).rpartition("/")[2] for path in found["common_prefixes"])

        return self._attempt(f"listing {prefix or 'the run'}", request)

    @cached_property
    def _bucket(self) -> S3Store:
        """For copies between prefixes, which are answered when they are done."""
        return self._client(None, {**self._options, "timeout": "600s"})

    def _client(self, prefix: str | None, options: "ClientConfig") -> S3Store:
        pauses: BackoffConfig = {
            "init_backoff": timedelta(seconds=0.1),
            "max_backoff": timedelta(seconds=1),
            "base": 2,
        }
        return S3Store(
            self.url.bucket,
            prefix=prefix,
            client_options=options,
            retry_config={"max_retries": 1, "retry_timeout": timedelta(seconds=10), "backoff": pauses},
        )

    def _conditional(self, key: str, data: bytes, mode: Any) -> str:
        while True:
            try:
                put = self._attempt(f"writing {key}", lambda: obstore.put(self._store, key, data, mode=mode))
            except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
                try:
                    found, e_tag = self.get(key)
                except FileNotFoundError:
                    if mode == "create":  # removed meanwhile, or 409: two conditional requests at once
                        continue
                    raise FileExistsError(f"{self.url}/{key} is gone") from error
                if found == data:
                    return e_tag
                if mode != "create" and e_tag == mode["e_tag"]:
                    continue
                raise FileExistsError(f"{self.url}/{key} was written by another process") from error
            return str(put["e_tag"])

    def _attempt(self, what: str, request: Callable[[], T]) -> T:
        """The request's answer, however often it must be made."""
        silent_since, pause_s = None, _FIRST_PAUSE_S
        while True:
            try:
                answer = request()
            except (AlreadyExistsError, PreconditionError):
                raise
            except (BaseError, FileNotFoundError) as error:
                if final := self._final(what, error):
                    raise final from None
                now = time.monotonic()
                if silent_since is None:
                    silent_since = now
                    _logger.warning("%s does not answer: %s; trying on", self.url, _reason(error))
                if now - silent_since >= self._patience_s:
                    raise self._unreachable(what, now - silent_since, _reason(error)) from None
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                if silent_since is not None:
                    _logger.warning("%s answers again after %.0f s", self.url, time.monotonic() - silent_since)
                return answer

    def _final(self, what: str, error: Exception) -> Exception | None:
        """What to raise for an error that another try does not change; None for the others."""
        text = str(error)
        if "NoSuchBucket" in text:
            return ValueError(f"{self.url}: there is no bucket {self.url.bucket}: create it, or name another")
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(errno.ENOENT, f"not in {self.url}", what)
        if _INSTANCE_ROLE in text or isinstance(error, PermissionDeniedError | UnauthenticatedError):
            reason = "no credentials in the environment, and no role of this machine" if _INSTANCE_ROLE in text else ""
            return PermissionError(
                f"{self.url} refuses {what} ({reason or _reason(error)}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and "
                "AWS_REGION) in the environment of every machine, or give them a role that may read, write, list and delete"
            )
        if not isinstance(error, GenericError) or _FINAL_STATUS.search(text):
            return OSError(f"{self.url} does not take {what}: {_reason(error)}")
        return None

    def _unreachable(self, what: str, silent_s: float, reason: str) -> StoreUnreachable:
        return StoreUnreachable(
            f"{self.url} has not answered for {silent_s:.0f} s, {what} ({reason}): see whether it is up and AWS_ENDPOINT_URL "
            "and AWS_REGION are right, then run the same command again; a longer outage is waited for with "
            "REELQUANT_STORE_PATIENCE_S"
        )


def seconds_from_environment(name: str, default: float) -> float:
    """Raises ValueError for a value that is no positive number."""
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {text!r}: a positive number of seconds, or unset for {default:g}")
    return value


def _stored(meta: Any) -> StoredObject:
    return StoredObject(str(meta["path"]), int(meta["size"]), str(meta["e_tag"]))


def _reason(error: Exception) -> str:
    """The server's own code and message, or the first line of the error; without what must not be shown."""
    text = str(error).strip()
    said = _CODE.search(text)
    text = f"{said[1]}: {said[2] or ''}"[:300].strip(": ") if said else text.splitlines()[0][:300]
    for name in _SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return text

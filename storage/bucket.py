"""A prefix of an S3 bucket, through obstore: every file is one object, put whole.

Credentials, region and endpoint are read by obstore from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``, ``AWS_ALLOW_HTTP``; or the instance's role) and nowhere else.
obstore makes a request again, with growing pauses, that meets no answer or a server's error, until the store has been silent
for ``REELQUANT_STORE_PATIENCE_S``. Whatever it raises in the end is told here in a sentence.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

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

from storage.atomic_files import explain_write_failure
from storage.location import StoreUrl
from storage.output_file import OutputFile, describe_files
from storage.place import FileState, StoreUnreachable, WriteLocally
from storage.scratch import scratch_folder

PART_BYTES = 16 * 2**20
"""Of an upload in parts, and of a download."""
_MOST_PARTS = 9_000
"""S3 takes 10,000."""
_AT_ONCE = 4
"""Files of a folder that are sent at a time, ranges of a file that are asked for at a time."""
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_FINAL_STATUS = re.compile(r"status code: 4(?!08|09|29)\d\d")
"""Answers that another try does not change."""
_REFUSED = re.compile(
    r"\b40[13] (?:Forbidden|Unauthorized)|status code: 40[13]|ExpiredToken|AccessDenied|InvalidAccessKeyId"
)
"""Answers about credentials, of requests for which obstore has no error of its own, such as listings."""
_CODE = re.compile(r"<Code>(\w+)</Code>(?:\s*<Message>([^<]*)</Message>)?")
_INSTANCE_ROLE = "169.254.169.254"
"""Where obstore asks for credentials when the environment has none."""


class Bucket:
    """See :class:`storage.place.Place`.

    Raises, from every method: StoreUnreachable when the store stays silent, PermissionError when it refuses the credentials,
    OSError for what it cannot do.
    """

    def __init__(self, url: StoreUrl) -> None:
        self._url = url
        patience_s = seconds_from_environment("REELQUANT_STORE_PATIENCE_S", 300.0)
        endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3") or ""
        plain = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes")
        if endpoint.startswith("http://") and not plain:
            raise ValueError(
                f"AWS_ENDPOINT_URL is {endpoint}: over http, which nobody encrypts; use https, or set AWS_ALLOW_HTTP=true"
            )
        self._store = S3Store(
            url.bucket,
            prefix=url.key,
            client_options={"connect_timeout": "5s", "timeout": "60s", "allow_http": plain},
            retry_config={
                "max_retries": 10**6,
                "retry_timeout": timedelta(seconds=patience_s),
                "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2},
            },
        )
        self._listings: dict[object, tuple[str, dict[str, FileState]]] = {}
        """Beginning of the keys of a folder, and what was in it; those of several threads may overlap in any order."""

    @property
    def location(self) -> StoreUrl:
        return self._url

    def read(self, key: str) -> bytes:
        self._look_up(key)
        with self._explained(f"reading {key}"):
            return bytes(obstore.get(self._store, key).bytes())

    def put(self, key: str, data: bytes, *, exclusive: bool = False) -> None:
        try:
            with self._explained(f"writing {key}"):
                obstore.put(self._store, key, data, mode="create" if exclusive else "overwrite")
        except FileExistsError:  # also this put's own, whose answer was lost
            if self.read(key) != data:
                raise

    def stat(self, key: str) -> FileState:
        if (known := self._look_up(key)) is not None:
            return known
        with self._explained(f"looking at {key}"):
            return _state(obstore.head(self._store, key))

    @contextlib.contextmanager
    def listed(self, folder: str = "") -> Iterator[None]:
        prefix, token = f"{folder}/" if folder else "", object()
        if self._listing_of(prefix) is None:
            self._listings[token] = prefix, {str(found["path"]): _state(found) for found in self._all(folder)}
        try:
            yield
        finally:
            self._listings.pop(token, None)

    def _listing_of(self, key: str) -> dict[str, FileState] | None:
        return next((found for prefix, found in list(self._listings.values()) if key.startswith(prefix)), None)

    def _look_up(self, key: str) -> FileState | None:
        """The state of a file of a listed folder; None of another one. Raises FileNotFoundError."""
        if (listing := self._listing_of(key)) is None:
            return None
        if key not in listing:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._url / key))
        return listing[key]

    def checksum(self, key: str) -> str:
        digest = hashlib.sha256()
        for piece in self._pieces(key, self.stat(key).num_bytes):
            digest.update(piece)
        return digest.hexdigest()

    def names(self, folder: str = "") -> list[str]:
        return sorted(str(entry["path"]).rpartition("/")[2] for entry in self._directly_in(folder)["objects"])

    def subfolders(self, folder: str = "") -> list[str]:
        return sorted(str(path).rpartition("/")[2] for path in self._directly_in(folder)["common_prefixes"])

    def files(self, folder: str = "") -> list[tuple[str, int, float]]:
        return [(str(f["path"]), int(f["size"]), f["last_modified"].timestamp()) for f in self._all(folder)]

    def remove(self, key: str) -> None:
        self._delete([key, *(str(found["path"]) for found in self._all(key))])

    @contextlib.contextmanager
    def workshop(self, key: str) -> Iterator[Path]:
        with scratch_folder() as scratch:
            yield scratch / "attempt"

    def publish(self, workshop: Path, key: str, outputs: Sequence[OutputFile]) -> tuple[OutputFile, ...]:
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="upload") as pool:
            e_tags = list(
                pool.map(lambda output: self._upload(f"{key}/{output.path}", workshop / output.path), outputs)
            )
        return tuple(replace(output, e_tag=e_tag) for output, e_tag in zip(outputs, e_tags, strict=True))

    def put_folder(self, key: str, write: WriteLocally, *, last: str) -> tuple[OutputFile, ...]:
        with scratch_folder() as scratch:
            made = scratch / "folder"
            write(made)
            outputs = describe_files(made)
            ends = [output for output in outputs if output.path == last]
            published = self.publish(made, key, [output for output in outputs if output.path != last])
            published += self.publish(made, key, ends)
        there = {str(found["path"]) for found in self._all(key)}
        self._delete(sorted(there - {f"{key}/{output.path}" for output in outputs}))
        return tuple(sorted(published, key=lambda output: output.path))

    def local(self, key: str, outputs: Sequence[OutputFile], scratch: Path) -> Path:
        folder = scratch / key

        def fetch(output: OutputFile) -> None:
            name, target = f"{key}/{output.path}" if key else output.path, folder / output.path
            if not target.exists() and self._download(name, output.num_bytes, target) != output.checksum:
                target.unlink()
                raise ValueError(f"{self._url / name}: SHA-256 differs from the record")

        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch") as pool:
            list(pool.map(fetch, outputs))
        return folder

    def copied(self, scratch: Path) -> Path:
        for key, num_bytes, _ in self.files():
            self._download(key, num_bytes, scratch / "copy" / key)
        return scratch / "copy"

    def _download(self, key: str, num_bytes: int, target: Path) -> str:
        """SHA-256 of what was copied."""
        target.parent.mkdir(parents=True, exist_ok=True)
        digest, partial = hashlib.sha256(), target.with_name(f"{target.name}.partial")
        with explain_write_failure(target, num_bytes), open(partial, "wb") as file:
            for piece in self._pieces(key, num_bytes):
                file.write(piece)
                digest.update(piece)
        partial.rename(target)
        return digest.hexdigest()

    def _pieces(self, key: str, num_bytes: int) -> Iterator[memoryview]:
        """The content in order, a few pieces ahead."""

        def piece(offset: int) -> memoryview:
            with self._explained(f"reading {key}"):
                return memoryview(obstore.get_range(self._store, key, start=offset, length=PART_BYTES))

        offsets = range(0, num_bytes, PART_BYTES)
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="download") as pool:
            for first in range(0, len(offsets), _AT_ONCE):
                yield from pool.map(piece, offsets[first : first + _AT_ONCE])

    def _upload(self, key: str, path: Path) -> str:
        part_bytes = max(PART_BYTES, -(-path.stat().st_size // _MOST_PARTS))
        with self._explained(f"writing {path.stat().st_size} bytes to {key}"):
            return str(obstore.put(self._store, key, path, chunk_size=part_bytes, max_concurrency=_AT_ONCE)["e_tag"])

    def _delete(self, keys: list[str]) -> None:
        if keys:
            with self._explained(f"removing {', '.join(keys[:3])}"):
                obstore.delete(self._store, keys)

    def _all(self, folder: str) -> list[Any]:
        with self._explained(f"listing {folder or 'all'}"):
            pages = obstore.list(self._store, f"{folder}/" if folder else None)
            return sorted((found for page in pages for found in page), key=lambda found: str(found["path"]))

    def _directly_in(self, folder: str) -> Any:
        with self._explained(f"listing {folder or 'all'}"):
            return obstore.list_with_delimiter(self._store, f"{folder}/" if folder else None)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (AlreadyExistsError, PreconditionError) as error:
            raise FileExistsError(errno.EEXIST, f"{what}: there is one already", str(self._url)) from error
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise self._error(what, error) from None
            raise FileNotFoundError(errno.ENOENT, f"not in {self._url}", what) from None
        except (BaseError, OSError) as error:
            raise self._error(what, error) from None

    def _error(self, what: str, error: Exception) -> Exception:
        text = str(error)
        if "NoSuchBucket" in text:
            return ValueError(f"{self._url}: there is no bucket {self._url.bucket}: create it, or name another")
        refused = isinstance(error, PermissionDeniedError | UnauthenticatedError) or _REFUSED.search(text)
        if refused or _INSTANCE_ROLE in text:
            reason = "no credentials in the environment, and no role of this machine" if _INSTANCE_ROLE in text else ""
            return PermissionError(
                f"{self._url} refuses {what} ({reason or _reason(error)}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
                "(and AWS_REGION) in the environment of every machine, or give them a role that may read, write, list and "
                "delete; then run the same command again"
            )
        if not isinstance(error, GenericError) or _FINAL_STATUS.search(text):
            return OSError(f"{self._url} does not take {what}: {_reason(error)}")
        return StoreUnreachable(
            f"{self._url} does not answer, {what} ({_reason(error)}): see whether it is up and AWS_ENDPOINT_URL and AWS_REGION "
            "are right, then run the same command again; a longer outage is waited for with REELQUANT_STORE_PATIENCE_S"
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


def _state(meta: Any) -> FileState:
    return FileState(int(meta["size"]), str(meta["e_tag"]))


def _reason(error: Exception) -> str:
    """The server's own code and message, or the first line of the error; without what must not be shown."""
    text = str(error).strip()
    said = _CODE.search(text)
    text = f"{said[1]}: {said[2] or ''}"[:300].strip(": ") if said else text.splitlines()[0][:300]
    for name in _SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return text

"""The store at a location: a folder's or a bucket's."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from storage.local_store import LocalStore
from storage.location import StoreUrl, parse_location
from storage.run_store import RunStore


def open_store(location: str | Path | StoreUrl) -> RunStore:
    """The store at a location; nothing is read or written yet. One object a process and bucket prefix, as lease and epoch
    belong to the process.

    Raises:
        ValueError: a location of another kind, or s3:// without the package for it.
    """
    place = parse_location(location)
    if isinstance(place, StoreUrl):
        return _s3_store(place)
    return LocalStore(place)


@cache
def _s3_store(url: StoreUrl) -> RunStore:
    try:
        from storage.s3_store import S3Store
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("obstore"):
            raise
        raise ValueError(
            f"{url} needs the package obstore, which is not installed: pip install -e '.[application,s3]', or give a local "
            "path or one on a mounted shared file system"
        ) from error
    return S3Store(url)

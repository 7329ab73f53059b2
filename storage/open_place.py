"""The place at a location: a folder's or a bucket's."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from storage.folder import Folder
from storage.location import StoreUrl, parse_location
from storage.place import Place


@cache
def _bucket(url: StoreUrl) -> Place:
    try:
        from storage.bucket import Bucket
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("obstore"):
            raise
        raise ValueError(
            f"{url} needs the package obstore, which is not installed: pip install -e '.[application,s3]', or give a local "
            "path or one on a mounted shared file system"
        ) from error
    return Bucket(url)


def open_place(location: str | Path | StoreUrl) -> Place:
    """The place at a location; nothing is read or written yet.

    Raises:
        ValueError: a location of another kind, or s3:// without the package for it.
    """
    place = parse_location(location)
    return _bucket(place) if isinstance(place, StoreUrl) else Folder(place)

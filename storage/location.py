"""Where a run lies: a local path, or a prefix of an S3 bucket.

A :class:`StoreUrl` is to ``s3://bucket/prefix`` what a pure path is to a file name: it is joined and shown, and touches
nothing. Credentials are no part of it; they come from the environment.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_COMPONENT = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.+=@ ()-]*")


@dataclass(frozen=True, order=True)
class StoreUrl:
    """A place in an S3 bucket; made by :func:`parse_location`."""

    bucket: str
    key: str
    """Without slashes at its ends; never empty."""

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    def __truediv__(self, name: str) -> StoreUrl:
        return StoreUrl(self.bucket, f"{self.key}/{name}")

    @property
    def name(self) -> str:
        return PurePosixPath(self.key).name

    @property
    def parent(self) -> StoreUrl:
        """Raises ValueError for a prefix of one part: a bucket as a whole is nobody's run."""
        above, _, _ = self.key.rpartition("/")
        if not above:
            raise ValueError(f"{self} has no parent inside its bucket: give s3://bucket/prefix/name")
        return StoreUrl(self.bucket, above)

    def relative_to(self, other: StoreUrl) -> PurePosixPath:
        """As of a path; ValueError when it is not below `other`."""
        if self.bucket != other.bucket:
            raise ValueError(f"{self} is not below {other}")
        return PurePosixPath(self.key).relative_to(other.key)

    def is_absolute(self) -> bool:
        return True

    def absolute(self) -> StoreUrl:
        return self

    def resolve(self) -> StoreUrl:
        return self


Location = Path | StoreUrl


def parse_location(text: str | os.PathLike[str] | StoreUrl) -> Location:
    """A local path (as it is), or the place that an ``s3://bucket/prefix`` URL names.

    Raises:
        ValueError: another scheme, credentials in the URL (which are not repeated), no prefix, or ``~`` of nobody.
    """
    if isinstance(text, StoreUrl):
        return text
    text = os.fspath(text)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return expand_home(Path(text))
    shown = without_credentials(text)
    if scheme != "s3":
        raise ValueError(f"{shown} is a URL of another kind: give a local path, or s3://bucket/prefix")
    bucket, _, key = rest.strip("/").partition("/")
    if "@" in bucket or ":" in bucket:
        raise ValueError(
            f"{shown} holds credentials, and a location is written into logs and configurations: give s3://bucket/prefix, "
            "and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
        )
    if _BUCKET.fullmatch(bucket) and not key:
        raise ValueError(
            f"{shown} names a bucket and no prefix, which keeps runs apart: give {shown.rstrip('/')}/PREFIX, such as s3://{bucket}/runs/demo"
        )
    parts = key.split("/")
    sound = all(_COMPONENT.fullmatch(part) and part not in (".", "..") for part in parts)
    if not _BUCKET.fullmatch(bucket) or not sound:
        raise ValueError(
            f"{shown} is not s3://bucket/prefix: the bucket has 3-63 small letters, digits, dots and dashes, and the prefix, "
            "which keeps runs apart, parts of letters, digits and . _ + = @ - ( ) between slashes"
        )
    return StoreUrl(bucket, key)


def expand_home(path: Path) -> Path:
    """The path with the home directory for a leading ``~`` or ``~user``.

    Raises:
        ValueError: there is no such home directory.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: there is no home directory for {path.parts[0]}: give the path in full") from error


def without_credentials(text: str) -> str:
    """The text with what stands between ``//`` and ``@`` of a URL blacked out."""
    return re.sub(r"//[^/]*@", "//***@", text)


def local_path(location: Location, *, why: str) -> Path:
    """The location as a local path.

    Raises:
        ValueError: it is in a bucket; says `why` that does not do.
    """
    if isinstance(location, StoreUrl):
        raise ValueError(
            f"{location} is in a bucket, and {why}: give a local path or one on a mounted shared file system"
        )
    return location

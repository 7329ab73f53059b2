"""A Hugging Face Hub of its own for tests: an HTTP server with the endpoints that `huggingface_hub` asks for models.

    GET  /api/models/<id>[/revision/<rev>]       commit of a revision
    GET  /api/models/<id>/tree/<rev>             files, sizes, hashes
    GET  /api/models/<id>/refs                   branches and tags
    HEAD /<id>/resolve/<rev>/<file>              ETag, commit, size; weights: a redirect to the storage's address
    GET  the same                                bytes, also a range
    GET  <storage>/<id>/stored/<commit>/<file>   bytes of weights, at another address, as the Hub's storage has

Commits are those of git in what counts: named by their content and parent, immutable; branches move, tags do not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

_PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY")
LFS_ENDINGS = (".safetensors", ".bin", ".mp4")


@dataclass
class Repository:
    """One model's commits, branches and tags."""

    commits: dict[str, dict[str, Path]] = field(default_factory=dict)
    """Files by name, by commit."""
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    """Files are for nobody."""
    token: str | None = None
    """A private repository's: without it there is none."""

    def commit(self, folder: Path, *, branch: str = "main") -> str:
        """Adds the files of a folder as they are now to a branch; they must stay. Returns the commit."""
        files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        digest = hashlib.sha1(self.branches.get(branch, "").encode(), usedforsecurity=False)
        for name, path in files.items():
            digest.update(f"{name}\0{_sha256(path)}\n".encode())
        commit = digest.hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, tag or commit."""
        named = self.branches.get(revision) or self.tags.get(revision) or revision
        return named if named in self.commits else None


@dataclass(frozen=True)
class Request:
    """What came in."""

    method: str
    path: str
    token: str | None
    """Of the header `Authorization`."""
    to_storage: bool
    range: str | None


class HubServer:
    """Repositories by id, and the requests so far."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.breaks: list[str] = []
        """Files, by name, whose next download breaks off shortly before its end."""
        hub, storage = _listener(self, to_storage=False), _listener(self, to_storage=True)
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in (hub, storage))
        self._servers = (hub, storage)

    def repository(self, repo_id: str) -> Repository:
        """The repository, new where there is none."""
        return self.repositories.setdefault(repo_id, Repository())

    def downloads(self, repo_id: str) -> list[str]:
        """Names of the files that were fetched as a whole, as often as they were."""
        whole = (r.path for r in self.requests if r.method == "GET" and r.range is None)
        found = (re.fullmatch(rf"/{repo_id}/(?:resolve|stored)/[^/]+/(.+)", path) for path in whole)
        names = [match for match in found if match]
        # Weights are asked for twice: at the Hub, which says where they are stored, and there.
        return [m[1] for m in names if not (m[1].endswith(LFS_ENDINGS) and "/resolve/" in m[0])]

    def close(self) -> None:
        """Refuses connections from now on."""
        for server in self._servers:
            server.shutdown()
            server.server_close()


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    """A server without repositories."""
    server = HubServer()
    try:
        yield server
    finally:
        server.close()


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has this process, whose huggingface_hub is imported already, and those that it starts ask the Hub at `endpoint`."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", *_PROXIES):
        monkeypatch.delenv(name, raising=False)
    close_session()


def use_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has this process keep what it fetches in `folder`."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))


def _listener(hub: HubServer, *, to_storage: bool) -> ThreadingHTTPServer:
    class Handler(_Handler):
        server_of_tests = hub
        is_storage = to_storage

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return made


class _Handler(BaseHTTPRequestHandler):
    server_of_tests: HubServer
    is_storage: bool
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        path = unquote(urlsplit(self.path).path)
        self.server_of_tests.requests.append(
            Request(self.command, path, token, self.is_storage, self.headers.get("range"))
        )
        if self.is_storage:
            self._stored(path)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+)|/(refs))?", path):
            self._api(match[1], match[2] or match[4] or "revision", match[3] or "main", token)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3], token)
        else:
            self._error(404, "NotFound")

    def _api(self, repo_id: str, what: str, revision: str, token: str | None) -> None:
        repository = self._repository(repo_id, token)
        if repository is None:
            return
        if what == "refs":
            kinds = {"branches": repository.branches, "tags": repository.tags, "converts": {}}
            self._json(
                {
                    kind: [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": c} for name, c in refs.items()]
                    for kind, refs in kinds.items()
                }
            )
            return
        commit = repository.resolve(revision)
        if commit is None:
            self._error(404, "RevisionNotFound")
        elif what == "tree":
            self._json([_entry(name, path) for name, path in repository.commits[commit].items()])
        else:
            self._json({"id": repo_id, "sha": commit, "private": False, "tags": [], "siblings": []})

    def _resolve(self, repo_id: str, revision: str, name: str, token: str | None) -> None:
        repository = self._repository(repo_id, token)
        if repository is None:
            return
        commit = repository.resolve(revision)
        if commit is None:
            self._error(404, "RevisionNotFound")
        elif name not in repository.commits[commit]:
            self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        elif repository.gated:
            self._error(403, "GatedRepo", {"X-Repo-Commit": commit})
        else:
            path = repository.commits[commit][name]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{_git_hash(path)}"'}
            if name.endswith(LFS_ENDINGS):
                place = f"{self.server_of_tests.storage}/{repo_id}/stored/{commit}/{name}"
                linked = {"X-Linked-ETag": f'"{_sha256(path)}"', "X-Linked-Size": str(path.stat().st_size)}
                self._send(302, b"", {**headers, **linked, "Location": place})
            else:
                self._bytes(path, headers)

    def _stored(self, path: str) -> None:
        repo_id, commit, name = re.fullmatch(r"/([^/]+/[^/]+)/stored/([^/]+)/(.+)", path).groups()  # type: ignore[union-attr]
        file = self.server_of_tests.repositories[repo_id].commits[commit][name]
        if name in self.server_of_tests.breaks:
            self.server_of_tests.breaks.remove(name)
            self.send_response(200)
            self.send_header("Content-Length", str(file.stat().st_size))
            self.end_headers()
            self.wfile.write(file.read_bytes()[:-1024])
            self.close_connection = True
        else:
            self._bytes(file, {"ETag": f'"{_sha256(file)}"'})

    def _repository(self, repo_id: str, token: str | None) -> Repository | None:
        found = self.server_of_tests.repositories.get(repo_id)
        if found is None or (found.token is not None and found.token != token):
            self._error(401, "RepoNotFound")
            return None
        return found

    def _bytes(self, path: Path, headers: dict[str, str]) -> None:
        content = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if wanted is None:
            self._send(200, content, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        self._send(206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content)


def _entry(name: str, path: Path) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": path.stat().st_size, "oid": _git_hash(path)}
    if name.endswith(LFS_ENDINGS):
        entry["lfs"] = {"oid": _sha256(path), "size": path.stat().st_size, "pointerSize": 134}
    return entry


@cache
def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def _git_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()

"""One driver's connection to Ray: a local session that it starts itself, or a cluster that is already there.

What holds for every session:
- Token authentication is set explicitly in the driver and in every process that it starts.
- A local session listens on the loopback device only, has a token of its own (nothing is read from or written to
  the home directory), no dashboard, no workers started ahead of need, and an object store of the least useful size:
  workers exchange small results, tensors go through files.
- Ray's daemons and all workers end with the driver, even when it is killed (two agents that do nothing then wait a
  minute for the others). The kernel ties them to the *thread* that started them, so `ray_session` must be entered in
  a thread that lives as long as the session: the main thread.
- A session is global to the process, as Ray's connection is: one at a time.
"""

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from cluster.driver_environment import (
    NO_GRPC_PROXY,
    cluster_environment,
    environment,
    loopback_only,
    previous_sigterm_handler_restored,
    ray_messages_logged,
    reinstall_sigterm_handler,
)
from cluster.end_of_process import without_progress_bars
from cluster.proxies import loopback_excluded
from cluster.session_directory import default_base, session_directory, write_token
from cluster.slow_start import start_patiently, wait_for_head

PROJECT_ROOT = Path(__file__).resolve().parents[1]
SMALLEST_OBJECT_STORE_BYTES = 75 * 2**20


@dataclass(frozen=True)
class SessionSettings:
    """Where a run's workers live. Only `address` decides between a local session and an existing cluster."""

    address: str | None = None
    """`None`: the address in RAY_ADDRESS (set inside a submitted Ray job), otherwise a local session; `"local"`: a
    local session whatever RAY_ADDRESS says; `"auto"` or `"host:port"`: an existing cluster."""
    num_cpus: int | None = None
    """Local session: CPUs that Ray may hand out; None = all. Must be None with an existing cluster."""
    num_gpus: int | None = None
    """Local session: GPUs that Ray may hand out; None = all found. Must be None with an existing cluster."""
    object_store_bytes: int | None = None
    """Local session: size of the shared-memory object store, at least 75 MiB; None = 80 MiB."""
    base_directory: Path | None = None
    """Local session: the session's private directory is made below it; None = RAY_TMPDIR or the system's own."""
    env_vars: Mapping[str, str] = field(default_factory=dict)
    """Environment of every worker, on top of what it has. Costs about 0.3 s a worker start when not empty."""
    working_dir: Path | None = None
    """Existing cluster: the folder sent to the nodes and put on the workers' import path; None = this checkout.
    Files named in .gitignore are not sent. Not used inside a submitted job, which brings its own."""
    excludes: tuple[str, ...] = ("/tests", "/docs", "/benchmarks")
    """Existing cluster: patterns, in the syntax of .gitignore, of what is not sent."""


@dataclass(frozen=True)
class Session:
    """An open session."""

    address: str
    """`host:port` of the cluster's control service."""
    local: bool
    """Whether this driver started the cluster."""
    num_cpus: float
    """CPUs in the cluster when the session was opened."""
    num_gpus: float
    """GPUs in the cluster when the session was opened."""
    directory: Path | None
    """The local session's private directory."""
    token_file: Path | None
    """The local session's token."""

    def capacity(self, *, num_cpus: float, num_gpus: float) -> int:
        """How many workers of this size the session's resources hold at once (a worker's GPU share is on one GPU)."""
        fits = [math.floor(self.num_cpus / num_cpus)] if num_cpus > 0 else []
        if num_gpus >= 1:
            fits.append(math.floor(self.num_gpus / num_gpus))
        elif num_gpus > 0:
            fits.append(math.floor(1 / num_gpus + 1e-9) * math.floor(self.num_gpus))
        return min(fits, default=2**31)

    def worker_stderr(self, pid: int, *, num_lines: int = 20) -> str:
        """Last lines that the worker process `pid` wrote to its standard error, without progress bars; empty unless the
        session is local."""
        if self.directory is None:
            return ""
        lines: list[str] = []
        for path in self.directory.glob(f"ray/session_2*/logs/worker-*-{pid}.err"):
            text = without_progress_bars(path.read_text(errors="replace"))
            lines += [line for line in text.splitlines() if not line.startswith(":")]  # ":actor_name:..." is Ray's
        return "\n".join(lines[-num_lines:])


_active: Session | None = None


def active_session() -> Session:
    """Return the open session; RuntimeError when there is none."""
    if _active is None:
        raise RuntimeError("no Ray session is open: enter `with ray_session(SessionSettings(...))` first")
    return _active


@contextlib.contextmanager
def ray_session(settings: SessionSettings) -> Iterator[Session]:
    """Open a session and close it again; a local one takes all its processes and files with it.

    Raises ValueError for settings that contradict each other, RuntimeError when a session is open already, and
    ConnectionError when there is no cluster at the address, it refuses the token, or Ray does not come up.
    """
    global _active
    if _active is not None or ray.is_initialized():
        raise RuntimeError("a Ray session is open already: leave it before opening another, there is one per process")
    address = settings.address or os.environ.get("RAY_ADDRESS") or "local"
    local = address == "local"
    _check(settings, address, local)
    with contextlib.ExitStack() as stack:
        stack.enter_context(previous_sigterm_handler_restored())
        stack.enter_context(ray_messages_logged())
        directory = token_file = None
        if local or _is_loopback(address):
            stack.enter_context(loopback_only())
        if local:
            directory = stack.enter_context(session_directory(settings.base_directory or default_base()))
            token_file = write_token(directory)
            stack.enter_context(environment(_local_environment(token_file), ("RAY_AUTH_TOKEN",)))
            arguments = _local_arguments(settings, directory)
        else:
            _check_listens(address)
            stack.enter_context(environment(cluster_environment()))
            arguments = _remote_arguments(settings, address)
        stack.callback(ray.shutdown)
        options = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR, **arguments}
        start_patiently(lambda: ray.init(**options), ray.shutdown)
        reinstall_sigterm_handler()
        resources = ray.cluster_resources()
        _active = Session(
            address=ray.get_runtime_context().gcs_address,
            local=local,
            num_cpus=resources.get("CPU", 0.0),
            num_gpus=resources.get("GPU", 0.0),
            directory=directory,
            token_file=token_file,
        )
        try:
            yield _active
        finally:
            _active = None


def _check(settings: SessionSettings, address: str, local: bool) -> None:
    if local:
        size = settings.object_store_bytes
        if size is not None and size < SMALLEST_OBJECT_STORE_BYTES:
            raise ValueError(f"object_store_bytes is {size}: Ray needs at least {SMALLEST_OBJECT_STORE_BYTES}, or None")
        return
    names = ("num_cpus", "num_gpus", "object_store_bytes", "base_directory")
    given = [f"{name}={getattr(settings, name)}" for name in names if getattr(settings, name) is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)} given together with the existing cluster {address}, which has its own: leave them out, "
            "or pass address='local' for a session of this machine"
        )


def _local_environment(token_file: Path) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        **NO_GRPC_PROXY,
        **loopback_excluded(),
        "RAY_USAGE_STATS_ENABLED": "0",
        # A worker that asked for no GPU gets an empty CUDA_VISIBLE_DEVICES instead of seeing them all.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(PROJECT_ROOT), os.environ.get("PYTHONPATH")))),
    }


def _local_arguments(settings: SessionSettings, directory: Path) -> dict[str, Any]:
    return {
        "address": "local",
        "num_cpus": settings.num_cpus,
        "num_gpus": settings.num_gpus,
        "object_store_memory": settings.object_store_bytes or 80 * 2**20,
        "_temp_dir": str(directory / "ray"),
        "object_spilling_directory": str(directory / "ray" / "spill"),
        "_system_config": {"enable_worker_prestart": False, "prestart_worker_first_driver": False},
        "runtime_env": {"env_vars": dict(settings.env_vars)} if settings.env_vars else None,
    }


def _remote_arguments(settings: SessionSettings, address: str) -> dict[str, Any]:
    runtime_env: dict[str, Any] = {"env_vars": dict(settings.env_vars)} if settings.env_vars else {}
    inside_submitted_job = RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ
    if not inside_submitted_job:
        runtime_env["working_dir"] = str(settings.working_dir or PROJECT_ROOT)
        runtime_env["excludes"] = list(settings.excludes)
    return {"address": address, "runtime_env": runtime_env or None}


def _is_loopback(address: str) -> bool:
    return address.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]")


def _check_listens(address: str) -> None:
    """Ray would wait a minute for a cluster that is not there, and not say so."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():  # "auto", "ray://host:port": Ray's to find
        return
    try:
        wait_for_head(host.strip("[]"), int(port))
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster listens at {address} ({error}): check the address with `ray status` on its head node, or "
            "leave it out for a session of this machine"
        ) from error

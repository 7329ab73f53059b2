"""Jobs of a Ray cluster through its dashboard (`http://HOST:8265`): submit, follow, stop.

A job is a command that the cluster's head runs in a copy of the uploaded folder. What Ray leaves to its users is done here:

- Authentication is explicit on both sides: the client sends the token, the job's processes demand it.
- RAY_ADDRESS and RAY_API_SERVER_ADDRESS of the caller, which silently win over any address in Ray's client, are left out.
- Every attempt has a submission id of its own: Ray never runs a job twice.
- A stopped job has time to end its workers: Ray alone kills it after 3 s.
- A stopped job is no success: Ray's own command exits with 0 for it.
- The dashboard is asked directly, never through a proxy of the environment: the token would go to it in the clear.
"""

import asyncio
import contextlib
import logging
import re
import secrets
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster.driver_environment import cluster_environment, environment
from cluster.proxies import without_proxies

STOP_WAIT_S = 60
"""How long a job may take to stop before it is killed. Ending frozen workers takes a driver up to 11 s."""

# Ray tells on every submission what it leaves out by default, and which files it finds large.
for _name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
    logging.getLogger(f"ray.{_name}").setLevel(logging.ERROR)
logging.getLogger("ray._private.runtime_env.working_dir").setLevel(logging.ERROR)

_logger = logging.getLogger(__name__)

_LOST_AFTER_S = 60.0
_AGENT_PATIENCE_S = 30.0
_NO_AGENT = ("No available agent", "Cannot connect to host")
"""Ray's words where a dashboard knows of no agent, or of one that does not listen yet."""
_POLL_INTERVAL_S = 0.5


@dataclass(frozen=True)
class JobRequest:
    """What the cluster is to run."""

    submission_id: str
    entrypoint: str
    """A command line for the shell."""
    working_dir: Path
    """The folder that is uploaded, at most 512 MiB. Files named in .gitignore stay behind."""
    excludes: tuple[str, ...] = ()
    """Patterns, in the syntax of .gitignore, of what else stays behind."""
    env_vars: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    """For people who look at the dashboard."""


@dataclass(frozen=True)
class JobEnd:
    """How a job ended."""

    status: str
    """`SUCCEEDED`, `FAILED` or `STOPPED`."""
    exit_code: int
    """For a shell: that of the driver; 128 + n when signal n ended it; 143 when the job was stopped; 1 when the driver was
    never started or its end was not seen."""
    message: str
    """Ray's explanation where the driver itself could give none; may be empty."""


def new_submission_id(name: str) -> str:
    """An id that no other attempt has, such as `reelquant-demo-20260102-030405-9f2c`."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40] or "run"
    return f"reelquant-{readable}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


class JobClient:
    """A connection to the dashboard of one cluster."""

    def __init__(self, address: str) -> None:
        """Connect to `address`, such as `http://127.0.0.1:8265`.

        Raises:
            ValueError: not such an address.
            ConnectionError: nobody listens there, there is no token, or it is refused.
        """
        self.address = address.rstrip("/")
        _check_address(self.address)
        variables = cluster_environment()
        self._auth_mode = variables["RAY_AUTH_MODE"]
        with environment(variables, ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")), self._explained():
            self._client = JobSubmissionClient(self.address)

    def submit(self, request: JobRequest) -> None:
        """Upload the folder, unless the cluster has it already, and start the job.

        Raises:
            ValueError: the folder is too large or the cluster does not take the request.
            ConnectionError: the cluster is gone, refuses the token, or has no agent that starts jobs.
        """
        variables = {
            "RAY_AUTH_MODE": self._auth_mode,
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
            **request.env_vars,
        }
        self._when_an_agent_is_there(
            lambda: self._client.submit_job(
                entrypoint=request.entrypoint,
                submission_id=request.submission_id,
                runtime_env={
                    "working_dir": str(request.working_dir),
                    "excludes": list(request.excludes),
                    "env_vars": variables,
                },
                metadata=dict(request.metadata),
            )
        )

    def follow(self, submission_id: str, write: Callable[[str], None]) -> JobEnd:
        """Pass on what the job prints, from its beginning, until it ends; a lost connection is made anew.

        Raises:
            ValueError: no such job.
            ConnectionError: the dashboard has not answered for a minute; the job may still be at work.
        """
        num_shown, lost_since = 0, None
        self._details(submission_id)
        while True:
            try:
                num_shown = asyncio.run(self._pass_on(submission_id, write, num_shown))
                details = self._details(submission_id)
                lost_since = None
            except (ConnectionError, RuntimeError, aiohttp.ClientError) as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > _LOST_AFTER_S:
                    raise ConnectionError(
                        f"{self.address} has not answered for {_LOST_AFTER_S:.0f} s ({error}); {submission_id} may still be "
                        "at work: look again with `logs`, or submit the run again when the cluster is back"
                    ) from error
            else:
                if JobStatus(details.status).is_terminal():
                    return _end_of(details)
            time.sleep(_POLL_INTERVAL_S)

    def stop(self, submission_id: str) -> JobEnd:
        """Stop the job and wait for its end; one that has ended already is left as it is.

        Raises:
            ValueError: no such job.
            ConnectionError: the cluster is gone, or the job goes on in spite of everything.
        """
        with self._explained():
            self._client.stop_job(submission_id)
        deadline = time.monotonic() + STOP_WAIT_S + 30
        while time.monotonic() < deadline:
            details = self._details(submission_id)
            if JobStatus(details.status).is_terminal():
                return _end_of(details)
            time.sleep(_POLL_INTERVAL_S)
        raise ConnectionError(f"{submission_id} was told to stop {STOP_WAIT_S + 30} s ago and is still at work")

    def _when_an_agent_is_there(self, submit: Callable[[], object]) -> None:
        """The cluster's agent, which starts a job, answers some seconds later than its dashboard."""
        deadline = time.monotonic() + _AGENT_PATIENCE_S
        while True:
            try:
                with self._explained():
                    submit()
                return
            except ValueError as error:
                if not any(words in str(error) for words in _NO_AGENT):
                    raise
                if time.monotonic() > deadline:
                    raise ConnectionError(
                        f"{self.address} has had no agent that starts jobs for {_AGENT_PATIENCE_S:.0f} s: if the cluster was "
                        "just started, try again; otherwise another cluster of its machine may have the agent's port (52365): "
                        "start Ray with --dashboard-agent-listen-port=PORT"
                    ) from error
                _logger.warning("%s: the cluster's agent is not there yet; trying on", self.address)
            time.sleep(_POLL_INTERVAL_S)

    def _details(self, submission_id: str) -> JobDetails:
        with self._explained():
            return self._client.get_job_info(submission_id)

    async def _pass_on(self, submission_id: str, write: Callable[[str], None], num_shown: int) -> int:
        """Ray sends the whole log on every connection: the first `num_shown` characters are left out."""
        position = 0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "ssl=None is deprecated", DeprecationWarning)  # Ray's call, not ours
            async for text in self._client.tail_job_logs(submission_id):
                new = text[max(0, num_shown - position) :]
                position += len(text)
                if new:
                    write(new)
                    num_shown = position
        return num_shown

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            with without_proxies():
                yield
        except AuthenticationError as error:
            raise ConnectionError(
                f"{self.address} refuses the token ({str(error).splitlines()[0]}): put the token of this cluster into "
                "~/.ray/auth_token, or name its file in RAY_AUTH_TOKEN_PATH (RAY_AUTH_TOKEN, where set, comes before both)"
            ) from error
        except requests.exceptions.RequestException as error:
            raise ConnectionError(f"{self.address} does not answer: {error}") from error
        except RuntimeError as error:
            # Ray's client reports every refusal of the server so, with the server's whole traceback in it.
            text = str(error).strip().removesuffix(".")
            raise ValueError(
                f"{self.address}: {text if len(text) < 400 else text[:100] + ' ... ' + text[-300:]}"
            ) from error


def _check_address(address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"the address is {address!r}: give that of the cluster's dashboard, such as http://127.0.0.1:8265 (bring it here "
            "with `ray dashboard CLUSTER.yaml`, `ssh -L 8265:127.0.0.1:8265 HEAD` or `kubectl port-forward`)"
        )
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=10.0).close()
    except OSError as error:
        raise ConnectionError(
            f"no dashboard listens at {address} ({error}): start the cluster, or check host and port (8265 unless "
            "--dashboard-port says otherwise); the dashboard listens on its own machine only, so bring its port here with "
            "`ray dashboard CLUSTER.yaml`, `ssh -L 8265:127.0.0.1:8265 HEAD` or `kubectl port-forward`"
        ) from error


def _end_of(details: JobDetails) -> JobEnd:
    status, code = JobStatus(details.status), details.driver_exit_code
    message = "" if code is not None and code >= 0 else details.message or ""
    if status is JobStatus.SUCCEEDED:
        return JobEnd(status.value, 0, "")
    if status is JobStatus.STOPPED:
        return JobEnd(status.value, 143, "")
    if code is not None and code < 0:
        return JobEnd(status.value, 128 - code, message)
    return JobEnd(status.value, code or 1, message)

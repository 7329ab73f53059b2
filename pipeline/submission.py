"""`submit`, `logs`, `stop`: a run, or a study, as a job of a Ray cluster.

The configuration travels inside the job's command, with all `--set`, so that it may lie anywhere and the dashboard shows
what was run. The checkout travels as the job's working directory. Paths in the configuration are therefore either
relative to the checkout and part of it, or absolute and the cluster's own: only the job can see whether those exist, and it
looks before any work.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cluster.job_submission import JobClient, JobEnd, JobRequest, new_submission_id
from cluster.session import PROJECT_ROOT
from pipeline.config.loading import ConfigError, parse_config, parse_override, read_values, set_value
from pipeline.config.prompts import read_prompts
from pipeline.config.schema import RunConfig
from pipeline.hub_model import could_be_hub_id, resolve_revision
from pipeline.provenance import commit
from pipeline.study.expansion import load_study
from pipeline.terminal import say
from storage.location import Location
from storage.run_directory import CACHE

EXCLUDES = ("/tests", "/docs", "/benchmarks", "/.venv")
"""Of the checkout, what no job needs; what .gitignore names stays behind too."""

_PYTHON = "sh cluster/job_python.sh $PPID"
"""`python -m pipeline` with the Python that has the application; $PPID is Ray's process that runs the job."""
_SEEN_BY_ALL = "give an absolute path that every node of the cluster sees"
_END_OF_CONFIG = "END_OF_CONFIG"


def job_of(path: Path, overrides: Sequence[str], *, update: bool = False, until: str | None = None) -> JobRequest:
    """The job that does the run, or the study, whose file `path` is, with `overrides`.

    Args:
        update: as of `run` and `study`; so is `until`, the stage after which the job ends.

    Raises:
        ConfigError: everything that is wrong with it and can be seen from here.
    """
    values = read_values(path)
    options = [*(["--update"] if update else []), *(["--until", until] if until is not None else [])]
    if "study" in values:
        return _study_job(path, values, overrides, options)
    for override in overrides:
        set_value(values, *parse_override(override), where=f"--set {override!r}")
    config = parse_config(values, str(path))
    problems = [*_place_problems("run", config.run), *_cache_problems(config), *_run_problems(config)]
    if problems:
        raise ConfigError(problems)
    values.pop("cluster", None)
    return _request(
        ["run", "/dev/stdin", *options], values, {"run": str(values["run"]), "config": str(path)}, config.run
    )


def _study_job(path: Path, values: dict[str, Any], overrides: Sequence[str], options: Sequence[str]) -> JobRequest:
    study = load_study(path, overrides)
    # What is the same in all runs is said once.
    found = [*_place_problems("study", study.location), *(p for run in study.runs for p in _run_problems(run.config))]
    first = study.runs[0].config
    if first.cache != study.location / CACHE:
        found += _cache_problems(first)
    if found:
        raise ConfigError(list(dict.fromkeys(found)))
    base = study.written.base()
    base.pop("cluster", None)
    last = [part for override in overrides for part in ("--set", override)]
    values = {**values, "config": base}
    return _request(
        ["study", "/dev/stdin", *options, *last],
        values,
        {"study": str(values["study"]), "config": str(path)},
        study.location,
    )


def _request(command: Sequence[str], values: dict[str, Any], metadata: dict[str, str], place: Location) -> JobRequest:
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    made_by = commit()
    return JobRequest(
        submission_id=new_submission_id(place.name),
        entrypoint=f"{_PYTHON} {shlex.join(command)} <<'{_END_OF_CONFIG}'\n{text}{_END_OF_CONFIG}\n",
        working_dir=PROJECT_ROOT,
        excludes=EXCLUDES,
        env_vars={"REELQUANT_COMMIT": made_by} if made_by else {},
        metadata={**metadata, "commit": made_by or "unknown"},
    )


def submit_job(address: str, request: JobRequest, console: Console, *, follow: bool) -> int:
    """Submits the job; returns its exit code, or 0 at once without `follow`."""
    client = JobClient(address)
    client.submit(request)
    say(console, f"job:  {request.submission_id}")
    if not follow:
        say(console, _what_next(client.address, request.submission_id))
        return 0
    return follow_job(client, request.submission_id, console)


def follow_job(client: JobClient, submission_id: str, console: Console) -> int:
    """Shows the job's output until it ends; returns its exit code, or 130 after Ctrl-C, which leaves it at work."""
    try:
        end = client.follow(submission_id, _write)
    except KeyboardInterrupt:
        say(console, f"\nnot followed any more; the job goes on.\n{_what_next(client.address, submission_id)}")
        return 130
    _show_end(end, submission_id, console)
    return end.exit_code


def stop_job(client: JobClient, submission_id: str, console: Console) -> None:
    """Stops the job and says how it ended."""
    _show_end(client.stop(submission_id), submission_id, console)


def _show_end(end: JobEnd, submission_id: str, console: Console) -> None:
    style = "green" if end.status == "SUCCEEDED" else "bold red" if end.status == "FAILED" else "yellow"
    again = (
        "" if end.status == "SUCCEEDED" else "; finished work is kept: submit the same configuration again to resume"
    )
    say(console, (end.status.lower(), style), f": {submission_id}{again}")
    if end.message:
        say(console, end.message)


def _what_next(address: str, submission_id: str) -> str:
    return (
        f"follow it: python -m pipeline logs {submission_id} --address {address}\n"
        f"stop it:   python -m pipeline stop {submission_id} --address {address}"
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _place_problems(key: str, place: Location) -> list[str]:
    if place.is_absolute():
        return []
    example = f"{key}: /mnt/runs/{place.name}" if key == "study" else f"--set {key}=/mnt/runs/{place.name}"
    return [
        f"{key}: {place} is relative, and a job's working directory is a cache that Ray clears: give s3://bucket/prefix, or an "
        f"absolute path that every node of the cluster sees, such as {example}"
    ]


def _cache_problems(config: RunConfig) -> list[str]:
    return [] if config.cache is None else _place_problems("cache", config.cache)


def _run_problems(config: RunConfig) -> list[str]:
    problems = _path_problems(config)
    if config.cluster.address == "local":
        problems.append("cluster.address: 'local' would start a second Ray inside the job: leave it out")
    if config.workers.num_workers != "auto" and config.workers.num_workers < 1:
        problems.append(f"workers.num_workers is {config.workers.num_workers}; 1 or more, or auto")
    return problems


def _path_problems(config: RunConfig) -> list[str]:
    """What is wrong with the relative paths, which the job looks for in its copy of the checkout."""
    named: dict[str, Path] = {
        "model": config.model,
        "prompts.calibration": config.prompts.calibration,
        "prompts.held_out": config.prompts.held_out,
    }
    if config.evaluation.recognizer is not None:
        named["evaluation.recognizer"] = config.evaluation.recognizer
    relative = {key: path for key, path in named.items() if not path.is_absolute()}
    if could_be_hub_id(config.model) and not (PROJECT_ROOT / config.model).exists():
        del relative["model"]
        problems = _hub_problems(config)
    else:
        problems = []
    problems += [problem for key, path in relative.items() for problem in _upload_problems(key, path)]
    for key, num in (("calibration", config.prompts.num_calibration), ("held_out", config.prompts.num_held_out)):
        path = getattr(config.prompts, key)
        if path.is_absolute() or any(problem.startswith(f"prompts.{key}:") for problem in problems):
            continue
        try:
            images = {prompt.image.path for prompt in read_prompts(PROJECT_ROOT / path, num, key) if prompt.image}
            problems += [p for image in sorted(images) for p in _upload_problems(f"prompts.{key}: image", image)]
        except ConfigError as error:
            problems += error.problems
    return problems


def _hub_problems(config: RunConfig) -> list[str]:
    """Why a model that the checkout does not hold is none of the Hub; a commit is for the job to find."""
    if config.model_commit is not None:
        return []
    try:
        resolve_revision(config)
    except ConfigError as error:
        return [
            f"model: {config.model} is not in the checkout {PROJECT_ROOT}, and as an id of the Hub: {error}; or {_SEEN_BY_ALL}"
        ]
    return []


def _upload_problems(key: str, path: Path) -> list[str]:
    there = (PROJECT_ROOT / path).resolve()
    if not there.is_relative_to(PROJECT_ROOT):
        return [f"{key}: {path} lies outside the checkout, which is what a job gets: {_SEEN_BY_ALL}"]
    if not there.exists():
        return [f"{key}: {path} is not in the checkout {PROJECT_ROOT}: put it there, or {_SEEN_BY_ALL}"]
    inside = there.relative_to(PROJECT_ROOT)
    if f"/{inside.parts[0] if inside.parts else ''}" in EXCLUDES or _is_ignored(inside):
        return [
            f"{key}: {path} is not uploaded with the checkout (.gitignore, or one of {', '.join(EXCLUDES)}): {_SEEN_BY_ALL}"
        ]
    return []


def _is_ignored(inside: Path) -> bool:
    done = subprocess.run(["git", "-C", str(PROJECT_ROOT), "check-ignore", "-q", str(inside)], check=False)
    return done.returncode == 0

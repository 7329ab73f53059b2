"""`status` of a study: one line a run, from the study's directory alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from rich.console import Console

from pipeline.run_state import RunStatus, read_status
from pipeline.status import details, state_text
from pipeline.study.expansion import STUDY_FILE
from pipeline.terminal import new_table, say, say_sentence, say_table
from storage.location import Location
from storage.lock import driver_of
from storage.open_place import open_place
from storage.run_directory import RunDirectory

_AT_ONCE = 8
"""Runs that are read at a time: in a bucket that is a matter of waiting."""


def is_study(location: Location) -> bool:
    """Whether a study lies there."""
    return STUDY_FILE in open_place(location).names()


def show_study_status(location: Location, console: Console) -> None:
    """Prints the status of the study at `location`; changes nothing."""
    directory = RunDirectory(location)
    labels = run_labels(location)
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="status") as pool:
        driver = pool.submit(driver_of, directory.location)
        runs = dict(zip(labels, pool.map(lambda label: read_status(directory.location / label), labels), strict=True))
    finished = sum(not status.to_do for status in runs.values())
    say(console, ("study", "bold"), f"   {directory.location}")
    found = driver.result()
    all_done = 0 < len(runs) == finished
    state = state_text(found.at_work, found.died, finished=all_done, begun=bool(runs))
    say(console, ("state", "bold"), "   ", *state)
    for model in dict.fromkeys(status.model for status in runs.values()):
        if model is not None:
            say(console, ("model", "bold"), f"   {model}")
    console.line()
    table = new_table("Run", "Done", "Failed tries", "Left to do")
    table.columns[-1].justify = "left"
    for label, status in runs.items():
        table.add_row(label, *_row(status), style=None if status.to_do else "green")
    say_table(console, table)
    for label, status in runs.items():
        for style, word, text in details(status):
            say_sentence(console, (word, style), f"  {label}: {text}")
    console.line()
    say_sentence(
        console,
        f"{finished} of {len(runs)} runs are finished. `status` of a run's directory says more of it"
        + ("." if all_done or found.at_work else "; the same command again does the rest."),
    )


def run_labels(location: Location, *, begun: bool = True) -> list[str]:
    """Labels of a study's runs that have begun, those of settings that the study had earlier too; without `begun` of all of
    its folders, also of what is no run."""
    place = open_place(location)
    seeds = sorted((name for name in place.subfolders() if name.startswith("seed-")), key=_number)
    labels = [f"{seed}/{name}" for seed in seeds for name in place.subfolders(seed)]
    return [label for label in labels if not begun or "config.json" in place.names(label)]


def _number(seed: str) -> tuple[int, str]:
    digits = seed.removeprefix("seed-")
    return (int(digits) if digits.isdecimal() else -1, seed)


def _row(status: RunStatus) -> tuple[str, str, str]:
    done = sum(stage.done for stage in status.stages.values())
    retries = sum(stage.retries for stage in status.stages.values())
    left = ", ".join(f"{name} {'?' if num is None else num}" for name, num in status.to_do.items())
    return f"{done:,}", f"{retries:,}" if retries else "-", left or "-"

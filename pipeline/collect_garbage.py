"""`gc`: what of a cache no run needs any more.

An entry is needed if the `units.json` of a named run lists its fingerprint; in it, the attempt that its record names. All else
goes, but for what has changed within a day: a driver that is not named may be at work.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pipeline.study.status import is_study, run_labels
from pipeline.terminal import counted, human_bytes, new_table, say, say_sentence, say_table
from storage.cache import RECORD, Cache, entry_key, is_units
from storage.location import Location
from storage.run_directory import RunDirectory

YOUNG_S = 24 * 3600.0


@dataclass(frozen=True)
class Garbage:
    """One entry of a cache, or one attempt in it, that nobody needs."""

    key: str
    num_bytes: int
    young: bool
    """Whether it has changed within a day."""


def find_garbage(location: Location, runs: Sequence[Location]) -> list[Garbage]:
    """What none of the runs needs.

    Args:
        runs: runs or studies, all that use the cache.

    Raises:
        ValueError: a run that is none, has another cache, or has not listed its units.
    """
    cache = Cache(location)
    needed, problems = set(), []
    for run in (directory for place in runs for directory in _runs_at(place)):
        units = run.units()
        if _resolved(run.cache.location) != _resolved(location):
            problems.append(f"{run.location} keeps its units in {run.cache.location}, not in {location}")
        elif not units:
            problems.append(f"{run.location} has listed no units: run it once, so that they are known")
        needed |= {
            entry_key(s, u.fingerprint) for s, found in units.items() for u in found if u.fingerprint is not None
        }
    if problems:
        raise ValueError("; ".join(problems))
    dead = set(cache.dead_attempts())
    return list(_candidates(cache, needed, dead))


def _resolved(location: Location) -> Location:
    return location.resolve() if isinstance(location, Path) else location


def _runs_at(location: Location) -> list[RunDirectory]:
    if not is_study(location):
        return [RunDirectory.open(location)]
    return [RunDirectory.open(location / label) for label in run_labels(location, begun=False)]


def _candidates(cache: Cache, needed: set[str], dead: set[str]) -> Iterator[Garbage]:
    sizes: Counter[str] = Counter()
    changed: dict[str, float] = {}
    for key, num_bytes, moment in cache.place.files():
        if not is_units(key):
            continue
        parts = key.split("/")
        entry, attempt = "/".join(parts[:2]), "/".join(parts[:3])
        place = entry if entry not in needed else attempt
        if entry in needed and (attempt not in dead or parts[2] == RECORD):
            continue
        sizes[place] += num_bytes
        changed[place] = max(changed.get(place, 0.0), moment)
    for key in sorted(sizes):
        yield Garbage(key, sizes[key], time.time() - changed[key] < YOUNG_S)


def show_garbage(location: Location, runs: Sequence[Location], console: Console, *, delete: bool) -> None:
    """Prints what nobody needs, and removes it with `delete`. Raises as `find_garbage`."""
    found = find_garbage(location, runs)
    old = [garbage for garbage in found if not garbage.young]
    table = new_table("Stage", "Folders", "Bytes")
    for stage in dict.fromkeys(garbage.key.partition("/")[0] for garbage in old):
        own = [garbage.num_bytes for garbage in old if garbage.key.startswith(f"{stage}/")]
        table.add_row(stage.capitalize(), f"{len(own):,}", human_bytes(sum(own)))
    say(console, ("cache", "bold"), f"  {location}")
    if old:
        console.line()
        say_table(console, table)
    if len(found) > len(old):
        say_sentence(console, f"{counted(len(found) - len(old), 'more folder')} changed within a day: kept.")
    what = f"{counted(len(old), 'folder')} with {human_bytes(sum(garbage.num_bytes for garbage in old))}"
    if not delete:
        say_sentence(console, f"No named run needs {what}; --delete removes it." if old else "Nothing to remove.")
        return
    place = Cache(location).place
    for garbage in old:
        place.remove(garbage.key)
    say_sentence(console, f"Removed {what}.")

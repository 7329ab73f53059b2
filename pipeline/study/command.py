"""`study`: from the file to the tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipeline.phase import phase
from pipeline.plan import said_and_fetched
from pipeline.runner import STAGES
from pipeline.stages.stage import Stage
from pipeline.study.collection import collect_results
from pipeline.study.driver import run_study
from pipeline.study.expansion import load_study
from pipeline.study.page import PAGE, TABLE, write_results
from pipeline.study.preparation import PreparedStudy, prepare_study
from pipeline.study.tables import show_results
from pipeline.terminal import counted, say
from storage.location import StoreUrl


def plan_study(
    path: Path,
    overrides: Sequence[str],
    console: Console,
    *,
    update: bool = False,
    stages: tuple[Stage, ...] = STAGES,
) -> bool:
    """Says what the study in `path` is; whether nothing is in its way. Writes nothing."""
    prepared = _prepared(path, overrides, console, stages, update=update)
    prepared.show(console)
    return not prepared.problems


def do_study(
    path: Path, overrides: Sequence[str], console: Console, *, update: bool, stages: tuple[Stage, ...] = STAGES
) -> bool:
    """Does what is left of the study's stages, writes and shows what they measured; whether no setting failed.

    Raises:
        ValueError: the file, a setting, the model or the study's directory is not right.
        WorkersFailed: no worker could be started.
    """
    prepared = _prepared(path, overrides, console, stages, update=update)
    prepared.require_feasible()
    if said_and_fetched(prepared.contexts.values(), console):
        with phase(console, "Checking the model"):
            prepared = prepare_study(prepared.study, stages, update=update)
            prepared.require_feasible()
    outcome = run_study(prepared, console, update=update, stages=stages)
    results = collect_results(prepared.study, outcome)
    write_results(results)
    place = prepared.study.location.absolute()
    console.line()
    show_results(results, console)
    console.line()
    done, shared, kept = (units.total() for units in (outcome.counts.done, outcome.counts.shared, outcome.counts.kept))
    say(console, f"{counted(done, 'unit')} done now, {shared} shared with other runs, {kept} were done before")
    say(console, f"results: {place / TABLE}")
    say(console, f"report:  {place / PAGE}")
    if isinstance(place, StoreUrl):
        say(console, f"copies:  python -m pipeline report {place}")
    if outcome.failures:
        names = dict.fromkeys(run.setting.name for run in prepared.study.runs if run.label in outcome.failures)
        say(
            console,
            ("error:", "bold red"),
            f" {len(outcome.failures)} of {len(prepared.study.runs)} runs failed, of the settings {', '.join(names)}. "
            "Finished work is kept. Run the same command again to resume.",
        )
    return not outcome.failures


def _prepared(
    path: Path, overrides: Sequence[str], console: Console, stages: tuple[Stage, ...], *, update: bool
) -> PreparedStudy:
    with phase(console, "Checking settings, model and machine"):
        return prepare_study(load_study(path, overrides), stages, update=update)

"""Commands. Heavy imports are inside them, so that `--help` and a wrong argument answer at once."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipeline.phase import phase

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Calibrates, quantizes and measures video diffusion transformers.",
)

ConfigArgument = Annotated[Path, typer.Argument(help="YAML file of the run.")]
RunArgument = Annotated[str, typer.Argument(help="Run directory: a path or s3://bucket/prefix.")]
RunOrStudyArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Directory of a run or a study: a path or s3://bucket/prefix.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a field of the configuration; repeatable."),
]
UntilOption = Annotated[
    str | None, typer.Option("--until", metavar="STAGE", help="Only the stages up to this one, such as assembly.")
]

AddressOption = Annotated[
    str,
    typer.Option(
        "--address", metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="Of Ray's dashboard: http://HOST:8265."
    ),
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The id that `submit` printed.")]


@app.command()
def run(
    config: ConfigArgument,
    overrides: SetOption = None,
    update: Annotated[
        bool, typer.Option("--update", help="Take a changed configuration; redo only what depends on the change.")
    ] = False,
    until: UntilOption = None,
) -> None:
    """Do everything of the run that is not done yet; also how a run is resumed."""
    console = Console()
    with _errors(console, resumable=True):
        with phase(console, "Checking configuration, model and machine"):
            from pipeline.config.loading import load_config
            from pipeline.plan import plan_config
            from pipeline.report.page import write_report
            from pipeline.runner import open_run, run_stages, stages_until
            from storage.location import StoreUrl

            stages = stages_until(until)
            planned = plan_config(load_config(config, overrides or ()))
            planned.require_feasible()
            opened = open_run(planned.context, update=update)
        summary = run_stages(opened, console, stages=stages, planned_bytes=planned.worker_bytes)
        with phase(console, "Writing the report"):
            report = write_report(opened)
        done, kept = sum(summary.done.values()), sum(summary.kept.values())
        console.print(f"{done} units done now, {kept} were done before")
        directory, assembled = opened.directory, bool(opened.manifest.units("assembly"))
        if assembled:
            path = directory.location / directory.checkpoint_key()
            console.print(f"checkpoint: {path}", soft_wrap=True, highlight=False)
        console.print(f"report:     {report}", soft_wrap=True, highlight=False)
        if assembled and isinstance(directory.location, StoreUrl):
            console.print(f"get it:     python -m pipeline fetch {directory.location} FOLDER", highlight=False)


@app.command()
def plan(
    config: ConfigArgument,
    overrides: SetOption = None,
    shapes_only: Annotated[
        bool,
        typer.Option(
            "--shapes-only", help="Plan for another machine: the model's config files are enough, no weights are read."
        ),
    ] = False,
) -> None:
    """Say beforehand what a run needs, and every reason why it would fail. Needs no GPU."""
    console = Console()
    with _errors(console):
        with phase(console, "Checking configuration and model", logged=False):
            from pipeline.config.loading import load_config
            from pipeline.plan import plan_config

            planned = plan_config(load_config(config, overrides or ()), shapes_only=shapes_only)
        planned.show(console)
        if planned.problems:
            raise typer.Exit(1)


@app.command()
def study(
    study_file: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file of the study.")],
    overrides: SetOption = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say how many runs and units it is, and every problem.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Take changed configurations; redo only what depends on the change.")
    ] = False,
    until: UntilOption = None,
) -> None:
    """Compare settings over several seeds: everything they have in common is done once. Also how a study is resumed."""
    console = Console()
    with _errors(console, resumable=not plan):
        with phase(console, "Loading"):
            from pipeline.runner import stages_until
            from pipeline.study.command import do_study, plan_study

            stages = stages_until(until)
        if not (
            plan_study(study_file, overrides or (), console, stages=stages)
            if plan
            else do_study(study_file, overrides or (), console, update=update, stages=stages)
        ):
            raise typer.Exit(1)


@app.command()
def status(run_directory: RunOrStudyArgument) -> None:
    """What of a run or a study is done, whether it is running, and what failed."""
    console = Console()
    with _errors(console):
        from pipeline.status import show_status
        from pipeline.study.status import is_study, show_study_status
        from storage.location import parse_location

        location = parse_location(run_directory)
        if is_study(location):
            show_study_status(location, console)
        else:
            show_status(location, console)


@app.command()
def report(run_directory: RunOrStudyArgument) -> None:
    """Write the report of a run anew, from what is there; of one in a bucket, or a study there, make a local copy."""
    console = Console()
    with _errors(console):
        from pipeline.fetching import fetch_file, fetch_report
        from pipeline.report.page import write_report_at
        from pipeline.study.status import is_study
        from storage.location import StoreUrl, parse_location

        location = parse_location(run_directory)
        if is_study(location):
            from pipeline.study.page import PAGE, TABLE

            for key in (PAGE, TABLE):
                console.print(f"report: {location / key}", soft_wrap=True, highlight=False)
                if isinstance(location, StoreUrl):
                    console.print(f"copy:   {fetch_file(location, key, Path.cwd())}", soft_wrap=True, highlight=False)
            return
        console.print(f"report: {write_report_at(location)}", soft_wrap=True, highlight=False)
        if isinstance(location, StoreUrl):
            console.print(f"copy:   {fetch_report(location, Path.cwd())}", soft_wrap=True, highlight=False)


@app.command()
def fetch(
    run_directory: RunArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for the checkpoint.")],
    method: Annotated[str | None, typer.Option(help="One of the methods compared; default: the run's own.")] = None,
) -> None:
    """Copy a run's checkpoint to a new local folder, every checksum verified: from_pretrained wants local files."""
    console = Console()
    with _errors(console):
        from pipeline.fetching import fetch_checkpoint
        from storage.location import parse_location

        num_files = fetch_checkpoint(parse_location(run_directory), folder, method=method)
        console.print(f"checkpoint: {folder.absolute()} ({num_files} files)", soft_wrap=True, highlight=False)


@app.command()
def verify(
    checkpoint: Annotated[
        str, typer.Argument(help="Pipeline folder of a quantized checkpoint; s3://bucket/prefix too.")
    ],
) -> None:
    """Check a checkpoint: names, shapes, bits, bytes, checksums, and that every layer said to be quantized is."""
    console = Console()
    with _errors(console):
        from pipeline.verification import show_verification
        from storage.location import parse_location

        if not show_verification(parse_location(checkpoint), console):
            raise typer.Exit(1)


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="YAML file of the run, or of a study.")],
    address: AddressOption,
    overrides: SetOption = None,
    update: Annotated[
        bool, typer.Option("--update", help="Take a changed configuration; redo only what depends on the change.")
    ] = False,
    until: UntilOption = None,
    follow: Annotated[bool, typer.Option("--follow/--detach", help="Show the job's output until it ends.")] = True,
) -> None:
    """Run on a Ray cluster: uploads the checkout and runs it there. Submitting again resumes the run, or the study."""
    console = Console()
    with _errors(console):
        from pipeline.submission import job_of, submit_job

        if until is not None:
            from pipeline.runner import stages_until  # takes seconds: brings the models' libraries along

            stages_until(until)
        request = job_of(config, overrides or (), update=update, until=until)
        raise typer.Exit(submit_job(address, request, console, follow=follow))


@app.command()
def logs(job: JobArgument, address: AddressOption) -> None:
    """Show a submitted job's output, from its beginning, until it ends."""
    console = Console()
    with _errors(console):
        from cluster.job_submission import JobClient
        from pipeline.submission import follow_job

        raise typer.Exit(follow_job(JobClient(address), job, console))


@app.command()
def stop(job: JobArgument, address: AddressOption) -> None:
    """Stop a submitted job; what it has done is kept."""
    console = Console()
    with _errors(console):
        from cluster.job_submission import JobClient
        from pipeline.submission import stop_job

        stop_job(JobClient(address), job, console)


@contextlib.contextmanager
def _errors(console: Console, *, resumable: bool = False) -> Iterator[None]:
    """Mistakes of the user and failed units end in a message and exit code 1; bugs keep their traceback."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    again = "\nWhat is done is kept: the same command goes on from here." if resumable else ""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"stopped.{again}", highlight=False)
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        hint = again if isinstance(error, OSError) else ""
        console.print(f"[bold red]error:[/] {_escaped(str(error))}{hint}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except RuntimeError as error:
        if type(error).__name__ not in ("UnitsFailed", "WorkersFailed"):
            raise
        console.print(f"[bold red]error:[/] {_escaped(str(error))}{again}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)

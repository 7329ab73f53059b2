"""Commands. Heavy imports are inside them, so that `--help` and a wrong argument answer at once."""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from pipeline.phase import phase
from pipeline.provenance import provenance
from pipeline.terminal import counted, say, say_sentence

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's help shows a type for every flag, and takes brackets for markup
    context_settings={"max_content_width": 110},
    help="Calibrate, quantize and evaluate video diffusion transformers.",
)


class _Command(TyperCommand):
    """A command whose usage line shows a needed argument as its name alone, not as {NAME}."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The parts of the line behind the command's name."""
        return [re.sub(r"^\{(.*)\}$", r"\1", piece) for piece in super().collect_usage_pieces(ctx)]


command = partial(app.command, cls=_Command)

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run directory: a path or s3://bucket/prefix.")]
RunOrStudyArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Directory of a run or a study: a path or s3://bucket/prefix.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a field of the configuration; repeatable."),
]
UntilOption = Annotated[
    str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage, such as assembly.")
]

AddressOption = Annotated[
    str,
    typer.Option(
        "--address",
        metavar="URL",
        envvar="RAY_API_SERVER_ADDRESS",
        help="Address of the cluster's Ray dashboard: http://HOST:8265.",
    ),
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Job id, as printed by `submit`.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        found = provenance()
        say(Console(soft_wrap=True), f"reelquant {version('reelquant')}, commit {found['commit'] or 'unknown'}")
        packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
        say(Console(soft_wrap=True), f"Python {found['python']}, {packages}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the versions and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@command()
def init(
    model: Annotated[
        str,
        typer.Option("--model", metavar="MODEL", help="Folder in diffusers format, or an id of the Hugging Face Hub."),
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="New YAML file.")] = Path("run.yaml"),
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a model on the Hub.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Weight files of the model that are taken, such as fp16.")
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Write a commented configuration for a model, ready for `plan`."""
    console = Console()
    with _errors(console):
        with phase(console, "Looking at the model", logged=False):
            from pipeline.new_config import IMAGE_LINE, write_config

            written = write_config(file, model, overrides or (), revision=revision, variant=variant)
        say(console, f"written: {written.file} (look at prompts and run, then at what a run takes)")
        for prompts, num in written.absent.items():
            say(console, f"write:   {prompts}: {counted(num, 'line')} such as {IMAGE_LINE}")
        if written.absent:
            width, height = written.image_size
            say(console, f"images:  in the folders of these files, of {width} x {height} pixels or in proportion")
        say(console, f"next:    python -m pipeline plan {shlex.quote(str(written.file))}")
        if written.absent:
            say(console, "         with --shapes-only as long as these files are not there")


@command()
def run(
    config: ConfigArgument,
    overrides: SetOption = None,
    update: Annotated[
        bool,
        typer.Option(
            "--update",
            help="Accept a changed configuration or changed prompts and redo only the work that depends on the change.",
        ),
    ] = False,
    until: UntilOption = None,
    rehash: Annotated[
        bool, typer.Option("--rehash", help="Hash all finished files again, also those with unchanged size and time.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the tracebacks of failed units.")] = False,
) -> None:
    """Run everything that is not done yet. Run it again to resume."""
    console = Console()
    with _errors(console, resumable=True, verbose=verbose):
        with phase(console, "Checking configuration, model and machine"):
            from pipeline.config.loading import load_config
            from pipeline.plan import fetched, plan_config
            from pipeline.report.page import write_report_at
            from pipeline.runner import open_run, run_stages, stages_until
            from storage.location import StoreUrl

            stages = stages_until(until)
            planned = plan_config(load_config(config, overrides or ()), update=update)
            planned.require_feasible()
        planned = fetched(planned, console, update=update)
        opened = open_run(planned.context, update=update)
        counts = run_stages(opened, console, stages=stages, planned_bytes=planned.worker_bytes, rehash=rehash)
        with phase(console, "Writing the report"):
            report = write_report_at(opened.directory.location)
        done, kept = counts.done.total(), counts.kept.total()
        say(console, f"{counted(done, 'unit')} done now, {kept} were done before")
        directory, assembled = opened.directory, any(stage == "assembly" for stage, _ in opened.records.all())
        if assembled:
            path = directory.location / directory.checkpoint_key()
            say(console, f"checkpoint: {path}")
        say(console, f"report:     {report}")
        if assembled and isinstance(directory.location, StoreUrl):
            say(console, f"get it:     python -m pipeline fetch {directory.location} FOLDER")


@command()
def plan(
    config: ConfigArgument,
    overrides: SetOption = None,
    shapes_only: Annotated[
        bool,
        typer.Option(
            "--shapes-only",
            help="Plan from the model's config files only; neither weights nor prompts are needed.",
        ),
    ] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Do one unit of each kind in a scratch folder, with the run's workers, and say the hours of all of them.",
        ),
    ] = False,
    update: Annotated[bool, typer.Option("--update", help="Plan what `run --update` would do.")] = False,
) -> None:
    """Count units, disk and memory, and check that the run can succeed. No GPU needed."""
    console = Console()
    with _errors(console):
        with phase(console, "Checking configuration and model", logged=False):
            from pipeline.config.loading import load_config
            from pipeline.measurement import measure as measure_run
            from pipeline.measurement import require_measurable
            from pipeline.plan import fetched, plan_config
            from pipeline.planning.plan_tables import show_plan

            loaded = load_config(config, overrides or ())
            if measure:
                require_measurable(loaded, shapes_only=shapes_only)
            planned = plan_config(loaded, shapes_only=shapes_only, update=update)
        show_plan(planned, console)
        if planned.problems:
            raise typer.Exit(1)
        if measure:
            measure_run(fetched(planned, console, update=update).context, console).show(console)


@command()
def study(
    study_file: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file of the study.")],
    overrides: SetOption = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only count runs and units, and list all problems.")] = False,
    update: Annotated[
        bool,
        typer.Option(
            "--update", help="Accept changed configurations and redo only the work that depends on the change."
        ),
    ] = False,
    until: UntilOption = None,
) -> None:
    """Compare settings over several seeds; shared work is done once. Run it again to resume."""
    console = Console()
    with _errors(console, resumable=not plan):
        with phase(console, "Loading"):
            from pipeline.runner import stages_until
            from pipeline.study.command import do_study, plan_study

            stages = stages_until(until)
        if not (
            plan_study(study_file, overrides or (), console, update=update, stages=stages)
            if plan
            else do_study(study_file, overrides or (), console, update=update, stages=stages)
        ):
            raise typer.Exit(1)


@command()
def status(run_directory: RunOrStudyArgument) -> None:
    """Show the progress of a run or a study, and its failures."""
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


@command()
def report(run_directory: RunOrStudyArgument) -> None:
    """Write a run's report again from its files. A report in a bucket is also copied to this folder."""
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
                say(console, f"report: {location / key}")
                if isinstance(location, StoreUrl):
                    say(console, f"copy:   {fetch_file(location, key, Path.cwd())}")
            return
        say(console, f"report: {write_report_at(location)}")
        if isinstance(location, StoreUrl):
            say(console, f"copy:   {fetch_report(location, Path.cwd())}")


@command()
def fetch(
    run_directory: RunArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for the checkpoint.")],
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="One of the compared methods; default: the run's own.")
    ] = None,
) -> None:
    """Copy a run's checkpoint to a new local folder. Verifies every checksum."""
    console = Console()
    with _errors(console):
        from pipeline.fetching import fetch_checkpoint
        from storage.location import expand_home, parse_location

        folder = expand_home(folder)
        num_files = fetch_checkpoint(parse_location(run_directory), folder, method=method)
        say(console, f"checkpoint: {folder.absolute()} ({counted(num_files, 'file')})")


@command()
def verify(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="Pipeline folder of a quantized checkpoint: a path or s3://bucket/prefix."
        ),
    ],
) -> None:
    """Check a checkpoint: checksums of all its files; names, shapes, bits and bytes of the quantized transformer."""
    console = Console()
    with _errors(console):
        from pipeline.verification import show_verification
        from storage.location import parse_location

        if not show_verification(parse_location(checkpoint), console):
            raise typer.Exit(1)


@command()
def gc(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="A path or s3://bucket/prefix, such as RUN/cache.")],
    runs: Annotated[
        list[str],
        typer.Option("--runs", metavar="RUN", help="A run or study that uses it; repeatable. Name all of them."),
    ],
    delete: Annotated[bool, typer.Option("--delete", help="Remove it, instead of only saying what it is.")] = False,
) -> None:
    """Find units in a cache that no named run needs any more. Nothing younger than a day is removed."""
    console = Console()
    with _errors(console):
        from pipeline.collect_garbage import show_garbage
        from storage.location import parse_location

        places = [parse_location(run).absolute() for run in runs]
        show_garbage(parse_location(cache).absolute(), places, console, delete=delete)


@command()
def schema(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="Only this key and those inside it, such as method.attention.")
    ] = "",
) -> None:
    """List the keys of a configuration with their values, defaults and meanings."""
    console = Console()
    with _errors(console):
        from pipeline.config.reference import keys

        for found in keys(key):
            say_sentence(console, str(found))


@command()
def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run, or of a study.")],
    address: AddressOption,
    overrides: SetOption = None,
    update: Annotated[
        bool,
        typer.Option(
            "--update",
            help="Accept a changed configuration or changed prompts and redo only the work that depends on the change.",
        ),
    ] = False,
    until: UntilOption = None,
    follow: Annotated[bool, typer.Option("--follow/--detach", help="Show the job's output, or return at once.")] = True,
) -> None:
    """Upload the checkout to a Ray cluster and run it there. Submit it again to resume."""
    console = Console()
    with _errors(console):
        from pipeline.submission import job_of, submit_job

        if until is not None:
            from pipeline.runner import stages_until  # takes seconds: brings the models' libraries along

            stages_until(until)
        request = job_of(config, overrides or (), update=update, until=until)
        raise typer.Exit(submit_job(address, request, console, follow=follow))


@command()
def logs(job: JobArgument, address: AddressOption) -> None:
    """Show a submitted job's output from its beginning until it ends."""
    console = Console()
    with _errors(console):
        from cluster.job_submission import JobClient
        from pipeline.submission import follow_job

        raise typer.Exit(follow_job(JobClient(address), job, console))


@command()
def stop(job: JobArgument, address: AddressOption) -> None:
    """Stop a submitted job. Finished work is kept."""
    console = Console()
    with _errors(console):
        from cluster.job_submission import JobClient
        from pipeline.submission import stop_job

        stop_job(JobClient(address), job, console)


@contextlib.contextmanager
def _errors(console: Console, *, resumable: bool = False, verbose: bool = False) -> Iterator[None]:
    """Mistakes of the user and failed units end in a message and exit code 1; bugs keep their traceback.

    Args:
        resumable: the command may be run again to go on.
        verbose: show the tracebacks of failed units too.
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    again = "\nFinished work is kept. Run the same command again to resume." if resumable else ""
    try:
        yield
    except KeyboardInterrupt:
        say(console, f"stopped.{again}")
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        say(console, ("error:", "bold red"), f" {error}{again if isinstance(error, OSError) else ''}")
        raise typer.Exit(1) from error
    except RuntimeError as error:
        if type(error).__name__ not in ("UnitsFailed", "WorkersFailed"):
            raise
        details = error.details() if hasattr(error, "details") else ""
        if verbose and details:
            say(console, details)
        where = "\nTracebacks are in the run's logs/events.jsonl; --verbose shows them here." if details else ""
        say(console, ("error:", "bold red"), f" {error}{'' if verbose else where}{again}")
        raise typer.Exit(1) from error

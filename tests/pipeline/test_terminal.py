"""Users' text reaches the terminal as it is, whatever rich takes it for."""

import ast
import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config.loading import parse_config
from pipeline.terminal import counted, new_table, say, say_sentence, say_table
from storage.run_directory import RunDirectory
from tests.pipeline.small_run import ROOT, small_run

HOSTILE = ("[bold]", "[/x]", "a [red]b[/red] :smile: \\[c", "[link=file:///x]")


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_printed_is_what_was_given(text: str, terminal: bool) -> None:
    written = io.StringIO()
    console = Console(file=written, width=200, force_terminal=terminal, color_system=None)
    say(console, (text, "bold red"), f": {text}")
    say_sentence(console, text)
    table = new_table(text, "Number")
    table.add_row(text, f"{text} 1")
    say_table(console, table)
    assert written.getvalue().count(text) == 6


@pytest.mark.parametrize("name", ["[bold]run", "a[/x]"])
def test_commands_with_such_a_path_and_such_prompts(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    path = small_run(folder)
    (folder / "calibration.txt").write_text(f"{name} prompt\n{name} prompt\n")
    config = parse_config(yaml.safe_load(path.read_text()), "test").identity()
    run = RunDirectory.open_or_create(folder / "run", config, {})
    for arguments, code in (
        (["plan", str(path), "--shapes-only", "--set", f"run={folder}/other"], 0),
        (["plan", str(path), "--set", f"model={name}"], 1),
        (["plan", str(folder / "nothing.yaml")], 1),
        (["status", str(run.path)], 0),
        (["report", str(run.path)], 0),
        (["verify", str(run.path)], 1),
        (["fetch", str(run.path), str(folder / "copy")], 1),
        (["submit", str(path), "--address", name], 1),
        (["run", str(path), "--until", name], 1),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == code, result.output
        assert name in result.output.replace("\n", ""), (arguments, result.output)


def test_nothing_is_printed_past_the_module_that_prints() -> None:
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        tree = ast.parse(path.read_text())
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        printing = [call for call in calls if isinstance(call, ast.Attribute) and call.attr == "print"]
        assert not printing or path.name == "terminal.py", f"{path}: use pipeline.terminal"
        assert "rich.markup" not in path.read_text()


def test_plural_forms() -> None:
    found = [counted(num, "CPU") for num in (0, 1, 2, 0.5, 1.0, 1200)]
    assert found == ["0 CPUs", "1 CPU", "2 CPUs", "0.5 CPUs", "1 CPU", "1,200 CPUs"]

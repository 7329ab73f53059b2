"""Files of JSON lines: what a line says, what is wrong with it, and what of it a run depends on."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.config.loading import ConfigError, load_config
from pipeline.config.prompts import read_prompts
from pipeline.context import Run, build_context, prompt_notes
from pipeline.plan import make_plan
from pipeline.planning.token_counts import count_tokens
from pipeline.runner import open_run
from pipeline.stages.evaluation import Evaluation
from pipeline.stages.trajectories import Trajectories
from pipeline.submission import job_of
from storage.cache import Cache
from storage.run_directory import RunDirectory
from tests.errors import names, raises
from tests.pipeline.small_run import small_run
from tests.reelquant.families import tiny_pipelines
from workers.messages import PromptUnit
from workers.pipeline_call import prompt_arguments

GENERATION = {
    "height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3, "max_sequence_length": 16,
}  # fmt: skip


def image(path: Path, size: tuple[int, int] = (96, 64), color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_lines_of_json(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.png")
    lines = ({"prompt": " a bird ", "image": "images/a.png"}, "", {"prompt": "a fish", "negative_prompt": "blurred"})
    bird, fish = read_prompts(write_lines(tmp_path / "p.jsonl", *lines), 2, "calibration")
    assert (bird.prompt, bird.line, bird.negative_prompt) == ("a bird", 1, None)
    assert bird.image is not None
    assert (bird.image.size, bird.image.content) == ((96, 64), (tmp_path / "images" / "a.png").read_bytes())
    assert (fish.prompt, fish.line, fish.image, fish.negative_prompt) == ("a fish", 3, None, "blurred")


def test_everything_wrong_with_the_lines_is_named_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    image(tmp_path / "outside.png")
    image(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:60])
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    path = write_lines(
        folder / "p.jsonl",
        {"prompt": "a", "picture": "whole.png"},
        "a plain prompt",
        {"image": "whole.png"},
        {"prompt": " "},
        {"prompt": "a", "image": "gone.png"},
        {"prompt": "a", "image": "../outside.png"},
        {"prompt": "a", "image": str(tmp_path / "outside.png")},
        {"prompt": "a", "image": "link.png"},
        {"prompt": "a", "image": "cut.png"},
        {"prompt": "a", "image": "p.jsonl"},
        '{"prompt": "a", "prompt": "b"}',
        ["a"],
        {"prompt": "fine", "image": "whole.png"},
        {"prompt": "not among the first", "image": "gone.png"},
    )
    with pytest.raises(ConfigError) as caught:
        read_prompts(path, 13, "held_out")
    found = caught.value.problems
    words = (
        "picture", "JSON", "prompt", "prompt", "gone.png", "../outside.png", tmp_path / "outside.png", "link.png",
        "cut.png", "PNG", "prompt", '["a"]',
    )  # fmt: skip
    assert len(found) == len(words)
    for number, (problem, word) in enumerate(zip(found, words, strict=True), 1):
        assert names(problem, "prompts.held_out", path, f"line {number}", word)


def problems_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read_prompts(path, 1, "calibration")
    return caught.value.problems


def test_names_end_in_letters_of_either_case(tmp_path: Path) -> None:
    [prompt] = read_prompts(write_lines(tmp_path / "P.JSONL", {"prompt": "a"}), 1, "calibration")
    assert prompt.prompt == "a"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('a bird\n\n{"prompt": "a"}\n{"prompt": "b"}\n', "lines 3, 4"),
        ('[{"prompt": "a"},\n {"prompt": "b"}]\n', "lines 1, 2"),
        ('[{"prompt": "a"}, {"prompt": "b"}]\n', "line 1"),
        ('\n{\n  "prompt": "a"\n}\n', "lines 2 to 4"),
    ],
)
def test_json_is_no_text(text: str, lines: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(text)
    [problem] = problems_of(path)
    assert names(problem, "prompts.calibration", path, lines, ".jsonl")


def test_text_may_look_like_json(tmp_path: Path) -> None:
    """Whatever has no prompt in it, or is not whole."""
    lines = (
        '{"a": 1}',
        '"a quoted bird"',
        "[1, 2]",
        "[a camera pans]",
        "{",
        '{"prompt": "not closed',
        "[" * 10**5,
        "7",
    )
    assert [p.prompt for p in read_prompts(write_lines(tmp_path / "p.txt", *lines), 8, "calibration")] == list(lines)


@pytest.mark.parametrize(
    "text",
    [
        '[{"prompt": "a"}]',
        '[\n{"prompt": "a"},\n{"prompt": "b"}\n]\n',
        '{\n "prompt": "a"\n}\n{\n "prompt": "b"\n}\n',
        '{"prompt":\n "a"}\n',
        '{\n "prompt": "a",\n}\n',
        '{"prompt": "a"} {"prompt": "b"}\n',
    ],
)
def test_other_json_is_named_once(text: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    [problem] = problems_of(path)
    assert names(problem, path, "one object a line", '{"prompt": "...", "image": "path/from/the/file.png"}')


def test_an_empty_file_of_json_lines(tmp_path: Path) -> None:
    [problem] = problems_of(write_lines(tmp_path / "p.jsonl", ""))
    assert names(problem, tmp_path / "p.jsonl", '{"prompt": "...", "image": "path/from/the/file.png"}')


def test_what_is_no_object_is_named_by_its_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "a"}, "[" * 10**5, "null", '"b"', 7)
    found = problems_of(path)
    for line, (problem, word) in enumerate(zip(found, ("[" * 60, "null", '"b"', 7), strict=True), 2):
        assert names(problem, "prompts.calibration", path, f"line {line}", word)
        assert len(problem) < 400 + len(str(path))


def test_images_that_are_no_files(tmp_path: Path) -> None:
    """Nothing of them is read: of a pipe that would never end."""
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    given = (
        "loop.png", "pipe.png", "folder.png", "a\0b.png", "a" * 300, "https://example.com/a.png", "file:///a.png", "~/a.png",
    )  # fmt: skip
    path = write_lines(tmp_path / "p.jsonl", *({"prompt": "a", "image": name} for name in given))
    with pytest.raises(ConfigError) as caught:
        read_prompts(path, len(given), "held_out")
    words = (*given[:3], r"a\x00b.png", *given[4:])
    for number, (problem, word) in enumerate(zip(caught.value.problems, words, strict=True), 1):
        assert names(problem, "prompts.held_out", path, f"line {number}", "image", word)
        if number > 5:
            assert names(problem, tmp_path, "URL", "~")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.wan(tmp_path_factory.mktemp("text") / "model")


def run_of(folder: Path, model: Path, *lines: Any, num_calibration: int | None = None, **changes: Any) -> Run:
    """A run, whose held-out prompt is the last of `lines`; `num_calibration` where some are empty."""
    write_lines(folder / "c.jsonl", *lines[:-1])
    write_lines(folder / "h.jsonl", lines[-1])
    prompts = {
        "calibration": str(folder / "c.jsonl"), "num_calibration": num_calibration or len(lines) - 1,
        "held_out": str(folder / "h.jsonl"), "num_held_out": 1,
    }  # fmt: skip
    values = {"generation": {**GENERATION, "guidance_scale": 4.0}, "selection": {"num_samples": 2}, **changes}
    config = load_config(small_run(folder, model=str(model), prompts=prompts, method={"preset": "rtn"}, **values))
    return Run(build_context(config), RunDirectory(folder / "run"), Cache(folder / "cache"))


def fingerprints(run: Run) -> list[str]:
    """Of the first calibration prompt's trajectory, and of the held-out prompt with full precision."""
    return [plans[0].make().fingerprint for plans in (Trajectories().plan(run), Evaluation().plan(run))]


def test_what_a_pipeline_cannot_take_is_refused(tmp_path: Path, text_model: Path) -> None:
    image(tmp_path / "a.png")
    with raises(ConfigError, "prompts.calibration", tmp_path / "c.jsonl", "line 2", "WanPipeline", "image"):
        run_of(tmp_path, text_model, {"prompt": "a"}, {"prompt": "b", "image": "a.png"}, {"prompt": "c"})
    negative = {"prompt": "a", "negative_prompt": "blurred"}
    without = {**GENERATION, "guidance_scale": 1.0}
    with raises(ConfigError, "prompts.held_out", "line 1", "negative", "generation.guidance_scale", 1):
        run_of(tmp_path, text_model, {"prompt": "b"}, negative, generation=without)


def test_a_run_depends_on_negative_prompts(tmp_path: Path, text_model: Path) -> None:
    plain = [{"prompt": "a"}, {"prompt": "b"}]
    before = fingerprints(run_of(tmp_path, text_model, *plain))
    assert fingerprints(run_of(tmp_path, text_model, *plain)) == before
    changed = fingerprints(run_of(tmp_path, text_model, *({**line, "negative_prompt": "blurred"} for line in plain)))
    assert all(one != other for one, other in zip(before, changed, strict=True))


def test_changed_prompts_of_a_run_are_refused_without_update(tmp_path: Path, text_model: Path) -> None:
    lines = [{"prompt": "a"}, {"prompt": "b", "negative_prompt": "blurred"}, {"prompt": "c"}]
    first = run_of(tmp_path, text_model, *lines)
    open_run(first.context, update=False)
    assert make_plan(run_of(tmp_path, text_model, *lines).context).problems == []
    changed = run_of(tmp_path, text_model, "", lines[0], {"prompt": "b"}, lines[2], num_calibration=2).context
    words = (tmp_path / "run", "prompts.calibration", tmp_path / "c.jsonl", "line 3", "negative_prompt", "--update")
    [problem] = make_plan(changed).problems
    assert names(problem, *words)
    with raises(ValueError, *words):
        open_run(changed, update=False)
    assert make_plan(changed, update=True).problems == []
    open_run(changed, update=True)
    assert make_plan(changed).problems == []


def test_prompts_that_stand_more_than_once_are_noted_with_their_lines(tmp_path: Path, text_model: Path) -> None:
    lines = [{"prompt": "A  bird"}, {"prompt": "b"}, {"prompt": "a bird"}, {"prompt": "a bird", "negative_prompt": "x"}]
    [note] = prompt_notes(run_of(tmp_path, text_model, *lines, {"prompt": "c"}).context)
    assert names(note, "prompts.calibration", "'A  bird'", tmp_path / "c.jsonl", "lines 1, 3,")


def test_negative_prompts_that_are_cut_are_noted(tmp_path: Path, text_model: Path) -> None:
    run = run_of(tmp_path, text_model, {"prompt": "a", "negative_prompt": "blurred " * 40}, {"prompt": "b"})
    [note] = [note for note in count_tokens(run.context).notes if "negative" in note]
    assert names(note, "prompts.calibration", 1, GENERATION["max_sequence_length"], "generation.max_sequence_length")


def test_images_that_a_job_would_not_have_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "checkout"
    for name in ("a.png", "b.jpg"):
        image(checkout / name)
    (checkout / ".gitignore").write_text("*.png\n")
    write_lines(checkout / "c.jsonl", {"prompt": "a", "image": "a.png"}, {"prompt": "b", "image": "b.jpg"})
    (checkout / "h.txt").write_text("c\n")
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    monkeypatch.setattr("pipeline.submission.PROJECT_ROOT", checkout)
    files = ["prompts.calibration=c.jsonl", "prompts.held_out=h.txt", "cluster.address=auto"]
    with pytest.raises(ConfigError) as caught:
        job_of(small_run(tmp_path), files)
    [problem] = caught.value.problems
    assert names(problem, "prompts.calibration", checkout / "a.png", ".gitignore")


def test_arguments_of_a_pipeline() -> None:
    assert prompt_arguments(PromptUnit("p", "a")) == {"prompt": "a"}
    assert prompt_arguments([PromptUnit("p", "a")]) == {"prompt": ["a"]}
    units = [PromptUnit("p", "a", "blurred"), PromptUnit("q", "b")]
    assert prompt_arguments(units) == {"prompt": ["a", "b"], "negative_prompt": ["blurred", ""]}
    assert prompt_arguments(units[0]) == {"prompt": "a", "negative_prompt": "blurred"}

"""The driver, `plan`, `status` and the report agree on which units a run has, whatever its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.loading import parse_config
from pipeline.context import Run, build_context
from pipeline.plan import make_plan
from pipeline.report.run_data import read_run
from pipeline.run_state import read_status
from pipeline.run_units import STAGES
from pipeline.runner import STAGES as DRIVEN
from pipeline.stages.selection import Selection
from pipeline.stages.trajectories import Trajectories
from reelquant.settings.recipe import PRESETS
from storage.cache import UnitRecord
from storage.run_directory import RunDirectory
from tests.pipeline.small_run import Recorded, list_units, record_unit

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ROOT / "configs" / "prompts"

OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "sparse": {"method": {"attention": {"density": 0.25}}},
    "dense": {"method": {"attention": {"density": 1.0}}},
    "drift": {"method": {"drift_repair": True}},
    "velocity": {"method": {"velocity_correction": True}},
    "residual": {
        "method": {
            "attention": {"density": 0.25, "residual": {"order": 1, "gain": "calibrated"}, "refresh_steps": "placed"}
        }
    },
    "noise floor": {"evaluation": {"noise_floor": True, "films": False}, "distillation": {"segment_length": "all"}},
    "settings": {
        "method": {"attention": {"density": 0.25}},
        "evaluation": {
            "settings": {"wide": {"density": 0.5}, "off": {"enabled": False}},
            "videos": 1,
            "noise_floor": True,
        },
    },
    "compare": {
        "compare": ["rtn", {"preset": "rtn", "name": "sparse", "attention": {"density": 0.5}}],
        "evaluation": {"noise_floor": True, "recognizer": str(ROOT / "assets" / "digit-recognizer")},
        "distillation": {"segment_length": 1},
    },
    "compare refined": {
        "compare": [{"preset": "quarot", "name": "a", "drift_repair": True}, {"preset": "gptq", "name": "b-0"}],
        "selection": {"num_samples": 5},
    },
}
"""Beside a preset."""


def run_of(folder: Path, method: Mapping[str, Any], options: Mapping[str, Any]) -> Run:
    values = {
        "run": str(folder / "run"),
        "model": str(ROOT / "assets" / "hunyuanvideo-digits"),
        "generation": {"height": 48, "width": 64, "num_frames": 9, "num_inference_steps": 12, "max_sequence_length": 32},
        "prompts": {
            "calibration": str(PROMPTS / "digits_calibration.txt"), "num_calibration": 3,
            "held_out": str(PROMPTS / "digits_held_out.txt"), "num_held_out": 2,
        },
        "selection": {"num_samples": 4},
        **options,
        "method": {"name": "main", **method, "rotation_block": 64, **options.get("method", {})},
    }  # fmt: skip
    config = parse_config(values, "test")
    directory = RunDirectory.open_or_create(config.run, config.identity(), {})
    return Run(build_context(config, weights=False), directory, directory.cache)


def planned(stage: str, unit: str, **result: Any) -> UnitRecord:
    return UnitRecord(stage, unit, "f", "1", (), result, 1.0, "h", "cpu", 1, 1, "w")


def driven_units(run: Run) -> dict[str, list[str]]:
    """What the driver would do, stage by stage, if all went well; it lists them."""
    units: dict[str, list[str]] = {}
    num_samples = run.context.config.selection.num_samples
    samples = [{"prompt": f"prompt-{i % 3:03d}", "step": 11 - i} for i in range(num_samples)]
    for stage in DRIVEN:
        units[stage.name] = [plan.name for plan in stage.plan(run)]
        for name in units[stage.name]:
            run.records.add(planned(stage.name, name, chosen=samples))
        list_units(run.directory, stage.name, *units[stage.name])
    return units


# Presets differ in nothing else that decides on units than whether they learn and attend sparsely.
@pytest.mark.parametrize(
    ("preset", "options"),
    [(p, o) for p in PRESETS for o in OPTIONS if p in ("rtn", "s2q_quantsparse") or o == "nothing"],
)
def test_all_agree_on_the_units_of_a_run(preset: str, options: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, {"preset": preset}, OPTIONS[options])
    place = run.directory.location
    early = {stage: found.total for stage, found in read_status(place).stages.items()}
    assert early == {stage: found.num_expected for stage, found in read_run(place).stages.items()}
    units = driven_units(run)
    assert tuple(units) == STAGES
    numbers = {stage: len(names) for stage, names in units.items()}
    assert early == {**numbers, "distillation": None}, "known from the configuration alone"
    assert {stage: found.total for stage, found in read_status(place).stages.items()} == numbers
    for stage, names in units.items():
        for name in [*names, "of-an-older-configuration"]:
            record_unit(run.directory, stage, name, {})
    status, report = read_status(place), read_run(place)
    assert status.to_do == {}
    assert {stage: found.done for stage, found in status.stages.items()} == numbers
    assert {stage: [r.unit for r in found.records] for stage, found in report.stages.items()} == units
    assert all(found.complete for found in report.stages.values())
    for stage, names in units.items():
        if names:
            Recorded(run.directory).remove(stage, names[-1])
            assert read_status(place).to_do == {stage: 1}
            assert [s for s, found in read_run(place).stages.items() if not found.complete] == [stage]
            record_unit(run.directory, stage, names[-1], {})


@pytest.mark.parametrize(
    ("length", "lengths"), [(1, [1] * 9), (2, [2, 2, 2, 2, 1]), (4, [3, 3, 3]), (5, [5, 4]), (8, [5, 4]), ("all", [9])]
)
def test_segments_differ_by_one_block_at_most(length: int | str, lengths: list[int], tmp_path: Path) -> None:
    context = run_of(tmp_path, {"preset": "rtn"}, {"distillation": {"segment_length": length}}).context
    assert tuple(block for segment in context.segments for block in segment) == context.model.blocks
    assert [len(segment) for segment in context.segments] == lengths


@pytest.mark.parametrize("options", ["compare", "compare refined", "sparse"])
def test_plan_counts_the_units_that_the_driver_does(options: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, {"preset": "rtn"}, OPTIONS[options])
    numbers = {stage.name: stage.units for stage in make_plan(run.context).stages}
    assert numbers == {stage: len(names) for stage, names in driven_units(run).items()}


def test_the_selection_gets_the_sigmas_of_the_feature_that_it_reads(tmp_path: Path) -> None:
    def selection(folder: str, **chosen: str) -> tuple[Any, str]:
        (tmp_path / folder).mkdir()
        run = run_of(tmp_path / folder, {"preset": "rtn"}, {"selection": {"num_samples": 4, **chosen}})
        for plan in Trajectories().plan(run):
            run.records.add(planned("trajectories", plan.name))
        [plan] = Selection().plan(run)
        return Selection().settings(run), plan.make().fingerprint

    latent, first = selection("a", strategy="salience")
    unread, _ = selection("b", strategy="uniform", diffusion_feature="output")
    output, other = selection("c", strategy="salience", diffusion_feature="output")
    assert latent.sigmas == unread.sigmas == ()
    assert (output.diffusion_feature, len(output.sigmas), output.sigmas[-1]) == ("output", 13, 0.0)
    assert first != other

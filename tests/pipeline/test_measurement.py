"""`plan --measure`: one unit of each kind with real workers, in a folder that is gone afterwards."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.config.loading import load_config
from pipeline.measurement import Measurement, measure
from pipeline.plan import plan_config
from pipeline.unit_sampler import MeasuredKind
from tests.errors import names
from tests.pipeline.small_run import call, small_run
from workers.messages import UnitOutput
from workers.usage import Usage

SPARSE = {"preset": "rtn", "name": "quantsparse", "attention": {"density": 0.5, "dense_steps": 1, "dense_layers": 1}}


def shown(measurement: Measurement) -> str:
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        measurement.show(console)
    return capture.get()


@pytest.mark.ray
def test_one_unit_of_each_kind_stands_for_all(tmp_path: Path) -> None:
    path = small_run(
        tmp_path,
        method=SPARSE,
        compare=[{"preset": "rtn", "name": "repaired", "drift_repair": True}],
        evaluation={"velocity_prompts": 3, "prompts_per_pass": 2, "weight_steps": 2, "videos": 2},
        distillation={"segment_length": "all"},
        bits={"weight": 4, "activation": 8, "exceptions": [{"pattern": "single_transformer_blocks.5.*", "weight": 8}]},
    )
    (tmp_path / "held_out.txt").write_text("".join(f"the digit {digit} moving right\n" for digit in range(3)))
    before = sorted(tmp_path.rglob("*"))
    planned = plan_config(load_config(path, ["prompts.num_held_out=3"]))
    measurement = measure(planned.context, Console(quiet=True))
    assert sorted(tmp_path.rglob("*")) == before, "neither the run's directory nor a scratch folder is there"
    found = {f"{kind.stage}/{kind.unit}": kind.num for kind in measurement.kinds}
    sparse = "distillation/quantsparse"
    assert found == {
        "trajectories/prompt-000": 2, "selection/selection": 1, "activations/prompt-000-step-000": 3,
        f"{sparse}-transformer_blocks.0": 1,  # dense
        f"{sparse}-transformer_blocks.1": 2,
        f"{sparse}-single_transformer_blocks.0": 5,
        f"{sparse}-single_transformer_blocks.5": 1,  # of 8 bits
        f"{sparse}-auxiliary": 1,
        "distillation/repaired-transformer_blocks.0": 3,
        "distillation/repaired-single_transformer_blocks.0": 5,
        "distillation/repaired-single_transformer_blocks.5": 1,
        "distillation/repaired-auxiliary": 1,
        "refinement/repaired": 1, "assembly/quantsparse": 1, "assembly/repaired": 1,
        "evaluation/full_precision-prompt-000": 3,
        "evaluation/quantsparse-prompt-000": 2, "evaluation/repaired-prompt-000": 2, "evaluation/step_weights": 1,
        "evaluation/quantsparse-velocity-000": 1, "evaluation/quantsparse-velocity-001": 1,
        "evaluation/repaired-velocity-000": 1, "evaluation/repaired-velocity-001": 1,
    }  # fmt: skip
    units = {stage.name: stage.units for stage in planned.stages}
    assert measurement.units == units
    for stage in units.keys() - {"distillation"}:
        assert sum(kind.num for kind in measurement.kinds if kind.stage == stage) == units[stage], stage
    assert all(kind.seconds > 0 for kind in measurement.kinds)
    assert all(
        line in shown(measurement) for line in ("Trajectories", "  quantsparse-transformer_blocks.1", "1 worker")
    )


def kind(stage: str, seconds: float, num: int) -> MeasuredKind:
    usage = Usage(seconds, 2.0, 0.0, None, 0, 0, None, None)
    return MeasuredKind(stage, "unit", UnitOutput({}, "a GPU", 0, usage), num)


def test_hours_follow_from_units_and_workers() -> None:
    kinds = (kind("trajectories", 360.0, 20), kind("distillation", 10.0, 60), kind("assembly", 90.0, 1))
    by_four = Measurement(kinds, 4, {"trajectories": 20, "distillation": 2, "assembly": 1})
    assert [by_four.seconds(measured) for measured in kinds] == [1800.0, 300.0, 90.0], (
        "two segments are not done by four"
    )
    assert "0:36:30" in shown(by_four)
    elsewhere = replace(by_four, num_workers=None)
    assert [elsewhere.seconds(measured) for measured in kinds] == [7200.0, 600.0, 90.0]
    assert "one worker" in shown(elsewhere)
    for text in map(shown, (by_four, elsewhere)):
        assert all(len(line) <= 80 for line in text.splitlines()[:8])


def test_what_cannot_be_measured_is_said_at_once(tmp_path: Path) -> None:
    path = small_run(tmp_path)
    both = call("plan", str(path), "--measure", "--shapes-only", "--set", "run=s3://bucket/run")
    assert both.returncode == 1
    assert names(both.stdout, "--shapes-only", "run", "s3://bucket/run", "--set run=")
    impossible = call("plan", str(path), "--measure", "--set", "numerics.threads=999")
    assert impossible.returncode == 1
    assert "numerics.threads" in impossible.stdout
    assert not (tmp_path / "run").exists()

"""What a run's own records say of it, beside what its plan said before: seconds, bytes, memory, rates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.planning.plan_result import Plan
from pipeline.report.run_data import RunData, read_run
from pipeline.report.timeline import Bar, Timeline, read_timeline
from storage.cache import UnitRecord

STAGES = ("trajectories", "selection", "activations", "distillation", "assembly")


def run_figures(run: Path, plan: Plan) -> dict[str, Any]:
    """By stage, as far as the run has come."""
    data = read_run(run)
    timeline = read_timeline(data.events)
    planned = {stage.name: stage for stage in plan.stages}
    found: dict[str, Any] = {}
    for name in STAGES:
        records = data.stages[name].records
        if not records:
            continue
        figures = _stage(records, [bar for bar in timeline.bars if bar.stage == name], timeline)
        expected = planned[name]
        figures |= {
            "planned_units": expected.units,
            "planned_bytes": expected.disk_bytes,
            "planned_peak_bytes": expected.peak_memory_bytes,
        }
        found[name] = figures
    if "assembly" in found:
        result = data.stages["assembly"].records[0].result
        found["assembly"] |= {name: result[name] for name in ("transformer_bytes", "source_bytes", "compression")}
        found["assembly"]["planned_transformer_bytes"] = plan.checkpoints[0].transformer_bytes
        found["assembly"]["planned_compression"] = plan.checkpoints[0].compression
    return found


def failures(run: Path) -> list[dict[str, Any]]:
    """Attempts that failed, with the end of their error."""
    events = read_run(run).events if (run / "config.json").is_file() else ()
    return [
        {"stage": event["stage"], "unit": event["unit"], "attempt": event["attempt"], "error": event["error"][-2000:]}
        for event in events
        if event["event"] == "unit_failed"
    ]


def _stage(records: Sequence[UnitRecord], bars: Sequence[Bar], timeline: Timeline) -> dict[str, Any]:
    stage = records[0].stage
    used = [bar.usage for bar in bars if bar.usage is not None]
    gpu = [usage for usage in used if usage.get("gpu_s") is not None]
    return {
        "units": len(records),
        "failed_attempts": sum(bar.outcome == "failed" for bar in bars),
        "wall_s": timeline.stage_s.get(stage, 0.0),
        "sum_s": sum(record.seconds for record in records),
        "unit_s": {record.unit: record.seconds for record in records},
        "load_s": max((usage["load_s"] for usage in used), default=0.0),
        "peak_bytes": max(record.peak_memory_bytes for record in records),
        "output_bytes": _output_bytes(records),
        "read_bytes": sum(usage["read_bytes"] for usage in used),
        "written_bytes": sum(usage["written_bytes"] for usage in used),
        "gpu_busy_frac": sum(usage["gpu_s"] for usage in gpu) / sum(usage["seconds"] for usage in gpu) if gpu else None,
    }


def _output_bytes(records: Iterable[UnitRecord]) -> int:
    return sum(output.num_bytes for record in records for output in record.outputs)


def step_seconds(run: Path) -> list[float]:
    """Median denoising step of every trajectory, with the salience hooks."""
    return [float(record.result["seconds_per_step"]) for record in read_run(run).stages["trajectories"].records]


def store_figures(run: Path) -> dict[str, Any]:
    """How long workers waited for the store: to take activations, which a thread writes, and to give them to the distillation,
    which a thread reads ahead. `wait_frac` is both over the seconds of all units up to the distillation."""
    data = read_run(run)
    records = data.stages["activations"].records
    found: dict[str, Any] = {
        "bytes": _output_bytes(records),
        "write_wait_s": sum(float(record.result["write_s"]) for record in records),
        "activations_s": sum(record.seconds for record in records),
    }
    distilled = [record for record in data.stages["distillation"].records if record.result["blocks"]]
    if distilled:
        calibration = [record for stage in STAGES[:-1] for record in data.stages[stage].records]
        found |= {
            "entry_bytes": _entry_bytes(data, distilled),
            "read_wait_s": sum(float(record.result["read_s"]) for record in distilled),
            "distillation_s": sum(record.seconds for record in distilled),
            "calibration_s": sum(record.seconds for record in calibration),
        }
        found["wait_frac"] = (found["write_wait_s"] + found["read_wait_s"]) / found["calibration_s"]
    return found


def _entry_bytes(data: RunData, distilled: Iterable[UnitRecord]) -> int:
    """Of the arrays in front of the segments, as they lie in the store."""
    first = {next(iter(record.result["blocks"])) for record in distilled}
    outputs = [output for record in data.stages["activations"].records for output in record.outputs]
    return sum(output.num_bytes for output in outputs if first & set(output.path.split("/")))


def fallen_back(run: Path) -> list[str]:
    """Blocks whose learning diverged and that were rounded without it."""
    records = read_run(run).stages["distillation"].records
    return [name for record in records for name, block in record.result["blocks"].items() if block.get("fell_back")]


def speed_up(run: Path, alone: Path) -> dict[str, Any] | None:
    """Distillation by one worker against that by all, of the same calibration data; None while one worker has done nothing.

    Where one worker's run was cut off, its whole time is projected: all units of the other run, by the ratio of those that both
    have done.
    """
    all_of, one_of = read_run(run), read_run(alone)
    many = {record.unit: record for record in all_of.stages["distillation"].records}
    one = {record.unit: record for record in one_of.stages["distillation"].records if record.unit in many}
    if not one:
        return None
    many_s, one_s = (sum(records[unit].seconds for unit in one) for records in (many, one))
    wall_s = read_timeline(all_of.events).stage_s["distillation"]
    workers = {bar.worker for bar in read_timeline(all_of.events).bars if bar.stage == "distillation"}
    complete = len(one) == len(many)
    if complete:
        alone_s = read_timeline(one_of.events).stage_s["distillation"]
    else:
        alone_s = sum(record.seconds for record in many.values()) * one_s / many_s
    return {
        "workers": len(workers),
        "wall_s": wall_s,
        "alone_wall_s": alone_s,
        "speed_up": alone_s / wall_s,
        "how": "measured" if complete else f"projected from {len(one)} of {len(many)} units",
        "slower_together": many_s / one_s,
        "same_bytes": all(one[unit].outputs == many[unit].outputs for unit in one),
    }

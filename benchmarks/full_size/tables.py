"""The record as Markdown: what was measured, and in what ratio to what the plan had said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def table(document: dict[str, Any]) -> str:
    """Of all runs of a record."""
    runs = document["runs"]
    parts = [_sizes(runs), _stages(runs), _store(runs), _speed_up(runs), _checkpoints(runs), _parts(runs)]
    return "\n\n".join("\n".join(lines) for part in parts if len(lines := list(part)) > 2)


def _sizes(runs: dict[str, Any]) -> Iterator[str]:
    yield "| run | video | blocks | model | workers | steps, samples, epochs | rounding | commit |"
    yield "|---|---|---|---|---|---|---|---|"
    for label, run in runs.items():
        setting = run["settings"]
        height, width, frames = setting["video"]
        model = _gib(run["parts"].get("model", {}).get("bytes"))
        blocks = f"{setting['model']}: {' + '.join(map(str, run['blocks']))}" if "blocks" in run else "-"
        work = f"{setting['steps']}, {setting['samples']}, {setting['epochs']}"
        yield (
            f"| {label} | {height} × {width} × {frames} | {blocks} | {model} GiB | "
            f"{setting['workers']} × {run['environment']['device']} | {work} | {setting['rounding']} | "
            f"{run['environment']['commit'][:7]} |"
        )


def _stages(runs: dict[str, Any]) -> Iterator[str]:
    yield "| run | stage | units | loaded, s | wall, s | sum, s | peak, GiB | to plan | written, GiB | to plan |"
    yield "|" + "---|" * 10
    for label, run in runs.items():
        for name, stage in run.get("stages", {}).items():
            if name == "selection":  # some numbers, on a CPU
                continue
            units = f"{stage['units']}" if stage["units"] == stage["planned_units"] else _part(stage)
            yield (
                f"| {label} | {name} | {units} | {stage['load_s']:.1f} | {stage['wall_s']:.1f} | {stage['sum_s']:.1f} | "
                f"{_gib(stage['peak_bytes'])} | "
                f"{_ratio(stage['peak_bytes'], stage['planned_peak_bytes'])} | {_gib(stage['output_bytes'])} | "
                f"{_ratio(stage['output_bytes'], stage['planned_bytes'], digits=4)} |"
            )


def _part(stage: dict[str, Any]) -> str:
    return f"{stage['units']} of {stage['planned_units']}"


def _store(runs: dict[str, Any]) -> Iterator[str]:
    yield "| run | step with salience, s | activations, GB | waited to write, s | waited to read, s | of calibration |"
    yield "|---|---|---|---|---|---|"
    for label, run in runs.items():
        if store := run.get("store"):
            wrote, read = (f"{store[name]:.2f}" if name in store else "-" for name in ("write_wait_s", "read_wait_s"))
            waited = f"{100 * store['wait_frac']:.1f} %" if "wait_frac" in store else "-"
            yield (f"| {label} | {max(run['step_s']):.2f} | {store['bytes'] / 1e9:.2f} | {wrote} | {read} | {waited} |")


def _speed_up(runs: dict[str, Any]) -> Iterator[str]:
    yield "| run | distillation by | wall, s | by one, s | how | speed-up | same bytes |"
    yield "|---|---|---|---|---|---|---|"
    for label, run in runs.items():
        if found := run.get("speed_up"):
            same = {True: "yes", False: "NO", None: "-"}[found["same_bytes"]]  # None: read from event logs alone
            yield (
                f"| {label} | {found['workers']} workers | {found['wall_s']:.1f} | {found['alone_wall_s']:.1f} | "
                f"{found['how']} | {found['speed_up']:.2f}× | {same} |"
            )


def _checkpoints(runs: dict[str, Any]) -> Iterator[str]:
    yield (
        "| run | transformer, GiB | to plan | smaller | folder, GiB | to plan | loaded, s | on device, GiB | "
        "first step, s | next step, s | peak, GiB |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for label, run in runs.items():
        if (assembly := run.get("stages", {}).get("assembly")) is None:
            continue
        load = run["parts"].get("load", {})
        loaded = load["from_pretrained_s"] + load["to_device_s"] if "steps_s" in load else None
        steps = [*load.get("steps_s", ()), None, None]
        yield (
            f"| {label} | {_gib(assembly['transformer_bytes'])} | "
            f"{_ratio(assembly['transformer_bytes'], assembly['planned_transformer_bytes'], digits=4)} | "
            f"{assembly['compression']:.2f}× | {_gib(assembly['output_bytes'])} | "
            f"{_ratio(assembly['output_bytes'], assembly['planned_bytes'], digits=4)} | {_seconds(loaded)} | "
            f"{_gib(load.get('held_bytes'))} | {_seconds(steps[0])} | {_seconds(steps[1])} | "
            f"{_gib(load.get('peak_bytes'))} |"
        )


def _parts(runs: dict[str, Any]) -> Iterator[str]:
    yield "| run | part | seconds | |"
    yield "|---|---|---|---|"
    for label, run in runs.items():
        for name, part in run["parts"].items():
            yield f"| {label} | {name} | {_seconds(part.get('seconds'))} | {_end(part)} |"


def _end(part: dict[str, Any]) -> str:
    """Why a part has no end, in one line of a table."""
    return " ".join(str(part.get("error") or part.get("stopped") or "").split()).replace("|", "/")


def _gib(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**30:.2f}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f}"


def _ratio(measured: float, planned: float | None, *, digits: int = 2) -> str:
    return f"{measured / planned:.{digits}f}" if planned else "-"

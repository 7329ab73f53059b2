"""`report.html` of a run: one file that needs neither network nor script, from what the run directory holds.

    run directory -> run_data -> calibration, measurements, timeline -> plots, frames -> report.html.j2 -> report.html

The same run gives the same bytes: nothing in it is of the time of writing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.event_log import OUT_OF_MEMORY
from pipeline.report import plots, run_plots
from pipeline.report.calibration import CalibratedBlock, Refined, Salience, read_blocks, read_refined, read_salience
from pipeline.report.figure import Picture
from pipeline.report.films import export_films
from pipeline.report.frames import compare_frames
from pipeline.report.grid import Cell, Grid, GridRow, Heading, cells, grid
from pipeline.report.measurements import (
    ModelMeasurements,
    Table,
    all_identical,
    measure,
    measure_noise_floor,
    relative_speed,
    table,
)
from pipeline.report.quantities import NOTHING, bytes_text, decibels_text, interval_text, seconds_text, value_text
from pipeline.report.run_data import RunData, read_run, reads_activations
from pipeline.report.timeline import Timeline, read_timeline
from pipeline.report.usage import usage_grid
from pipeline.run_units import STAGES, prompt_names
from pipeline.study.intervals import mean_interval
from pipeline.terminal import counted
from storage.location import Location
from storage.run_directory import REPORT, RunDirectory

NUM_WEAKEST_LAYERS = 8


@dataclass(frozen=True)
class Tile:
    """One figure of the summary."""

    label: str
    value: str
    note: str


def write_report_at(location: Location) -> Location:
    """Writes the report of the run at `location`, complete or not, into the run; returns where.

    Raises:
        ValueError: no run there, or one of a newer format.
        OSError: the report cannot be written.
    """
    data = read_run(location)
    directory = RunDirectory(data.location)
    export_films(data)
    directory.place.put(REPORT, render(data).encode())
    return directory.location / REPORT


def render(run: RunData) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(seconds=seconds_text, bytes=bytes_text)
    return environment.get_template("report.html.j2").render(_view(run))


def _view(run: RunData) -> dict[str, Any]:
    models, read = measure(run), read_timeline(run.events)
    metrics = table(models, measure_noise_floor(run), fork_db=run.config["evaluation"].get("fork_db"))
    blocks, salience, refined = read_blocks(run), read_salience(run), read_refined(run)
    assembled = run.record("assembly", run.method_names[0])
    return {
        "model": Path(run.config["model"]).name,
        "method": run.method_names[0],
        "bits": assembled.result["bits"] if assembled else "",
        "provenance": _provenance(run, read),
        "unfinished": _unfinished(run),
        "problems": run.problems,
        "fell_back": _fell_back(blocks),
        "identical": all_identical(models),
        "tiles": _tiles(run, models),
        "metrics": metrics,
        "metrics_grid": _metrics_grid(run, metrics),
        "method_names": run.method_names,
        "num_held_out": run.config["prompts"]["num_held_out"],
        "checkpoint": f"{run.location.name}/{assembled.result['checkpoint']}" if assembled else None,
        "relative_speed": {name: relative_speed(models, name) for name in run.method_names},
        "prompts": _prompt_grid(run, models),
        "fidelity": run_plots.fidelity(models),
        "comparisons": compare_frames(run, models),
        "salience": salience,
        "calibration_prompts": _calibration_prompts(run, salience),
        "salience_map": plots.salience_map(salience) if salience else None,
        "salience_parts": plots.salience_parts(salience) if salience else None,
        "losses": _drawn({name: plots.losses(found, name) for name, found in blocks.items()}),
        "learning": [name for name, found in blocks.items() if any(block.losses for block in found)],
        "estimated": {m["name"]: m["tokens_per_step"] for m in run.methods if m.get("tokens_per_step", 1.0) < 1},
        "sqnr": _drawn({name: plots.sqnr(found, name, plots.sqnr_limits(blocks)) for name, found in blocks.items()}),
        "sqnr_by_block": plots.sqnr_by_block(blocks),
        "drift": {name: plots.drift(found.blocks, name) for name, found in refined.items()},
        "refined": {name: _refined_text(found) for name, found in refined.items()},
        "weakest": {name: _weakest_layers(found) for name, found in blocks.items()},
        "without_data": [method["name"] for method in run.methods if not reads_activations(method)],
        "stages": _stage_grid(run, read),
        "memory": _memory_sentences(run),
        "usage": usage_grid(read, STAGES, threads=run.config["numerics"]["threads"]),
        "timeline": run_plots.timeline(read, STAGES),
        "gantt": run_plots.gantt(read, STAGES),
        "num_drivers": len(read.resumed_s) + 1,
        "machines": _machines(run),
        "configuration": _configuration(run.config),
        "method_fields": _method_fields(run),
    }


def _provenance(run: RunData, read: Timeline) -> dict[str, str]:
    commit = run.provenance.get("commit")
    found = {"run": run.location.name, "commit": commit[:12] if commit else "not in a git checkout"}
    if read.began is not None and read.ended is not None:
        found["began"] = f"{read.began:%Y-%m-%d %H:%M} UTC"
        found["last event"] = f"{read.ended:%Y-%m-%d %H:%M} UTC"
    found["python"] = str(run.provenance.get("python", "unknown"))
    if (commit := run.config.get("model_commit")) is not None:
        found["model"] = f"{run.config['model']} at commit {commit}"
    return {**found, **run.provenance.get("packages", {})}


def _unfinished(run: RunData) -> list[str]:
    """Stages that are not done, each with how far it is."""
    return [f"{name} {_units_text(run, name)}" for name, stage in run.stages.items() if not stage.complete]


def _units_text(run: RunData, stage: str) -> str:
    units = run.stages[stage]
    return f"{len(units.records)} of {'?' if units.num_expected is None else units.num_expected}"


def _fell_back(blocks: Mapping[str, Sequence[CalibratedBlock]]) -> list[tuple[str, str, str]]:
    return [(method, b.name, b.fell_back) for method, found in blocks.items() for b in found if b.fell_back is not None]


def _refined_text(found: Refined) -> list[str]:
    """Sentences about one method's refinement."""
    said = []
    if found.blocks:
        last, num = found.blocks[-1], sum(block.accepted for block in found.blocks)
        said.append(
            f"Drift repair: {num} of {len(found.blocks)} blocks changed; error after the last block "
            f"{last.without:.3g} without repair, {last.after:.3g} with it."
        )
    residual = found.residual
    if residual is not None:
        found_steps = residual["refresh_steps"] or []
        gain = f"gain {', '.join(f'{g:.2f}' for g in residual['gain'][:4])} ... by lag; " if residual["gain"] else ""
        where = f"step{'s' * (len(found_steps) > 1)} {', '.join(map(str, found_steps))}"
        steps = f"refreshes at {where}; " if found_steps else ""
        said.append(
            f"Residual: {gain}{steps}relative squared error of the sparse steps' attention {residual['error_after']:.3g}; "
            f"{residual['error_before']:.3g} with refreshes by the interval and no gain."
        )
    velocity = found.velocity
    if velocity is not None and "note" in velocity:
        said.append(f"Velocity correction: {velocity['note']}.")
    elif velocity is not None:
        chosen = "no correction is best" if velocity["ridge"] is None else f"ridge {velocity['ridge']:g}"
        said.append(
            f"Velocity correction: {chosen}; error of the velocity on prompts left out {velocity['error_before']:.3g} "
            f"without it, {velocity['error_after']:.3g} with it."
        )
    return said


def _tiles(run: RunData, models: Sequence[ModelMeasurements]) -> list[Tile]:
    """Those that have a value."""
    reference, main = models[0], models[1]
    assembled, psnr = run.record("assembly", main.name), main.spread("psnr_db")
    velocity = mean_interval(list(main.values("velocity_sqnr_db").values()))
    tiles = [Tile("Method", main.name, assembled.result["bits"] if assembled else "")]
    if main.transformer_bytes is not None:
        source = f"from {bytes_text(reference.transformer_bytes)} in 16 bits"
        tiles.append(Tile("Transformer", bytes_text(main.transformer_bytes), source))
    if main.compression is not None:
        tiles.append(Tile("Compression", f"{main.compression:.2f} ×", "of the transformer, scales included"))
    if velocity is not None:
        note = f"teacher-forced, {counted(velocity.num, 'prompt')}"
        tiles.append(Tile("Velocity SQNR", f"{interval_text(velocity)} dB", note))
    if psnr is not None:
        tiles.append(Tile("PSNR", f"{decibels_text(psnr)} dB", f"mean ± sd, {counted(psnr.num, 'held-out prompt')}"))
    if main.recognized is not None:
        full = reference.recognized
        note = "prompts" if full is None else f"prompts; full precision: {full[0]} of {full[1]}"
        tiles.append(Tile("Recognized", f"{main.recognized[0]} of {main.recognized[1]}", note))
    return tiles


def _drawn(pictures: Mapping[str, Picture | None]) -> dict[str, Picture]:
    return {name: picture for name, picture in pictures.items() if picture is not None}


def _metrics_grid(run: RunData, metrics: Table) -> Grid | None:
    presets = {method["name"]: method["preset"] for method in run.methods if method["preset"] != method["name"]}
    notes = {name: f"preset {preset}" for name, preset in presets.items()}
    notes |= dict.fromkeys(run.setting_names, f"{run.method_names[0]}, other settings")
    named = {*run.method_names, *run.setting_names}
    rows = [
        GridRow(
            (Cell(name if name in named else name.replace("_", " ")), *found),
            main=name == run.method_names[0],
            note=notes.get(name, ""),
        )
        for name, found in metrics.rows
    ]
    headings = [Heading("Model", text=True), *(Heading(column.name, column.unit) for column in metrics.columns)]
    return grid(headings, [row for row in rows if not all(cell.empty for cell in row.cells[1:])])


def _prompt_grid(run: RunData, models: Sequence[ModelMeasurements]) -> Grid | None:
    """Prompt name, text, what stands beside it, and PSNR by method, the worst prompt of the first method on top."""
    texts = {prompt: str(r["prompt"]) for model in models for prompt, r in model.results.items()}
    columns = [model.values("psnr_db") for model in models[1:]]
    if not any(columns):
        return None
    order = sorted(texts, key=lambda prompt: (columns[0].get(prompt, float("inf")), prompt))
    headings = [Heading(name, text=True) for name in ("Unit", "Prompt", "Image", "Negative prompt")]
    headings += [Heading(model.name, "PSNR, dB") for model in models[1:]]
    values = {
        prompt: [f"{column[prompt]:.2f}" if prompt in column else NOTHING for column in columns] for prompt in order
    }
    beside = {prompt: run.beside("held_out", prompt) for prompt in order}
    rows = [
        GridRow(cells(prompt, texts[prompt], beside[prompt].image, beside[prompt].negative_prompt, *values[prompt]))
        for prompt in order
    ]
    return grid(headings, rows)


def _calibration_prompts(run: RunData, salience: Salience | None) -> list[tuple[str, str]]:
    """Texts in order, and what stands beside each."""
    texts = () if salience is None else salience.prompts
    named = zip(prompt_names(len(texts)), texts, strict=True)
    return [(text, str(run.beside("calibration", name))) for name, text in named]


def _weakest_layers(blocks: Sequence[CalibratedBlock]) -> list[tuple[str, float]]:
    found = [(f"{block.name}.{layer}", value) for block in blocks for layer, value in block.layer_sqnr_db.items()]
    return sorted(found, key=lambda item: item[1])[:NUM_WEAKEST_LAYERS]


def _stage_grid(run: RunData, read: Timeline) -> Grid | None:
    """Stages that have done, or will have to do, any unit."""
    headings = [
        Heading("Stage", text=True),
        Heading("Units done"),
        Heading("Elapsed", "with a unit under way"),
        Heading("Work", "sum over units"),
        Heading("Longest unit"),
        Heading("Peak memory", "of one worker"),
        Heading("Retried units"),
    ]
    rows = []
    for stage in STAGES:
        records = run.stages[stage].records
        if not records and run.stages[stage].num_expected == 0:
            continue
        seconds = [record.seconds for record in records]
        retried = sum(record.tries > 1 for record in records)
        texts = (
            _units_text(run, stage),
            seconds_text(read.stage_s.get(stage)),
            seconds_text(sum(seconds) if seconds else None),
            seconds_text(max(seconds, default=None)),
            bytes_text(max((record.peak_memory_bytes for record in records), default=None)),
            str(retried) if retried else NOTHING,
        )
        rows.append(GridRow(cells(stage, *texts)))
    return grid(headings, rows)


def _memory_sentences(run: RunData) -> list[str]:
    """About every stage in which memory was short, all drivers taken together."""
    said = []
    for stage in STAGES:
        events = [event for event in run.events if event.get("stage") == stage]
        num = sum(event.get("reason") == OUT_OF_MEMORY for event in events)
        lean = list(dict.fromkeys(str(event["unit"]) for event in events if event.get("lean")))
        if num or lean:
            how = f" Done with less memory and more time, with the same result: {', '.join(lean)}." if lean else ""
            said.append(f"In the stage {stage} {num} attempt{'s' * (num != 1)} ran out of memory.{how}")
    return said


def _machines(run: RunData) -> list[tuple[str, str, int]]:
    """Host, device, and units done there."""
    counts: dict[tuple[str, str], int] = {}
    for stage in run.stages.values():
        for record in stage.records:
            key = (record.host, record.device)
            counts[key] = counts.get(key, 0) + 1
    return [(host, device, num) for (host, device), num in sorted(counts.items())]


def _configuration(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections with their fields; methods have a table of their own."""
    plain = {key: value for key, value in config.items() if key not in ("method", "compare")}
    single = [(key, value_text(value)) for key, value in plain.items() if not isinstance(value, dict)]
    sections = [("run", single)]
    for key, value in plain.items():
        if isinstance(value, dict):
            sections.append((key, [(name, value_text(inner)) for name, inner in _flat(value)]))
    return sections


def _flat(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    fields: list[tuple[str, Any]] = []
    for key, value in section.items():
        if key.endswith("_bytes"):
            fields.append((f"{prefix}{key}", f"{value} ({bytes_text(value)})"))
            continue
        fields += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(f"{prefix}{key}", value)]
    return fields


def _method_fields(run: RunData) -> list[tuple[str, list[str]]]:
    """Fields of all methods side by side."""
    fields = sorted(key for key in run.methods[0] if key not in ("name", "preset"))
    return [(key, [value_text(method.get(key)) for method in run.methods]) for key in ["preset", *fields]]

"""`verify`: whether a checkpoint is sound, and what its layers take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pipeline.terminal import PlainTable, human_bytes, new_table, say, say_sentence, say_table
from reelquant.checkpoint.file_digests import DIGESTS_NAME
from reelquant.checkpoint.reader import SECOND_TRANSFORMER, TRANSFORMER, is_checkpoint
from reelquant.checkpoint.verify import LayerReport, VerificationReport, verify_checkpoint
from storage.location import Location, StoreUrl
from storage.open_place import open_place
from storage.scratch import scratch_folder
from workers.assembly_worker import INDEX

_SHOWN_PROBLEMS = 30
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass
class _Row:
    layers: int = 0
    weights: int = 0
    stored_bytes: int = 0


def show_verification(checkpoint: Location, console: Console) -> bool:
    """Checks the pipeline folder `checkpoint` (a copy of it, where it is in a bucket) and prints what was found; whether it is
    sound.

    Raises:
        ValueError: no checkpoint there in a bucket.
    """
    if isinstance(checkpoint, StoreUrl):
        with scratch_folder() as scratch:
            return _show(checkpoint, _fetched(checkpoint, scratch), console)
    return _show(checkpoint, checkpoint, console)


def _show(checkpoint: Location, folder: Path, console: Console) -> bool:
    report = verify_checkpoint(folder)
    say(console, ("checkpoint", "bold"), f"  {checkpoint}")
    if report.layers:
        say(console, ("bits", "bold"), f"        {report.bits}")
        console.line()
        say_table(console, _layer_table(report))
        console.line()
        say(
            console,
            f"{human_bytes(report.total_bytes)} in {_folders(report)}, {report.compression:.2f} times smaller than the "
            f"{human_bytes(report.source_bytes)} of 16 bits",
        )
    for problem in report.problems[:_SHOWN_PROBLEMS]:
        say_sentence(console, ("problem:", "bold red"), " ", (problem, "red"))
    if (more := len(report.problems) - _SHOWN_PROBLEMS) > 0:
        say(console, ("problem:", "bold red"), (f" and {more} more", "red"))
    if report.problems and (inside := _checkpoints_inside(folder)):
        say(console, f"{checkpoint} is a run directory; its checkpoints: {', '.join(map(str, inside))}")
    if report.layers and report.not_covered:
        say_sentence(
            console,
            ("not covered:", "bold yellow"),
            f" {', '.join(report.not_covered)}: there and readable, but {DIGESTS_NAME}, which has the digests of all files, is "
            "not there (save_pretrained and older versions do not write it)",
        )
    if report.ok:
        files = f", and all {report.num_files} files have their digests" if report.num_files else ""
        num = len(report.layers)
        say_sentence(
            console, ("sound", "green"), f": all tensors and digests of {num} quantized layers are right{files}"
        )
    return report.ok


def _layer_table(report: VerificationReport) -> PlainTable:
    """Layers that differ in their block's number only share a row; rows of one part of the model stand together."""
    table = new_table("Layers", "Bits", "Number", "b/weight", "Stored", left=2)
    rows = _rows(report.layers)
    above = None
    for (part, layer, bits), row in rows.items():
        if part != above:
            table.add_row(part, style="bold")
            above = part
        table.add_row(
            f"  {layer}",
            bits,
            f"{row.layers:,}",
            f"{8 * row.stored_bytes / row.weights:.2f}",
            human_bytes(row.stored_bytes),
        )
    quantized = sum(row.stored_bytes for row in rows.values())
    weights = sum(row.weights for row in rows.values())
    table.add_section()
    table.add_row(
        "all quantized",
        "",
        f"{len(report.layers):,}",
        f"{8 * quantized / weights:.2f}",
        human_bytes(quantized),
        style="bold",
    )
    table.add_row("everything else", "", "", "", human_bytes(report.total_bytes - quantized), style="dim")
    return table


def _rows(layers: Mapping[str, LayerReport]) -> dict[tuple[str, str, str], _Row]:
    """By part of the model, layer inside it, and bits; parts in the order in which they first appear."""
    parts: dict[str, dict[tuple[str, str], _Row]] = {}
    for name, layer in layers.items():
        # The first number is the block's; later ones belong to the layer (attn.to_out.0).
        pattern = _NUMBER.sub("*", name, count=1)
        part, inside = pattern.split(".*.") if ".*." in pattern else pattern.split(".", 1)
        key = (inside, f"W{layer.weight_bits}A{layer.activation_bits}")
        row = parts.setdefault(part, {}).setdefault(key, _Row())
        row.layers += 1
        row.weights += layer.num_weights
        row.stored_bytes += layer.stored_bytes
    return {(part, *key): row for part, inner in parts.items() for key, row in inner.items()}


def _checkpoints_inside(path: Path) -> list[Path]:
    candidates = [path / "checkpoint", *sorted((path / "checkpoints").glob("*"))]
    return [candidate for candidate in candidates if is_checkpoint(candidate)]


def _fetched(url: StoreUrl, scratch: Path) -> Path:
    place = open_place(url)
    if INDEX not in place.names():
        raise ValueError(
            f"{url} has no {INDEX}: not a checkpoint, or one that is not there in full yet; a run's is RUN/checkpoint or "
            "RUN/checkpoints/METHOD"
        )
    return place.copied(scratch)


def _folders(report: VerificationReport) -> str:
    """Folders of the quantized transformers."""
    second = any(name.startswith(f"{SECOND_TRANSFORMER}.") for name in report.layers)
    return f"{TRANSFORMER}/ and {SECOND_TRANSFORMER}/" if second else f"{TRANSFORMER}/"

"""The recorded result: which rows are still true, and the table made of them."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.harness import markdown
from benchmarks.peers.adapters import Peer

HEAD = (
    *("model", "weights", "activations", "PSNR, dB", "worst video, dB", "SSIM", "recognized", "bits per weight"),
    *("`transformer/`", "linears", "videos"),
)


def is_done(entry: dict[str, Any] | None, fingerprint: dict[str, Any]) -> bool:
    """Whether a recorded seed of a peer was measured, and would be the same again; errors are tried anew."""
    return entry is not None and "error" not in entry and entry.get("fingerprint") == fingerprint


def row(peer: Peer, seeds: dict[str, dict[str, Any]], source_bytes: int | None) -> dict[str, Any]:
    """Means over the seeds' means, the deviation between them, and the worst video; or the error."""
    measured = [entry for entry in seeds.values() if "error" not in entry]
    errors = [entry["error"] for entry in seeds.values() if "error" in entry]
    summary: dict[str, Any] = {"weights": peer.weights, "activations": peer.activations, "setting": peer.setting}
    if errors:
        summary["error"] = errors[0]
    if not measured:
        return summary
    for metric in ("psnr_db", "ssim", "recognized", "lpips"):
        means = [statistics.fmean(entry[metric]) for entry in measured if metric in entry]
        if means:
            summary[f"{metric}_mean"] = statistics.fmean(means)
            summary[f"{metric}_sd"] = statistics.stdev(means) if len(means) > 1 else None
    if "psnr_db" in measured[0]:
        summary["psnr_db_worst"] = min(min(entry["psnr_db"]) for entry in measured)
    summary["num_videos"] = sum(len(entry.get("psnr_db", entry.get("recognized", ()))) for entry in measured)
    summary |= measured[0]["sizes"]
    if source_bytes is not None:
        summary["compression"] = source_bytes / summary["transformer_bytes"]
        if "packed_transformer_bytes" in summary:
            summary["packed_compression"] = source_bytes / summary["packed_transformer_bytes"]
    return summary


def our_rows(presets: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Our own presets as rows, from what benchmarks/presets.py recorded."""
    rows = {}
    bits = presets["config"]["bits"]
    num_videos = sum(len(models["full_precision"]["recognized"]) for models in presets["seeds"].values())
    for model, summary in presets["summary"].items():
        if model != "full_precision":
            sizes = next(iter(presets["seeds"].values()))[model]
            rows[f"**reelquant** `{model}`"] = {
                "weights": f"int{bits['weight']}, per row",
                "activations": f"int{bits['activation']}, per token",
                "num_videos": num_videos,
                "compression": sizes["compression"],
                **summary,
            }
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: what was measured, best first, then what could not be run and why."""
    measured = {name: values for name, values in rows.items() if "num_videos" in values}
    ranked = sorted(measured.items(), key=lambda item: -item[1].get("psnr_db_mean", 1e9))
    found = markdown(HEAD, [[name, *_cells(values)] for name, values in ranked])
    failed = [[name, f"`{v['setting']}`", _escaped(v["error"])] for name, v in rows.items() if "error" in v]
    if not failed:
        return found
    return f"{found}\n\n{markdown(('not run, or not with every seed', 'setting', 'what it said'), failed)}"


def _cells(values: dict[str, Any]) -> list[str]:
    def number(key: str, form: str, scale: float = 1.0) -> str:
        return form.format(scale * values[key]) if values.get(key) is not None else "-"

    spread = f" ± {values['psnr_db_sd']:.2f}" if values.get("psnr_db_sd") is not None else ""
    bits = number("packed_bits_per_weight", "{:.2f}")
    size = number("packed_compression", "{:.2f}× smaller") if "packed_compression" in values else "16 bits"
    if "packed_compression" not in values and values.get("compression", 1.0) != 1.0:
        size = number("compression", "{:.2f}× smaller")
    if values.get("packed_bits_per_weight") != values.get("bits_per_weight"):
        bits += number("bits_per_weight", " (kept in {:.2f})")
        size += number("compression", " (as kept: {:.2f}×)")
    linears = f"{values['num_quantized']} of {values['num_linears']}" if "num_quantized" in values else "-"
    return [
        values["weights"],
        values["activations"],
        number("psnr_db_mean", "{:.2f}") + spread,
        number("psnr_db_worst", "{:.2f}"),
        number("ssim_mean", "{:.4f}"),
        number("recognized_mean", "{:.1f} %", 100),
        bits,
        size,
        linears,
        str(values["num_videos"]),
    ]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")

"""What other tools lose on the same model, prompts, seeds and noise as benchmarks/presets.py.

    pip install -e '.[application,peers]'
    python -m benchmarks.peers --seeds 0 1 2 --output benchmarks/results/peers.json
    python -m benchmarks.peers --page docs/results_appendix.md --output benchmarks/results/peers.json  # from the JSON

Every row with every seed is a process of its own. The output is written after each: the same command goes on where it was
stopped, keeps what was measured with the same configuration, versions and device, and tries again what failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import parser, read_record, write_json, write_table
from benchmarks.peers.adapters import Peer
from benchmarks.peers.measurement import Task, package_version, run_task
from benchmarks.peers.results import is_done, our_rows, row, table
from benchmarks.peers.roster import PEERS, REFERENCE
from pipeline.config.loading import load_config
from pipeline.context import RunContext, build_context
from pipeline.provenance import provenance
from workers.process import device_name, prepare_process

PROGRAMS = ("torch", "diffusers", "transformers")
"""Whose versions decide a row besides the tool's own."""


class Benchmark:
    """The recorded document and what is needed to go on with it."""

    def __init__(self, context: RunContext, output: Path, *, work: Path, timeout_s: float) -> None:
        self._context, self._output, self._work, self._timeout_s = context, output, work, timeout_s
        device, _ = prepare_process(context.source.numerics)
        self._device = device_name(device)
        recognizer = context.config.evaluation.recognizer
        self._config: dict[str, Any] = {
            "model": context.model_fingerprint,
            "generation": context.config.generation.to_dict(),
            "numerics": context.source.numerics.to_dict(),
            "recognizer": None if recognizer is None else str(recognizer),
            "held_out": [unit.prompt for unit in context.held_out_prompts],
            "calibration": [unit.prompt for unit in context.calibration_prompts],
        }
        recorded = read_record(output) if output.is_file() else {}
        self.document: dict[str, Any] = {
            "config": self._config,
            "provenance": provenance(),
            "hardware": {"machine": platform.machine(), "device": self._device},
            "peers": recorded.get("peers", {}),
        }

    def measure(self, peer: Peer, seed: int) -> str:
        """One row with one seed, unless it is recorded; returns what to say about it."""
        seeds = self.document["peers"].setdefault(peer.name, {"seeds": {}})["seeds"]
        fingerprint = self._fingerprint(peer)
        needed = peer is REFERENCE and not self._reference(seed).is_file()
        if is_done(seeds.get(str(seed)), fingerprint) and not needed:
            return "recorded"
        found = run_task(self._task(peer, seed), timeout_s=self._timeout_s)
        seeds[str(seed)] = {**found, "fingerprint": fingerprint}
        self._write()
        if "error" in found:
            return str(found["error"])
        means = {key: sum(found[key]) / len(found[key]) for key in ("psnr_db", "ssim", "recognized") if key in found}
        return ", ".join(f"{key} {mean:.4g}" for key, mean in means.items())

    def is_done(self, peer: Peer, seed: int) -> bool:
        """Whether the row needs no run."""
        recorded = self.document["peers"].get(peer.name, {"seeds": {}})["seeds"]
        return is_done(recorded.get(str(seed)), self._fingerprint(peer))

    def _fingerprint(self, peer: Peer) -> dict[str, Any]:
        return {
            "config": _digest(self._config),
            "setting": [peer.weights, peer.activations, peer.setting],
            "versions": {name: package_version(name) for name in (*PROGRAMS, peer.package) if name is not None},
            "device": self._device,
        }

    def _reference(self, seed: int) -> Path:
        """Videos of the reference; the name says all that decides them."""
        return self._work / f"reference-{_digest(self._fingerprint(REFERENCE))[:16]}-seed-{seed}.safetensors"

    def _task(self, peer: Peer, seed: int) -> Task:
        context = self._context
        recognizer = context.config.evaluation.recognizer
        return Task(
            peer=peer.name,
            seed=seed,
            model=str(context.source.model),
            generation=context.config.generation.to_dict(),
            held_out=self._config["held_out"],
            calibration=self._config["calibration"],
            recognizer=None if recognizer is None else str(recognizer.resolve()),
            dtype=context.source.numerics.dtype,
            threads=context.source.numerics.threads,
            reference=str(self._reference(seed)),
            result=str(self._work / f"{peer.name}-seed-{seed}.json"),
        )

    def _write(self) -> None:
        self.document["summary"] = summary(self.document)
        write_json(self._output, self.document)


def summary(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a document, reference first."""
    recorded = document["peers"]
    reference = [entry for entry in recorded.get(REFERENCE.name, {"seeds": {}})["seeds"].values() if "sizes" in entry]
    source_bytes = reference[0]["sizes"]["transformer_bytes"] if reference else None
    known = {REFERENCE.name: REFERENCE, **PEERS}
    return {name: row(peer, recorded[name]["seeds"], source_bytes) for name, peer in known.items() if name in recorded}


def rows_of(document: dict[str, Any], presets: Path) -> dict[str, dict[str, Any]]:
    """The table's rows: the peers', and ours where they are recorded."""
    ours = our_rows(read_record(presets)) if presets.is_file() else {}
    return {**summary(document), **ours}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def arguments_of() -> argparse.Namespace:
    """The command line, checked."""
    given = parser(__doc__)
    given.add_argument("config", type=Path, nargs="?", default=Path("configs/presets.yaml"))
    given.add_argument("--page", type=Path, help="run nothing: write the recorded table into this page")
    given.add_argument("--presets", type=Path, default=Path("benchmarks/results/presets.json"), help="our own rows")
    given.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given.add_argument("--peers", nargs="+", default=list(PEERS), metavar="NAME", choices=list(PEERS))
    given.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY.PATH=VALUE")
    given.add_argument("--work", type=Path, default=Path("runs/peers"), help="for the reference's videos")
    given.add_argument("--timeout", type=float, default=7200, help="seconds for one row with one seed")
    return given.parse_args()


def main() -> None:
    """Command line."""
    arguments = arguments_of()
    if arguments.page is not None:
        rows = rows_of(read_record(arguments.output), arguments.presets)
        write_table(arguments.page, "peers", table(rows))
        return
    console = Console()
    context = build_context(load_config(arguments.config, arguments.overrides))
    benchmark = Benchmark(context, arguments.output, work=arguments.work.resolve(), timeout_s=arguments.timeout)
    for seed in arguments.seeds:
        waiting = [PEERS[name] for name in arguments.peers if not benchmark.is_done(PEERS[name], seed)]
        for peer in (REFERENCE, *waiting) if waiting else ():
            console.print(f"seed {seed}, {peer.name}: {benchmark.measure(peer, seed)}", highlight=False, markup=False)
    console.print(table(rows_of(benchmark.document, arguments.presets)), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()

"""The parts of one run of the benchmark, in order, and what is recorded of each; `benchmarks.full_size.__main__` lists them."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from benchmarks.full_size import figures
from benchmarks.full_size.commands import OutOfTime, branch_run, call
from benchmarks.full_size.setting import Setting
from benchmarks.harness import environment, free_memory, read_record, visible_gpus, write_json
from benchmarks.random_checkpoint import write_pipeline
from pipeline.config.loading import load_config
from pipeline.plan import plan_config
from pipeline.planning.plan_result import Plan
from pipeline.planning.plan_tables import show_plan
from storage.atomic_files import sync_file

PARTS = ("model", "plan", "activations", "warm", "distillation", "load", "alone")
LAST = ("load", "alone")
"""No other part needs them."""


class FullSize:
    """One run of the benchmark, in a folder.

    Args:
        folder: for the runs.
        model: for the model.
        deadline: on `time.monotonic`, when the part at work is stopped.
        save: called with the record after every part.
    """

    def __init__(
        self,
        setting: Setting,
        folder: Path,
        *,
        model: Path,
        deadline: float | None,
        save: Callable[[dict[str, Any]], None],
    ) -> None:
        self._setting, self._deadline, self._save = setting, deadline, save
        self._model, self._run, self._alone, self._warm = model, folder / "run", folder / "alone", folder / "warm"
        self._config, self._loaded = folder / "run.yaml", folder / "load.json"
        self._device = torch.device("cuda" if setting.on_gpu else "cpu")
        self._parts: tuple[str, ...] = ()
        self._sync, self._sync_s = threading.Thread(target=self._sync_model), 0.0
        self._plan: Plan | None = None
        self._record: dict[str, Any] = {
            "environment": machine(self._device),
            "settings": setting.as_json(),
            "parts": {},
        }

    def do(self, parts: Sequence[str]) -> bool:
        """The parts, in order, until one fails that others need; returns whether all went well."""
        does = {
            "model": self._write_model,
            "plan": self._make_plan,
            "activations": self._fill_store,
            "warm": self._warm_up,
            "distillation": self._distill,
            "load": self._load,
            "alone": self._distill_alone,
        }
        self._parts, well = tuple(parts), True
        for name in parts:
            print(f"== {name}", flush=True)
            began, found = time.monotonic(), self._record["parts"].setdefault(name, {})
            try:
                found |= does[name]()
            except OutOfTime as error:  # for the last part a budget may be too small
                found["stopped"], well = str(error), well and name == "alone"
            except Exception as error:  # noqa: BLE001  what was measured before must not be lost
                found["error"], well = f"{type(error).__name__}: {error}", False
            found["seconds"] = time.monotonic() - began
            self._save(self._record)
            well = self._read_runs() and well
            self._save(self._record)
            print(f"== {name}: {found['seconds']:.1f} s {found.get('error') or found.get('stopped', '')}", flush=True)
            if ("error" in found or "stopped" in found) and name not in LAST:
                break
        self._wait_for_disk()
        return well

    def _write_model(self) -> dict[str, Any]:
        setting, marker = self._setting, self._model / "random_model.json"
        wanted = {"model": setting.model, "transformer": setting.transformer, "vae": setting.vae}
        written = not (self._model / "model_index.json").is_file()
        if written:
            blocks = write_pipeline(self._model, setting.model, self._device, setting.transformer, setting.vae)
            write_json(marker, {**wanted, "blocks": blocks})
            free_memory(self._device)
        found = read_record(marker)
        if {name: found[name] for name in wanted} != wanted:
            raise ValueError(f"{self._model} holds another model: give another folder, or none")
        self._record["blocks"] = found["blocks"]
        self._sync.start()
        return {"bytes": sum(path.stat().st_size for path in self._model_files()), "written": written}

    def _model_files(self) -> list[Path]:
        return [path for path in self._model.rglob("*") if path.is_file()]

    def _sync_model(self) -> None:
        """Has the model reach the disk beside the plan, so that the store need not share the disk with it."""
        began = time.monotonic()
        for path in self._model_files():
            sync_file(path)
        self._sync_s = time.monotonic() - began

    def _wait_for_disk(self) -> None:
        if self._sync.is_alive():
            self._sync.join()

    def _make_plan(self) -> dict[str, Any]:
        return {"command_s": call("pipeline", "plan", self._configured(), deadline=self._deadline)}

    def _fill_store(self) -> dict[str, Any]:
        self._wait_for_disk()
        seconds = self._pipeline("--until", "activations")
        if not self._alone.is_dir():
            branch_run(self._run, self._alone)
        return {"command_s": seconds, "model_sync_s": self._sync_s}

    def _warm_up(self) -> dict[str, Any]:
        if not self._warm.is_dir():
            branch_run(self._run, self._warm)
        config = self._setting.write_config(
            self._config.with_name("warm.yaml"),
            run=self._warm,
            model=self._model,
            workers=self._setting.workers + self._setting.beside,
            epochs=1,
        )
        given = ("pipeline", "run", config, "--until", "distillation", "--update")  # of epochs
        return {"command_s": call(*given, deadline=self._deadline)}

    def _distill(self) -> dict[str, Any]:
        last = "assembly" if "load" in self._parts else "distillation"
        if not self._setting.beside:
            return {"command_s": self._pipeline("--until", last)}
        of_all, of_one = self._gpus_beside() if self._setting.on_gpu else (None, None)
        with ThreadPoolExecutor(1) as pool:
            alone = pool.submit(self._distill_alone, of_one)
            found = {"command_s": self._pipeline("--until", last, gpus=of_all)}
            try:
                found_alone = alone.result()
                self._record["parts"]["alone"] = found_alone | {"seconds": found_alone["command_s"]}
            except OutOfTime as error:
                self._record["parts"]["alone"] = {"stopped": str(error)}
        return found

    def _gpus_beside(self) -> tuple[str, str]:
        """For all workers, and for the one at the same time."""
        *of_all, of_one = visible_gpus(self._setting.workers + 1)
        return ",".join(of_all), of_one

    def _load(self) -> dict[str, Any]:
        video = "x".join(map(str, self._setting.video))
        checkpoint = self._run / "checkpoint"
        given = ("--checkpoint", checkpoint, "--video", video, "--output", self._loaded)
        seconds = call("benchmarks.full_size.loading", *given, deadline=self._deadline)
        found = read_record(self._loaded)
        self._record["parts"]["load"] |= found
        if not found["latents_finite"]:
            raise ValueError(f"the latents that {checkpoint} makes are not finite")
        return {"command_s": seconds}

    def _distill_alone(self, gpu: str | None = None) -> dict[str, Any]:
        config = self._setting.write_config(
            self._config.with_name("alone.yaml"), run=self._alone, model=self._model, workers=1
        )
        given = ("pipeline", "run", config, "--until", "distillation")
        return {"command_s": call(*given, deadline=self._deadline, gpus=gpu)}

    def _pipeline(self, *arguments: str, gpus: str | None = None) -> float:
        return call("pipeline", "run", self._configured(), *arguments, deadline=self._deadline, gpus=gpus)

    def _configured(self) -> Path:
        return self._setting.write_config(self._config, run=self._run, model=self._model)

    def _read_runs(self) -> bool:
        """Reads what there is to say of the runs as they are now; False if that fails, which is recorded."""
        try:
            self._read_figures()
        except Exception:  # noqa: BLE001  as above
            self._record["unread"] = traceback.format_exc()
            print(self._record["unread"], flush=True)
            return False
        return True

    def _read_figures(self) -> None:
        if not (self._model / "model_index.json").is_file():
            return
        if self._plan is None:
            # The command reads all weights; what it says of bytes, memory and time comes from their shapes.
            self._plan = plan_config(load_config(self._configured()), shapes_only=True)
            show_plan(self._plan, Console(width=100))
        if not (self._run / "config.json").is_file():
            return
        found = figures.run_figures(self._run, self._plan)
        self._record["stages"] = found
        self._record["failures"] = figures.failures(self._run) + figures.failures(self._alone)
        if "trajectories" in found:
            self._record["step_s"] = figures.step_seconds(self._run)
        if "activations" in found:
            self._record["store"] = figures.store_figures(self._run)
        if "distillation" in found:
            self._record["fallen_back"] = figures.fallen_back(self._run)
            if (self._alone / "config.json").is_file():
                self._record["speed_up"] = figures.speed_up(self._run, self._alone)


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit."""
    import diffusers
    import ray

    return environment(device) | {
        "gpus": torch.cuda.device_count(),
        "cpus": os.cpu_count(),
        "host_memory_bytes": psutil.virtual_memory().total,
        "ray": ray.__version__,
        "diffusers": diffusers.__version__,
    }

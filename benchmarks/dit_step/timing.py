"""Steps of one generation, timed or profiled one by one."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.dit_step.schedule import level_of_step
from benchmarks.harness import synchronize

LONGEST_NAME = 240
"""Characters of a kernel's name that are kept: the type of a template's last argument lies far behind."""


class Generation:
    """Consecutive steps of one generation of `model`: the conditioning tensor is its identity."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self._model = model
        self._inputs = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
        self.steps = 0
        """Done."""

    def step(self) -> float:
        """Seconds of the next step, the device idle before and after it."""
        timestep = torch.tensor([1000 * level_of_step(self.steps)], device=self._model.device)
        synchronize(self._model.device)
        begin = time.perf_counter()
        with torch.no_grad():
            self._model(timestep=timestep, **self._inputs)
        synchronize(self._model.device)
        self.steps += 1
        return time.perf_counter() - begin

    def profiled_step(self) -> list[dict[str, Any]]:
        """Device time of the next step by kernel, largest first."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.step()
        events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
        total = sum(event.self_device_time_total for event in events)
        events.sort(key=lambda event: -event.self_device_time_total)
        return [
            {
                "kernel": event.key[:LONGEST_NAME],
                "calls": event.count,
                "ms": event.self_device_time_total / 1e3,
                "share": event.self_device_time_total / total,
            }
            for event in events
        ]

"""Noise levels of the generations of a pipeline folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import diffusers

from reelquant.checkpoint.pipeline_files import MODEL_INDEX, read_components, read_json
from reelquant.checkpoint.reader import SECOND_TRANSFORMER, TRANSFORMER
from reelquant.families.family import Family
from reelquant.noise_schedule import USUAL_SHIFT, shifted_levels

logger = logging.getLogger(__name__)

SCHEDULER_CONFIG = Path("scheduler") / "scheduler_config.json"


class PipelineSchedule:
    """Noise levels by the number of steps, as the pipeline's own scheduler gives them."""

    def __init__(self, pipeline: Path, family: Family, num_video: int | None = None) -> None:
        """
        Args:
            pipeline: folder of a diffusers pipeline; its scheduler is read when it is asked for.
            num_video: video tokens of the generation, on which some families' schedules depend; None for the longest video
                for which the schedule changes.
        """
        self._folder, self._family, self._num_video = pipeline, family, num_video
        self._config = pipeline / SCHEDULER_CONFIG

    def __call__(self, num_steps: int) -> list[float]:
        """Noise levels of a generation with `num_steps` steps, falling.

        Without a scheduler (a transformer that was saved alone) they are those of flow matching with the usual shift, with a
        warning.

        Raises:
            ValueError: diffusers has no such scheduler, or it cannot do what the family's pipeline asks of it.
        """
        if not self._config.is_file():
            logger.warning("%s does not exist: taking flow matching with shift %g for it", self._config, USUAL_SHIFT)
            return shifted_levels(num_steps)
        return self._family.noise_levels(self._scheduler(), num_steps, self._num_video)

    def transformers(self, num_steps: int) -> list[str]:
        """Component of the pipeline that serves each step of a generation.

        Raises:
            ValueError: as for a call.
        """
        if self._family.boundary is None or SECOND_TRANSFORMER not in read_components(self._folder):
            return [TRANSFORMER] * num_steps
        boundary = read_json(self._folder / MODEL_INDEX)[self._family.boundary]
        return [TRANSFORMER if level >= boundary else SECOND_TRANSFORMER for level in self(num_steps)]

    def sigmas(self, num_steps: int) -> list[float]:
        """Sigmas `[num_steps + 1]` of the latents of a generation, noise to video, falling; the last is 0.

        Raises:
            ValueError: the scheduler is not the deterministic Euler sampler of flow matching, for which alone the network's
                output follows from two latents; or there is none, or as for a call.
        """
        if not self._config.is_file():
            raise ValueError(f"{self._config} does not exist: the sigmas of the latents are not known")
        scheduler = self._scheduler()
        name, random = type(scheduler).__name__, getattr(scheduler.config, "stochastic_sampling", False)
        if not isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler) or random:
            kind = f"{name} with stochastic_sampling" if random else name
            raise ValueError(
                f"the scheduler is {kind} ({self._config}): the network's output follows from two latents only with "
                "FlowMatchEulerDiscreteScheduler without stochastic_sampling"
            )
        self._family.noise_levels(scheduler, num_steps, self._num_video)
        return [float(sigma) for sigma in scheduler.sigmas]

    def _scheduler(self) -> Any:
        values = json.loads(self._config.read_text(encoding="utf-8"))
        scheduler_class = getattr(diffusers, str(values.get("_class_name")), None)
        if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)):
            raise ValueError(f"{self._config}: diffusers has no scheduler {values.get('_class_name')!r}")
        return scheduler_class.from_config(values)  # type: ignore[attr-defined]

"""Noise levels of the generations of a pipeline folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import ModuleType

import diffusers

from reelquant.noise_schedule import USUAL_SHIFT, shifted_levels

logger = logging.getLogger(__name__)

SCHEDULER_CONFIG = Path("scheduler") / "scheduler_config.json"


class PipelineSchedule:
    """Noise levels by the number of steps, as the pipeline's own scheduler gives them."""

    def __init__(self, pipeline: Path, family: ModuleType) -> None:
        """`pipeline` is the folder of a diffusers pipeline; its scheduler is read when it is asked for."""
        self._config = pipeline / SCHEDULER_CONFIG
        self._family = family

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
        values = json.loads(self._config.read_text(encoding="utf-8"))
        scheduler_class = getattr(diffusers, str(values.get("_class_name")), None)
        if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)):
            raise ValueError(f"{self._config}: diffusers has no scheduler {values.get('_class_name')!r}")
        scheduler = scheduler_class.from_config(values)  # type: ignore[attr-defined]
        levels: list[float] = self._family.noise_levels(scheduler, num_steps)
        return levels

"""What a run knows of its source model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.hub_model import FoundModel
from reelquant.calibration.block_call import BlockCall
from reelquant.calibration.input_groups import block_calls
from reelquant.checkpoint.reader import TRANSFORMER
from reelquant.families.family import Family
from reelquant.runtime.pipeline_schedule import PipelineSchedule
from reelquant.tokens import TokenLayout
from workers.component_check import PipelineInputs, pipeline_inputs
from workers.model_source import image_use


@dataclass(frozen=True)
class ModelFacts:
    """The source model, as far as the driver needs it."""

    found: FoundModel
    family: Family
    config: Mapping[str, Any]
    linears: Mapping[str, tuple[int, int]]
    """`(outputs, inputs)` by full layer name."""
    kinds: Mapping[str, str]
    """`block`, `modulation`, `refiner` or `embedder`, by full layer name."""
    variant: str | None = None
    """Of the weight files."""
    layout: TokenLayout | None = None
    """Of the tokens of the run's generations, without text; None where it is not known."""
    roles: tuple[str, ...] = (TRANSFORMER,)
    """Components that are its transformers, in the order in which they serve; all are built as `config` says."""

    @cached_property
    def inputs(self) -> PipelineInputs:
        """What its pipeline takes beside a prompt."""
        found = pipeline_inputs(self.folder)
        return replace(found, image="none") if image_use(self.folder, self.family, self.config) == "none" else found

    @property
    def folder(self) -> Path:
        """Where its files are read on this machine."""
        return self.found.folder

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks in model order."""
        return self.family.block_names(self.config)

    @property
    def calls(self) -> Mapping[str, BlockCall]:
        """How the blocks are called, by name in model order."""
        return block_calls(self.family, self.config)

    @property
    def num_video(self) -> int | None:
        """Video tokens of the run's generations; None where they are not known."""
        return None if self.layout is None else self.layout.num_video

    def noise_levels(self, num_steps: int) -> list[float]:
        """Noise levels of a generation with `num_steps` steps under the model's scheduler.

        Raises:
            ValueError: the scheduler is unknown or cannot do what the pipeline asks of it.
        """
        return PipelineSchedule(self.folder, self.family, self.num_video)(num_steps)

    def steps(self, num_steps: int) -> dict[str, tuple[int, ...]]:
        """Steps of such a generation by the transformer that serves them.

        Raises:
            ValueError: as `noise_levels`.
        """
        served = PipelineSchedule(self.folder, self.family, self.num_video).transformers(num_steps)
        return {role: tuple(step for step, by in enumerate(served) if by == role) for role in self.roles}

    def sigmas(self, num_steps: int) -> list[float]:
        """Sigmas of the latents of such a generation, noise to video, `[num_steps + 1]`.

        Raises:
            ValueError: the network's outputs do not follow from the latents of the model's scheduler.
        """
        return PipelineSchedule(self.folder, self.family, self.num_video).sigmas(num_steps)

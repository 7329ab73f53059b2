"""Full-precision streams of the chosen samples at the segment boundaries."""

from __future__ import annotations

from functools import partial

from pipeline.context import Run
from pipeline.run_units import reads_activations
from pipeline.stages.selection import selected_samples
from pipeline.stages.stage import StageUnit, UnitPlan, require, unit
from workers.activation_worker import ActivationWorker
from workers.messages import ActivationSettings, SampleUnit


class Activations:
    """One unit a sample; none if no method reads activations."""

    name, title = "activations", "Activations"
    worker_class = ActivationWorker

    def settings(self, run: Run) -> ActivationSettings:
        """Of every worker."""
        context = run.context
        boundaries = tuple(segment[0] for segment in context.segments)
        return ActivationSettings(context.source, context.config.generation, boundaries, context.sharding)

    def plan(self, run: Run) -> list[UnitPlan]:
        """Each depends on its prompt's trajectory; which there are, on the selection."""
        if not reads_activations(run.context.config):
            return []
        return [UnitPlan(sample.name, partial(self._unit, run, sample)) for sample in selected_samples(run)]

    def _unit(self, run: Run, sample: SampleUnit) -> StageUnit:
        depends = {
            "trajectory": require(run, "trajectories", sample.prompt_name).fingerprint,
            "step": sample.step,
            "boundaries": self.settings(run).boundaries,
        }
        return unit(self.name, sample.name, sample, depends, shared=True)

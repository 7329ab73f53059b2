"""Full-precision streams of the chosen samples at the segment boundaries."""

from __future__ import annotations

from pipeline.context import Run
from pipeline.stages.selection import selected_samples
from pipeline.stages.stage import StageUnit, require, unit
from workers.activation_worker import ActivationWorker
from workers.messages import ActivationSettings


class Activations:
    """One unit a sample; none if no method reads activations."""

    name, title = "activations", "Activations"
    worker_class = ActivationWorker

    def settings(self, run: Run) -> ActivationSettings:
        """Of every worker."""
        context = run.context
        boundaries = tuple(segment[0] for segment in context.segments)
        return ActivationSettings(context.source, context.generation, boundaries, context.sharding)

    def waves(self, run: Run) -> list[list[StageUnit]]:
        """All samples at once."""
        if not any(method.needs_activations for method in run.context.methods):
            return []
        settings = self.settings(run)
        return [
            [
                unit(
                    self.name,
                    sample.name,
                    sample,
                    {
                        "trajectory": require(run, "trajectories", sample.prompt_name).fingerprint,
                        "step": sample.step,
                        "boundaries": settings.boundaries,
                    },
                    shared=True,
                )
                for sample in selected_samples(run)
            ]
        ]

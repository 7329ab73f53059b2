"""Generates one prompt's diffusion trajectory with the full-precision model."""

from __future__ import annotations

from typing import Any

import torch

from reelquant.calibration.block_call import without_padding
from reelquant.calibration.salience import diffusion_salience
from storage.unit_store import UnitStore
from workers.generation import COND, branches, generate, watched_calls
from workers.hub_snapshot import model_folder
from workers.kept_pipeline import full_precision
from workers.messages import Progress, PromptUnit, TrajectorySettings, UnitOutput
from workers.model_source import family_of_model
from workers.out_of_memory import GENERATION_ADVICE, SHARDING_ADVICE
from workers.process import device_name, peak_memory_bytes, prepare_process, unit_seed
from workers.salience_hooks import SalienceHooks
from workers.stored_calls import RecordedSteps
from workers.velocity_watch import transformers


class TrajectoryWorker:
    """Holds the full-precision pipeline; its unit is one prompt.

    Writes under `trajectories/<unit>/`: `latents [T+1, ...]`, the transformer's recorded calls (`workers.stored_calls`),
    `timesteps [T]`, `video [F, H, W, 3]` uint8, what the modulation layers read, `conditioning [T * branches, d]`, if there are
    any, and the salience of each of the T candidates: `diffusion [T]` and the features asked for, of `latent [T]`,
    `block_input [T, blocks]` and `weight_error [T]`.
    """

    BESIDE_KEPT_PIPELINE = True
    MEMORY_ADVICE = SHARDING_ADVICE + GENERATION_ADVICE

    def __init__(self, settings: TrajectorySettings) -> None:
        self._settings = settings
        source = settings.source
        self._device, dtype = prepare_process(source.numerics)
        model = model_folder(source.model)
        self._family = family_of_model(model)
        self._pipeline = full_precision(
            model, device=self._device, dtype=dtype, sharding=settings.sharding, variant=source.variant
        )

    def run(self, unit: PromptUnit, progress: Progress, store: UnitStore) -> UnitOutput:
        """Generates and stores."""
        settings = self._settings
        hooks = SalienceHooks(
            self._family,
            transformers(self._pipeline),
            weight_bits=settings.weight_bits,
            max_tokens=settings.salience_tokens,
            features=settings.features,
        )
        seed = self._seed(unit)
        recorded = {branch: RecordedSteps() for branch in branches(self._family, settings.generation)}

        served: list[str] = []

        def see(role: str, branch: str, call: dict[str, Any]) -> None:
            recorded[branch].add(without_padding(self._family, call))
            hooks.begin(call, conditional=branch == COND)
            served.extend([role] if branch == COND else [])

        with hooks.watching(), watched_calls(self._pipeline, self._family, see):
            generated = generate(self._pipeline, unit, settings.generation, seed=seed, progress=progress)
        if settings.served and tuple(served) != settings.served:
            raise ValueError(
                f"the pipeline has called {', '.join(served)}, where its schedule and boundary say "
                f"{', '.join(settings.served)}: which steps are whose is not known"
            )
        latents = torch.stack(generated.latents)
        arrays = {
            "latents": latents,
            **({"conditioning": torch.cat(hooks.conditioning)} if hooks.conditioning else {}),
            "timesteps": torch.tensor(hooks.timesteps),
            "video": generated.video,
            "diffusion": diffusion_salience(latents),
            **{name: torch.stack(hooks.salience[name]) for name in settings.features},
        }
        for name, value in arrays.items():
            store.write(f"trajectories/{unit.name}/{name}", value.contiguous())
        for branch, calls in recorded.items():

            def write(name: str, value: torch.Tensor, branch: str = branch) -> None:
                store.write(f"trajectories/{unit.name}/{branch}/{name}", value.cpu().contiguous())

            calls.write(write, generated.latents)
        steps = sorted(generated.step_seconds)
        return UnitOutput(
            {"prompt": unit.prompt, "seconds_per_step": steps[len(steps) // 2], "num_steps": len(steps)},
            device_name(self._device),
            peak_memory_bytes(self._device),
        )

    def shadow(self, unit: PromptUnit, progress: Progress, store: UnitStore) -> None:
        """Takes part in the forward passes of a replica's unit, and keeps nothing."""
        generate(
            self._pipeline,
            unit,
            self._settings.generation,
            seed=self._seed(unit),
            progress=progress,
            decode=False,
        )

    def _seed(self, unit: PromptUnit) -> int:
        return unit_seed(self._settings.source.seed, "trajectories", unit.name)

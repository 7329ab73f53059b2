"""One rank of a replica without Ray: does units of its own, and is shadowed or shadows. Started by a test as

    python -m tests.workers.replica_ranks RUN KIND [OFFLOAD]
    python -m tests.workers.replica_ranks FOLDER all KIND...

with its place in the environment; a rank without others does the work of both. `all` does the checks of `sharded_checks` in
FOLDER, and then a run of each kind, in a folder of its name: importing takes longer than all of it.
"""

import json
import os
import sys
from pathlib import Path

from reelquant.settings.generation import Generation, Numerics
from tests.unit_cache import UnitCache
from tests.workers import sharded_checks
from workers.activation_worker import ActivationWorker
from workers.evaluation_worker import EvaluationWorker
from workers.messages import (
    ActivationSettings,
    EvaluationSettings,
    EvaluationUnit,
    PromptUnit,
    RunSource,
    SampleUnit,
    StepWeightsUnit,
    TrajectorySettings,
    VelocityUnit,
)
from workers.sharding import Sharding
from workers.trajectory_worker import TrajectoryWorker

MODEL = Path(__file__).resolve().parents[2] / "assets" / "hunyuanvideo-digits"
GENERATION = Generation(48, 64, 5, 2, 6.0, 32)
PROMPTS = [
    PromptUnit("prompt-000", "the digit 3 moving left"),
    PromptUnit("prompt-001", "the digit 5 moving up and down"),
]
SAMPLES = [SampleUnit("sample-000", "prompt-000", 1), SampleUnit("sample-001", "prompt-001", 0)]
BOUNDARIES = ("transformer_blocks.0", "transformer_blocks.2", "single_transformer_blocks.3")


def main(run: Path, sharding: Sharding) -> None:
    """Does this rank's units, then shadows rank 0 or is shadowed."""
    source, cache = RunSource(MODEL, 0, Numerics("auto", 1)), UnitCache(run)
    rank = int(os.environ.get("RANK", "0"))
    own = slice(None) if os.environ.get("WORLD_SIZE") == "1" else slice(rank, rank + 1)
    trajectories = TrajectoryWorker(TrajectorySettings(source, GENERATION, 4, 256, sharding))
    for prompt in PROMPTS[own]:
        cache.do(trajectories, "trajectories", prompt)
    again = PromptUnit("prompt-002", PROMPTS[1].prompt)
    cache.do(trajectories, "trajectories", again) if rank == 0 else cache.shadow(trajectories, "trajectories", again)
    del trajectories
    activations = ActivationWorker(ActivationSettings(source, GENERATION, BOUNDARIES, sharding))
    for sample in SAMPLES[own]:
        cache.do(activations, "activations", sample)
    third = SampleUnit("sample-002", "prompt-002", 1)
    cache.see("trajectories", again.name)
    cache.do(activations, "activations", third) if rank == 0 else cache.shadow(activations, "activations", third)
    del activations
    evaluation = EvaluationWorker(EvaluationSettings(source, GENERATION, None, films=False, sharding=sharding))
    name, first = "full_precision-False", PROMPTS[:1]
    stored = (f"evaluation/{name}",)
    units: list[EvaluationUnit | VelocityUnit | StepWeightsUnit] = [
        EvaluationUnit(name, PROMPTS[0], None, keep_latents=True, keep_velocity=True),
        EvaluationUnit("full_precision-True", PROMPTS[0], None, noise_floor=True),
        StepWeightsUnit("step_weights", tuple(first), stored, (0, 1), 1),
        VelocityUnit("noise_floor-velocity-000", tuple(first), stored, None),
    ]
    for unit in units:
        if rank == 0:
            result = {**cache.do(evaluation, "evaluation", unit).result, "seconds_per_step": None}
            (run / f"{unit.name}.json").write_text(json.dumps(result))
        else:
            cache.shadow(evaluation, "evaluation", unit)
            cache.see("evaluation", unit.name)


if __name__ == "__main__":
    folder, kind, *others = Path(sys.argv[1]), *sys.argv[2:]
    if kind == "all":
        sharded_checks.main(folder)
        for each in others:
            main(folder / each, Sharding.from_dict({"sharding": each}))
    else:
        offload = others[0] if others else "none"
        main(folder, Sharding.from_dict({"sharding": kind, "offload": offload, "offload_path": folder / "nvme"}))

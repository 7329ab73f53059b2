"""Teacher-forced passes on the small model: what is forced, what is measured, and that several prompts at once are as one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from reelquant.attention.sparse_spec import SparseAttentionSpec
from reelquant.checkpoint.layer_packing import pack_layer, write_block_artifact
from reelquant.checkpoint.writer import write_checkpoint
from reelquant.metrics import velocity_sqnr_db
from reelquant.quantization.weight_grid import fit_per_channel
from reelquant.settings.attention import Residual
from reelquant.settings.generation import Generation, Numerics
from tests.unit_cache import UnitCache, ignore
from workers.evaluation_worker import EvaluationWorker
from workers.messages import EvaluationSettings, EvaluationUnit, PromptUnit, RunSource, StepWeightsUnit, VelocityUnit
from workers.model_source import family_of_model, open_pipeline
from workers.rounded_outputs import rounded_blocks
from workers.step_effects import Trajectory, rounding_errors, step_effects
from workers.velocity_watch import teacher_forced, watched_velocities

GENERATION = Generation(48, 64, 5, 4, 6.0, 32)
STEPS = GENERATION.num_inference_steps
PROMPTS = tuple(
    PromptUnit(f"prompt-{index:03d}", text)
    for index, text in enumerate(
        ["the digit 7 moving right", "the digit 3", "the digit 5 moving up and down", "the digit 0 moving left"]
    )
)
CPU = torch.device("cpu")
SPARSE = SparseAttentionSpec(density=0.6, online=True, interval=3, dense_above=0.9, residual=Residual(order=1, rank=8))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> UnitCache:
    """A run; its checkpoints are made by `checkpoint`, its trajectories by `trajectories`."""
    folder = tmp_path_factory.mktemp("velocity") / "run"
    folder.mkdir()
    return UnitCache(folder)


@pytest.fixture(scope="module")
def checkpoint(run: UnitCache, digits_model: Path) -> Callable[[str], str]:
    """Logical name of a checkpoint `dense` or `sparse` with eight rounded layers. Activations are not rounded: last digits,
    which differ from machine to machine and with the batch, would decide their codes."""
    names = [f"single_transformer_blocks.{i}.{layer}" for i in range(4) for layer in ("proj_out", "proj_mlp")]
    tensors, specs = {}, {}
    with safe_open(digits_model / "transformer/diffusion_pytorch_model.safetensors", framework="pt") as source:
        for name in names:
            weight = source.get_tensor(f"{name}.weight").float()
            grid = fit_per_channel(weight, 4)
            bias = source.get_tensor(f"{name}.bias")
            packed, specs[name] = pack_layer(
                name, codes=grid.round(weight), grid=grid, bias=bias, activation_bits=16, activation_clip=None
            )
            tensors.update(packed)
    write_block_artifact(run.run / "block.safetensors", tensors, specs)

    def write(kind: str) -> str:
        if not (run.run / kind).is_dir():
            sparse = SPARSE if kind == "sparse" else None
            artifacts = [run.run / "block.safetensors"]
            write_checkpoint(
                digits_model, run.run / kind, artifacts=artifacts, bits="W4A16", method="rtn", sparse_attention=sparse
            )
        return run.put_checkpoint(kind)

    return write


@pytest.fixture(scope="module")
def worker(digits_model: Path) -> EvaluationWorker:
    source = RunSource(digits_model, 0, Numerics("float32", 1))
    return EvaluationWorker(EvaluationSettings(source, GENERATION, None, films=False, seed=5))


@pytest.fixture(scope="module")
def trajectories(run: UnitCache, worker: EvaluationWorker) -> dict[str, dict[str, Any]]:
    """Results of the full-precision units, whose trajectories are in the store."""
    found = {}
    for prompt in PROMPTS:
        unit = EvaluationUnit(f"full_precision-{prompt.name}", prompt, None, keep_latents=True, keep_velocity=True)
        found[prompt.name] = dict(run.do(worker, "evaluation", unit).result)
    return found


def stored(run: UnitCache, prompt: PromptUnit, array: str) -> Tensor:
    return run.outputs.read(f"evaluation/full_precision-{prompt.name}/{array}")


def velocity_unit(prompts: Sequence[PromptUnit], folder: str) -> VelocityUnit:
    names = tuple(f"evaluation/full_precision-{prompt.name}" for prompt in prompts)
    return VelocityUnit("unit", tuple(prompts), names, folder)


def test_stored_trajectories_follow_from_their_velocities(
    run: UnitCache, trajectories: dict[str, dict[str, Any]], digits_model: Path
) -> None:
    pipeline = open_pipeline(digits_model, device=CPU, dtype=torch.float32)
    latents, velocity = stored(run, PROMPTS[0], "latents"), stored(run, PROMPTS[0], "velocity")
    assert latents.shape == (STEPS + 1, *velocity.shape[1:])
    assert velocity.dtype == latents.dtype == torch.float32
    pipeline.scheduler.set_timesteps(sigmas=torch.linspace(1, 0, STEPS + 1)[:-1].tolist())
    sigmas = pipeline.scheduler.sigmas
    for step in range(STEPS):
        expected = latents[step] + (sigmas[step + 1] - sigmas[step]) * velocity[step]
        torch.testing.assert_close(latents[step + 1], expected, rtol=1e-5, atol=1e-5)
    denoised = [x - sigma * v for x, sigma, v in zip(latents[:-1], sigmas[:-1], velocity, strict=True)]
    changes = [float((b - a).norm() / a.norm()) for a, b in itertools.pairwise(denoised)]
    assert trajectories["prompt-000"]["denoised_changes"] == pytest.approx(changes, rel=1e-4)


def test_the_full_precision_model_on_its_own_trajectory_has_no_error_and_gets_what_is_stored(
    run: UnitCache, trajectories: dict[str, dict[str, Any]], digits_model: Path
) -> None:
    pipeline = open_pipeline(digits_model, device=CPU, dtype=torch.float32)
    latents, velocity = stored(run, PROMPTS[1], "latents"), stored(run, PROMPTS[1], "velocity")
    inputs: list[Tensor] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: inputs.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    seen: list[Tensor] = []

    def watch(step: int, guided: Tensor, passes: Sequence[Tensor]) -> None:
        assert step == len(seen)
        assert len(passes) == 1
        assert passes[0].equal(guided)
        seen.append(guided[0].clone())

    scheduler_step = pipeline.scheduler.step
    teacher_forced(
        pipeline, [PROMPTS[1]], GENERATION, latents=latents.unsqueeze(1), seeds=[0], watch=watch, progress=ignore
    )
    assert torch.cat(inputs).equal(latents[:-1])
    assert velocity_sqnr_db(velocity, torch.stack(seen)) == float("inf")
    assert pipeline.scheduler.step == scheduler_step
    assert not pipeline.transformer._forward_hooks


def test_errors_are_those_computed_by_hand(
    run: UnitCache,
    worker: EvaluationWorker,
    trajectories: dict[str, dict[str, Any]],
    checkpoint: Callable[[str], str],
    digits_model: Path,
) -> None:
    found = run.do(worker, "evaluation", velocity_unit(PROMPTS[:1], checkpoint("dense"))).result["prompts"][
        "prompt-000"
    ]
    reference = open_pipeline(digits_model, device=CPU, dtype=torch.float32)
    quantized = open_pipeline(run.run / "dense", device=CPU, dtype=torch.float32)
    embeds, pooled, mask = reference.encode_prompt(PROMPTS[0].prompt, max_sequence_length=32)
    latents = stored(run, PROMPTS[0], "latents")
    reference.scheduler.set_timesteps(sigmas=torch.linspace(1, 0, STEPS + 1)[:-1].tolist())
    expected = []
    for step, time in enumerate(reference.scheduler.timesteps):
        inputs = {
            "hidden_states": latents[step : step + 1], "timestep": time[None], "encoder_hidden_states": embeds,
            "encoder_attention_mask": mask.float(), "pooled_projections": pooled,
            "guidance": torch.tensor([6000.0]), "return_dict": False,
        }  # fmt: skip
        with torch.no_grad():
            one, other = (p.transformer(**inputs)[0].double() for p in (reference, quantized))
        expected.append(float((one - other).square().sum() / one.square().sum()))
    assert found["velocity_error"] == pytest.approx(expected, rel=1e-3)
    assert min(expected) > 1e-5, "the rounded layers count"
    assert "pass_errors" not in found


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_several_prompts_at_once_are_as_one_by_one(
    kind: str,
    run: UnitCache,
    worker: EvaluationWorker,
    trajectories: dict[str, dict[str, Any]],
    checkpoint: Callable[[str], str],
) -> None:
    together = run.do(worker, "evaluation", velocity_unit(PROMPTS, checkpoint(kind))).result
    for prompt in PROMPTS:
        alone = run.do(worker, "evaluation", velocity_unit([prompt], checkpoint(kind))).result
        [single] = alone["prompts"].values()
        assert together["prompts"][prompt.name]["velocity_error"] == pytest.approx(single["velocity_error"], rel=1e-3)
        if kind == "sparse":
            assert 0.6 < alone["effective_density"] < 1
            assert together["effective_density"] == pytest.approx(alone["effective_density"], abs=0.02)


def test_sparse_steps_carry_their_state(
    run: UnitCache, worker: EvaluationWorker, trajectories: dict[str, dict[str, Any]], checkpoint: Callable[[str], str]
) -> None:
    errors = [
        run.do(worker, "evaluation", velocity_unit(PROMPTS[:1], checkpoint(kind))).result["prompts"]["prompt-000"]
        for kind in ("dense", "sparse")
    ]
    dense, sparse = (found["velocity_error"] for found in errors)
    # Step 0 is dense, step 1 a refresh (the noise levels are 1, 0.9, 0.75, 0.5), steps 2 and 3 lie behind it.
    assert sparse[:2] == pytest.approx(dense[:2], rel=1e-3)
    assert all(one > 1.05 * other for one, other in zip(sparse[2:], dense[2:], strict=True))


def test_closed_loop_latents_are_compared_step_by_step(
    run: UnitCache, worker: EvaluationWorker, trajectories: dict[str, dict[str, Any]], checkpoint: Callable[[str], str]
) -> None:
    unit = EvaluationUnit(
        "rtn-prompt-000",
        PROMPTS[0],
        checkpoint("dense"),
        reference="evaluation/full_precision-prompt-000",
        compare_latents=True,
        keep_latents=True,
    )
    result = run.do(worker, "evaluation", unit).result
    own = run.outputs.read("evaluation/rtn-prompt-000/latents").double()
    reference = stored(run, PROMPTS[0], "latents").double()
    expected = [float((a - b).square().sum() / a.square().sum()) for a, b in zip(reference, own, strict=True)]
    assert expected[0] == 0, "the noise is the same"
    assert result["latent_error"] == pytest.approx(expected[1:], rel=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
def test_weights_of_the_steps_are_their_effects_on_the_final_latents(
    rows: int, run: UnitCache, worker: EvaluationWorker, trajectories: dict[str, dict[str, Any]]
) -> None:
    names = ("evaluation/full_precision-prompt-002",)
    unit = StepWeightsUnit("weights", PROMPTS[2:3], names, (0, 2, 3), rows)
    result = run.do(worker, "evaluation", unit).result
    effects = dict(result["effects"])
    assert list(effects) == [0, 2, 3]
    weights = result["weights"]
    assert [weights[step] for step in (0, 2, 3)] == pytest.approx(list(effects.values()))
    assert weights[1] == pytest.approx((weights[0] * weights[2]) ** 0.5), "between measured steps, in logarithms"
    # Behind the last velocity nothing follows: the error of the latents is the step's share of it.
    latents, velocity = stored(run, PROMPTS[2], "latents"), stored(run, PROMPTS[2], "velocity")
    share = (latents[-1] - latents[-2]).norm() / velocity[-1].norm()
    expected = float((share * velocity[-1].norm() / latents[-1].norm()) ** 2)
    assert effects[3] == pytest.approx(expected, rel=0.01)


def test_passes_of_guidance_are_measured_beside_their_combination(
    run: UnitCache, worker: EvaluationWorker, trajectories: dict[str, dict[str, Any]], digits_model: Path
) -> None:
    """The small model under true classifier-free guidance: two passes a step."""
    pipeline = open_pipeline(digits_model, device=CPU, dtype=torch.float32)
    seen: list[tuple[Tensor, list[Tensor]]] = []
    with watched_velocities(pipeline, lambda _step, guided, passes: seen.append((guided, list(passes)))):
        pipeline(
            PROMPTS[0].prompt,
            negative_prompt="the digit 1",
            true_cfg_scale=3.0,
            latents=stored(run, PROMPTS[0], "latents")[:1],
            output_type="latent",
            **vars(replace(GENERATION, num_inference_steps=2)),
        )
    assert [len(passes) for _, passes in seen] == [2, 2]
    for guided, (conditional, unconditional) in seen:
        torch.testing.assert_close(guided, unconditional + 3.0 * (conditional - unconditional))


def test_rounded_outputs_are_those_of_rounded_weights(digits_model: Path) -> None:
    one, other = (open_pipeline(digits_model, device=CPU, dtype=torch.float32).transformer for _ in range(2))
    family = family_of_model(digits_model)
    for name, layer in other.named_modules():
        if isinstance(layer, nn.Linear) and name.startswith(family.block_names(other.config)):
            grid = fit_per_channel(layer.weight, 4)
            layer.weight.data = grid.dequantize(grid.round(layer.weight))
    inputs = {
        "hidden_states": torch.randn(1, one.config.in_channels, 2, 6, 8), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 9, one.config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, 9),
        "pooled_projections": torch.randn(1, one.config.pooled_projection_dim), "guidance": torch.tensor([6000.0]),
        "return_dict": False,
    }  # fmt: skip
    with torch.no_grad():
        exact, expected = one(**inputs)[0], other(**inputs)[0]
        with rounded_blocks(family, one):
            found = one(**inputs)[0]
        assert one(**inputs)[0].equal(exact), "nothing is left behind"
    assert (expected - exact).norm() > 0.02 * exact.norm()
    assert (found - expected).norm() < 1e-3 * (expected - exact).norm()


def test_a_quantizers_error_lasts_and_the_effect_does_not_depend_on_its_size(
    run: UnitCache, trajectories: dict[str, dict[str, Any]], digits_model: Path
) -> None:
    pipeline = open_pipeline(digits_model, device=CPU, dtype=torch.float32)
    trajectory = Trajectory(PROMPTS[3], stored(run, PROMPTS[3], "latents"), stored(run, PROMPTS[3], "velocity"), seed=0)
    family = family_of_model(digits_model)
    errors = rounding_errors(pipeline, family, trajectory, GENERATION, steps=(1, 2), progress=ignore)
    assert list(errors) == [1, 2]
    every = rounding_errors(pipeline, family, trajectory, GENERATION, steps=(1, 2), leave_out=False, progress=ignore)
    assert all(torch.equal(errors[step], every[step]) for step in errors), "what is left out does not count"
    effects = step_effects(pipeline, family, trajectory, GENERATION, errors=errors, progress=ignore)
    smaller = {step: 0.01 * error for step, error in errors.items()}
    assert step_effects(pipeline, family, trajectory, GENERATION, errors=smaller, progress=ignore) == pytest.approx(
        effects, rel=1e-3
    )
    noise = {step: torch.randn(error.shape) for step, error in errors.items()}
    removed = step_effects(pipeline, family, trajectory, GENERATION, errors=noise, progress=ignore)
    assert all(effects[step] > 3 * removed[step] for step in effects)

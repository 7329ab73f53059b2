"""Repair and correction of a narrow model, through the store, the artifacts and a checkpoint, with the real workers."""

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from safetensors.torch import load_file

from reelquant.attention.head_kind import NUM_ROWS
from reelquant.attention.sparse_spec import SparseAttentionSpec
from reelquant.calibration.residual_drift import MeasuredResidual, ResidualDrift, measured_residual
from reelquant.checkpoint.inference_specs import VelocityCorrection
from reelquant.checkpoint.reader import source_weights
from reelquant.checkpoint.verify import verify_checkpoint
from reelquant.checkpoint.writer import write_checkpoint
from reelquant.families.attention_core import watch_attention
from reelquant.families.hunyuan_video import FAMILY
from reelquant.ops.band_attention.op import band_attention, dense_attention
from reelquant.quantization.linear import QuantizedLinear
from reelquant.runtime.pipeline_schedule import PipelineSchedule
from reelquant.settings.attention import Residual, SparseAttention
from reelquant.settings.generation import Generation, LayerBits, Numerics, StepProtection
from reelquant.settings.recipe import PRESETS
from reelquant.tokens import band_width
from storage.unit_store import UnitStore
from tests.reelquant.narrow_blocks import layout_of
from tests.unit_cache import UnitCache
from workers.activation_worker import ActivationWorker
from workers.distillation_worker import DistillationWorker
from workers.messages import (
    ActivationSettings,
    DistillationSettings,
    MethodPlan,
    PromptUnit,
    RefinementSettings,
    RefinementUnit,
    RunSource,
    SampleUnit,
    SegmentUnit,
    TrajectorySettings,
    UnitOutput,
)
from workers.model_source import linear_shapes, transformer_config
from workers.quantized_model import full_precision_transformer, quantized_block, quantized_transformer
from workers.refinement_worker import MEASURED_PROMPTS, RefinementWorker
from workers.trajectory_worker import TrajectoryWorker

RTN = PRESETS["rtn"]
GENERATION = Generation(
    height=32, width=48, num_frames=5, num_inference_steps=4, guidance_scale=6.0, max_sequence_length=16
)
PROMPTS = tuple(PromptUnit(f"prompt-{i:03d}", f"the digit {i} moving left") for i in range(4))
SAMPLES = tuple(SampleUnit(f"{p.name}-step-{i:03d}", p.name, i) for p in PROMPTS for i in (0, 2))
CPU, F32 = torch.device("cpu"), torch.float32


class Prepared:
    """A run up to the distillation."""

    def __init__(self, folder: Path, digits: Path) -> None:
        self.model = Path(shutil.copytree(digits, folder / "model"))
        narrow = {
            "num_attention_heads": 2, "attention_head_dim": 16, "rope_axes_dim": [4, 6, 6], "num_layers": 2,
            "num_single_layers": 2, "num_refiner_layers": 1,
        }  # fmt: skip
        config = self.model / "transformer" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **narrow}))
        torch.manual_seed(0)
        built = HunyuanVideoTransformer3DModel.from_config(json.loads(config.read_text()))
        built.to(torch.bfloat16).save_pretrained(self.model / "transformer")
        self.weights = source_weights(self.model / "transformer")
        self.source = RunSource(self.model, 0, Numerics("float32", 1))
        self.cache = UnitCache(folder / "run")
        self.blocks = FAMILY.block_names(transformer_config(self.model))
        linears = linear_shapes(transformer_config(self.model), FAMILY)
        bits = {
            name: LayerBits(3, 16 if name.rpartition(".")[2] == "linear" else 5)
            for name in linears
            if name.startswith(self.blocks)
        }
        self.method = MethodPlan(RTN, bits)
        self.artifacts = tuple(self._calibrate())

    def _calibrate(self) -> list[str]:
        trajectories = TrajectoryWorker(TrajectorySettings(self.source, GENERATION, 4, 16))
        for prompt in PROMPTS:
            self.cache.do(trajectories, "trajectories", prompt)
        activations = ActivationWorker(ActivationSettings(self.source, GENERATION, (self.blocks[0], self.blocks[2])))
        for sample in SAMPLES:
            self.cache.do(activations, "activations", sample)
        worker = DistillationWorker(DistillationSettings(self.source, SAMPLES, PROMPTS, False))
        cut = {"first": self.blocks[:2], "second": self.blocks[2:], "auxiliary": ()}
        units = [SegmentUnit(name, self.method, blocks) for name, blocks in cut.items()]
        found = {unit.name: self.cache.do(worker, "distillation", unit).outputs for unit in units}
        return [f"distillation/{name}/{output.path}" for name, outputs in found.items() for output in outputs]

    def files(self, repaired: Sequence[str] = ()) -> list[Path]:
        """Local paths of the artifacts, those of repaired blocks in place of the others."""
        names = {Path(name).name: f"refinement/rtn/{name}" for name in repaired}
        return [self.cache.outputs.file(names.get(Path(name).name, name)) for name in self.artifacts]

    def refine(
        self,
        *,
        prompts: tuple[PromptUnit, ...] = PROMPTS,
        sparse: SparseAttentionSpec | None = None,
        protection: StepProtection | None = None,
        **recipe: Any,
    ) -> UnitOutput:
        worker = RefinementWorker(RefinementSettings(self.source, GENERATION, SAMPLES, prompts))
        seen: list[tuple[int, int]] = []
        method = replace(self.method, recipe=replace(RTN, **recipe), protection=protection)
        unit = RefinementUnit("rtn", method, self.artifacts, sparse)
        output = self.cache.do(worker, "refinement", unit, lambda done, total: seen.append((done, total)))
        assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
        return output


def by_name(paths: list[Path]) -> dict[str, Path]:
    return {path.name.removesuffix(".safetensors"): path for path in paths}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, digits_model: Path) -> Any:
    """Read only, but for the refinement."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield Prepared(tmp_path_factory.mktemp("refinement"), digits_model)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def test_repair_and_correction_end_up_in_a_sound_checkpoint(prepared: Prepared, tmp_path: Path) -> None:
    output = prepared.refine(drift_repair=True, velocity_correction=True)
    drift = output.result["drift"]
    assert list(drift) == list(prepared.blocks)
    accepted = [name for name, block in drift.items() if block["accepted"]]
    assert accepted
    assert [Path(file.path).name for file in output.outputs] == [f"{name}.safetensors" for name in accepted]
    for name, block in drift.items():
        assert (block["after"] < block["before"]) == (name in accepted)
    last = drift[prepared.blocks[-1]]
    assert min(last["before"], last["after"]) < last["without"], last
    artifacts = prepared.files(repaired=[file.path for file in output.outputs])
    velocity = output.result["velocity_correction"]
    correction = None if velocity is None else VelocityCorrection.from_dict(velocity)
    folder = tmp_path / "checkpoint"
    write_checkpoint(
        prepared.model, folder, artifacts=artifacts, bits="W3A5", method="rtn", velocity_correction=correction
    )
    assert verify_checkpoint(folder).problems == []
    loaded = HunyuanVideoTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=F32)
    for name in accepted:
        old, new = (load_file(by_name(paths)[name]) for paths in (prepared.files(), artifacts))
        changed = {key for key in new if key not in old or not torch.equal(new[key], old[key])}
        outputs = {f"{name}.{output.layer}" for level in FAMILY.output_layers(loaded.config, name) for output in level}
        assert changed <= {f"{layer}.{suffix}" for layer in outputs for suffix in ("weight_scale", "bias")}
        for key in changed:
            layer, _, suffix = key.rpartition(".")
            module = loaded.get_submodule(layer)
            assert isinstance(module, QuantizedLinear)
            assert torch.equal(getattr(module, suffix), new[key].float())
        assert {new[key].dtype for key in changed if key.endswith(".bias")} == {torch.bfloat16}, "the source's"
    again = prepared.refine(drift_repair=True, velocity_correction=True)
    assert again.outputs == output.outputs
    assert again.result == output.result


def test_velocity_correction_is_fitted_and_never_worse_on_prompts_left_out(prepared: Prepared) -> None:
    result = prepared.refine(velocity_correction=True).result
    assert result["drift"] == {}
    velocity = result["velocity"]
    assert velocity["num_prompts"] == 4
    assert 0 < velocity["error_after"] <= velocity["error_before"]
    assert (result["velocity_correction"] is None) == (velocity["ridge"] is None)
    if result["velocity_correction"] is not None:
        correction = VelocityCorrection.from_dict(result["velocity_correction"])
        stored = prepared.cache.outputs.read("trajectories/prompt-000/timesteps")
        assert correction.timesteps == tuple(stored.tolist())
        assert len(correction.gain[0]) == 8


def test_two_prompts_fit_no_velocity_and_say_so(prepared: Prepared) -> None:
    result = prepared.refine(prompts=PROMPTS[:2], velocity_correction=True).result
    assert result["velocity_correction"] is None
    assert result["velocity"] == {"note": "not fitted: 2 calibration prompts, 3 or more are needed"}


def test_protected_steps_and_sparse_attention_are_what_the_velocity_is_fitted_on(prepared: Prepared) -> None:
    plain = prepared.refine(velocity_correction=True).result["velocity"]
    finer = StepProtection(0.75, 16)
    protected = prepared.refine(velocity_correction=True, protection=finer).result["velocity"]
    assert protected["error_before"] < plain["error_before"]
    kinds = dict.fromkeys(prepared.blocks, "st")
    sparse = SparseAttentionSpec(
        0.6, head_kinds=kinds, interval=2, residual=Residual(order=0, rank=None, storage="full")
    )
    assert prepared.refine(velocity_correction=True, sparse=sparse).result["velocity"] != plain


def test_gains_and_refreshes_are_measured_on_the_quantized_model(prepared: Prepared) -> None:
    """Every block's residual, whole, by its definition: the model's own attention dense and with the band."""
    kinds, steps = dict(zip(prepared.blocks, ("st", "ts", "ss", "tt"), strict=True)), GENERATION.num_inference_steps
    spec = SparseAttentionSpec(0.6, head_kinds=kinds, interval=2, residual=Residual(order=1, rank=4))
    asked = SparseAttention(density=0.6, refresh_steps="placed", residual=Residual(order=1, gain="calibrated"))
    result = prepared.refine(sparse=spec, attention=asked).result
    found = MeasuredResidual.from_dict(result["residual"])
    assert result["velocity"] is None
    assert found.refresh_steps is not None
    assert (found.refresh_steps[0], len(found.refresh_steps)) == (0, 2)
    assert len(found.gain or ()) == steps - 1
    assert found.error_after <= found.error_before

    model = quantized_transformer(prepared.model, prepared.weights, prepared.files(), device=CPU, dtype=F32)
    layout = layout_of(model.config, (8, 2, 8, 12), 0)
    every = torch.arange(layout.num_video)
    worker = RefinementWorker(RefinementSettings(prepared.source, GENERATION, SAMPLES, PROMPTS))
    worker._store = UnitStore(prepared.cache.address("refinement", "rtn"))
    drift = ResidualDrift(steps)
    for prompt in PROMPTS[:MEASURED_PROMPTS]:
        seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in prepared.blocks}

        def observe(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, into: Any = seen) -> None:
            full = replace(layout, num_text=q.shape[1] - layout.num_video)
            width = band_width(full, spec.density)
            dense = dense_attention(q, k, v)
            banded = band_attention(q, k, v, kinds=kinds[name], layout=full, width=width)
            into[name].append(((dense - banded)[:, every], dense[:, every]))

        with contextlib.ExitStack() as watched:
            for name in prepared.blocks:
                block = model.get_submodule(name)
                watched.enter_context(watch_attention(FAMILY, block, partial(observe, name)))
            list(worker._velocities(model, prompt, lambda: None))
        for pairs in seen.values():
            drift.add(torch.stack([missed for missed, _ in pairs]), [float(d.square().sum()) for _, d in pairs])
    # All 48 video tokens are sampled, so that nothing is estimated.
    assert layout.num_video <= NUM_ROWS
    assert found.gain == pytest.approx(drift.gain(0), abs=1e-4)
    levels = PipelineSchedule(prepared.model, FAMILY)(steps)
    again = measured_residual(drift, spec, levels, gain=True, placed=True)
    assert found.refresh_at == again.refresh_at
    assert found.error_before == pytest.approx(again.error_before, rel=1e-3)


def test_the_velocity_is_fitted_on_the_measured_residual(prepared: Prepared) -> None:
    spec = SparseAttentionSpec(
        0.6, head_kinds=dict.fromkeys(prepared.blocks, "st"), interval=3, residual=Residual(order=1, rank=4)
    )
    plain = prepared.refine(sparse=spec, velocity_correction=True).result
    asked = SparseAttention(density=0.6, residual=Residual(order=1, gain="calibrated"))
    measured = prepared.refine(sparse=spec, velocity_correction=True, attention=asked).result
    assert "residual" not in plain
    assert measured["velocity"] != plain["velocity"]
    given = MeasuredResidual.from_dict(measured["residual"]).applied(spec)
    assert prepared.refine(sparse=given, velocity_correction=True).result["velocity"] == measured["velocity"]


def test_protected_steps_are_repaired_with_their_own_bits(prepared: Prepared) -> None:
    plain = prepared.refine(drift_repair=True).result["drift"]
    finer = StepProtection(0.0, 16)
    drift = prepared.refine(drift_repair=True, protection=finer).result["drift"]
    assert all(drift[name]["without"] < plain[name]["without"] for name in prepared.blocks)


def test_stored_latents_give_the_full_precision_velocity_in_float32_only(prepared: Prepared) -> None:
    """Why the full-precision model runs again: in bfloat16 the latents of two steps are too coarse for their difference."""
    store = prepared.cache.outputs
    worker = RefinementWorker(RefinementSettings(prepared.source, GENERATION, SAMPLES, PROMPTS))
    worker._store = UnitStore(prepared.cache.address("refinement", "rtn"))
    model = full_precision_transformer(prepared.model, prepared.weights, device=CPU, dtype=F32)
    found = torch.stack(list(worker._velocities(model, PROMPTS[0], lambda: None)))
    latents = store.read("trajectories/prompt-000/latents")
    times = torch.cat([store.read("trajectories/prompt-000/timesteps"), torch.zeros(1)]) / 1000
    steps = times.diff().view(-1, 1, 1, 1, 1)

    def error(stored: torch.Tensor) -> float:
        return float(((stored.diff(dim=0) / steps - found).square().sum() / found.square().sum()).sqrt())

    assert error(latents) < 1e-4
    assert error(latents.bfloat16().float()) > 3e-3


def test_quantized_model_is_the_checkpoint(prepared: Prepared, tmp_path: Path) -> None:
    artifacts = prepared.files()
    write_checkpoint(prepared.model, tmp_path / "checkpoint", artifacts=artifacts, bits="W3A5", method="rtn")
    loaded = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path / "checkpoint" / "transformer", torch_dtype=F32)
    built = quantized_transformer(prepared.model, prepared.weights, artifacts, device=CPU, dtype=F32)
    wanted = loaded.state_dict()
    assert set(built.state_dict()) == set(wanted)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in built.state_dict().items())
    assert not any(parameter.requires_grad for parameter in built.parameters())
    for name in prepared.blocks:
        path = by_name(artifacts)[name]
        block = quantized_block(prepared.model, prepared.weights, name, path, device=CPU, dtype=F32)
        stream, temb = torch.randn(1, 20, 32), torch.randn(1, 32)
        with torch.no_grad():
            both = [m(stream, stream[:, :5], temb, None, None) for m in (block, loaded.get_submodule(name))]
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))

"""Settings of one loaded checkpoint, one after the other: each is what it would be alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel

from reelquant.attention.sparse_spec import SparseAttentionSpec
from reelquant.checkpoint.writer import write_checkpoint
from reelquant.settings.attention import Residual
from reelquant.settings.generation import StepProtection
from tests.errors import raises
from tests.reelquant.conftest import tiny_artifacts, tiny_source  # noqa: F401
from workers.checkpoint_settings import apply_settings

SPARSE = SparseAttentionSpec(density=0.5, online=True, interval=3, residual=Residual(order=1, rank=4))
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "thicker": {"density": 0.8, "interval": 4},
    "coarse": {"step_protection": False, "residual": {"gain": (0.7,)}},
    "dense": {"enabled": False},
}


def opened(source: Path, artifacts: list[Path], folder: Path, **parts: Any) -> Any:
    """The part of a pipeline that settings change."""
    write_checkpoint(source, folder, artifacts=artifacts, bits="W4A6", method="test", **parts)
    model = HunyuanVideoTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    return SimpleNamespace(transformer=model)


@torch.no_grad()
def outputs(pipeline: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 3, 5, generator=generator),
        "encoder_hidden_states": torch.randn(1, 7, 16, generator=generator),
        "encoder_attention_mask": torch.ones(1, 7),
        "pooled_projections": torch.randn(1, 8, generator=generator),
        "guidance": torch.tensor([6000.0]),
        "return_dict": False,
    }
    return torch.stack([pipeline.transformer(timestep=torch.tensor([t]), **inputs)[0] for t in (1000.0, 900.0, 500.0)])


def test_each_setting_is_the_checkpoint_s_own_whatever_came_before(
    tiny_source: Path,  # noqa: F811
    tiny_artifacts: list[Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    parts = {"sparse_attention": SPARSE, "step_protection": StepProtection(0.95, 16)}
    alone = {}
    for name, settings in SETTINGS.items():
        pipeline = opened(tiny_source, tiny_artifacts, tmp_path / name, **parts)
        apply_settings(pipeline, settings)
        alone[name] = outputs(pipeline)
    assert len({found.numpy().tobytes() for found in alone.values()}) == len(SETTINGS)
    one = opened(tiny_source, tiny_artifacts, tmp_path / "one", **parts)
    for name in [*SETTINGS, *reversed(SETTINGS)]:
        apply_settings(one, SETTINGS[name])
        assert torch.equal(outputs(one), alone[name]), name
    with raises(ValueError, "colour"):
        apply_settings(one, {"colour": 1})


def test_a_dense_checkpoint_has_its_protected_steps_alone(
    tiny_source: Path,  # noqa: F811
    tiny_artifacts: list[Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    protected = opened(tiny_source, tiny_artifacts, tmp_path / "a", step_protection=StepProtection(0.95, 16))
    plain = opened(tiny_source, tiny_artifacts, tmp_path / "b")
    before = outputs(protected)
    apply_settings(protected, {"step_protection": False})
    assert torch.equal(outputs(protected), outputs(plain))
    apply_settings(protected, {})
    assert torch.equal(outputs(protected), before)
    apply_settings(plain, {})
    for pipeline, settings, words in (
        (plain, {"step_protection": False}, "step_protection"),
        (protected, {"density": 0.2}, "density"),
    ):
        with raises(ValueError, words):
            apply_settings(pipeline, settings)

"""What a checkpoint says of its generation, after plain `from_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn

from reelquant.attention.sparse_spec import SparseAttentionSpec
from reelquant.checkpoint.inference_specs import VelocityCorrection
from reelquant.checkpoint.verify import verify_checkpoint
from reelquant.checkpoint.writer import write_checkpoint
from reelquant.quantization.input_transform import least_activation_bits
from reelquant.settings.attention import Residual
from reelquant.settings.generation import StepProtection
from tests.errors import raises

BLOCKS = ("transformer_blocks.0", "single_transformer_blocks.0")
SPARSE = SparseAttentionSpec(
    density=0.5, head_kinds={BLOCKS[0]: "st", BLOCKS[1]: "ts"}, interval=3, residual=Residual(rank=4)
)
CORRECTION = VelocityCorrection((900.0, 500.0), ((1.0, 2.0, 1.0, 0.5), (2.0, 1.0, 1.0, 1.0)), ((0.0,) * 4, (1.0,) * 4))
TIMES = (900.0, 700.0, 500.0, 100.0)


def checkpoint_with(source: Path, artifacts: list[Path], folder: Path, **parts: Any) -> Path:
    output = folder / "checkpoint"
    write_checkpoint(source, output, artifacts=artifacts, bits="W4A6", method="test", **parts)
    return output


def load(checkpoint: Path) -> Any:
    return HunyuanVideoTransformer3DModel.from_pretrained(checkpoint / "transformer", torch_dtype=torch.float32)


@torch.no_grad()
def outputs(model: nn.Module, times: tuple[float, ...] = TIMES) -> list[Tensor]:
    """One generation's outputs on fixed latents: four steps."""
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 3, 5, generator=generator),
        "encoder_hidden_states": torch.randn(1, 7, 16, generator=generator),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0]]),
        "pooled_projections": torch.randn(1, 8, generator=generator),
        "guidance": torch.tensor([6000.0]),
        "return_dict": False,
    }
    return [model(timestep=torch.tensor([time]), **inputs)[0] for time in times]


def test_everything_survives_saving_and_loading(tiny_source: Path, tiny_artifacts: list[Path], tmp_path: Path) -> None:
    parts = {
        "sparse_attention": SPARSE,
        "step_protection": StepProtection(0.6, 8),
        "velocity_correction": CORRECTION,
    }
    checkpoint = checkpoint_with(tiny_source, tiny_artifacts, tmp_path, **parts)
    assert verify_checkpoint(checkpoint).problems == []
    model = load(checkpoint)
    first = outputs(model)
    model.save_pretrained(tmp_path / "again" / "transformer")
    again = load(tmp_path / "again")
    for name, part in parts.items():
        assert getattr(again.hf_quantizer.quantization_config.spec, name) == part
    for a, b in zip(first, outputs(again), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_it_runs_sparse_with_no_further_call_and_dense_with_one_line(
    tiny_source: Path, tiny_artifacts: list[Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    dense = outputs(load(tiny_checkpoint))
    model = load(checkpoint_with(tiny_source, tiny_artifacts, tmp_path, sparse_attention=SPARSE))
    sparse = outputs(model)
    far = [float((a - b).norm() / b.norm()) for a, b in zip(sparse, dense, strict=True)]
    assert [error < 1e-5 for error in far] == [True, False, False, True], far
    model.sparse_attention.enabled = False
    for a, b in zip(outputs(model), dense, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5


def test_the_first_steps_have_finer_activations(
    tiny_source: Path, tiny_artifacts: list[Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    protected = load(checkpoint_with(tiny_source, tiny_artifacts, tmp_path, step_protection=StepProtection(0.6, 16)))
    plain = load(tiny_checkpoint)
    coarse = outputs(plain)
    with least_activation_bits(16):
        fine = outputs(plain)
    for step, out in enumerate(outputs(protected)):
        assert torch.equal(out, fine[step] if step < 2 else coarse[step])
        assert not torch.equal(fine[step], coarse[step])
    # The next generation begins protected again.
    assert torch.equal(outputs(protected)[0], fine[0])


def test_the_output_is_corrected_per_channel_and_between_steps(
    tiny_source: Path, tiny_artifacts: list[Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    corrected = outputs(load(checkpoint_with(tiny_source, tiny_artifacts, tmp_path, velocity_correction=CORRECTION)))
    plain = outputs(load(tiny_checkpoint))
    factors = {0: ([1.0, 2.0, 1.0, 0.5], 0.0), 1: ([1.5, 1.5, 1.0, 0.75], 0.5), 2: ([2.0, 1.0, 1.0, 1.0], 1.0)}
    for step in range(4):
        gain, bias = factors[min(step, 2)]
        expected = plain[step] * torch.tensor(gain).view(1, 4, 1, 1, 1) + bias
        assert torch.allclose(corrected[step], expected, rtol=1e-5, atol=1e-6)


def test_parts_that_do_not_fit_the_model_are_refused_while_loading(
    tiny_source: Path, tiny_artifacts: list[Path], tmp_path: Path
) -> None:
    other = SparseAttentionSpec(density=0.5, head_kinds={BLOCKS[0]: "stt"}, residual=Residual(rank=13))
    checkpoint = checkpoint_with(tiny_source, tiny_artifacts, tmp_path, sparse_attention=other)
    with raises(ValueError, "residual.rank", 13, 12, "single_transformer_blocks.0", "transformer_blocks.0", 3, 2):
        load(checkpoint)

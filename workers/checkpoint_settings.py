"""Settings of a checkpoint that an evaluation changes between its generations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from reelquant.runtime.sparse_attention import SparseAttention
from reelquant.runtime.step_protection import ProtectedSteps
from workers.velocity_watch import transformers


def apply_settings(pipeline: Any, settings: Mapping[str, Any]) -> None:
    """Gives the checkpoint in `pipeline` these settings, and all others as it was loaded; none for the checkpoint as it is.

    Args:
        pipeline: a checkpoint's, as it was loaded or with other settings applied.
        settings: arguments of `SparseAttention.configure`; of a checkpoint with dense attention `step_protection` alone.

    Raises:
        ValueError: a setting is unknown, impossible, or of something that the checkpoint does not have.
    """
    for transformer in transformers(pipeline):
        _apply(transformer, settings)


def _apply(transformer: nn.Module, settings: Mapping[str, Any]) -> None:
    sparse, protection = (getattr(transformer, name, None) for name in ("sparse_attention", "step_protection"))
    if isinstance(sparse, SparseAttention):
        sparse.restore()
        sparse.configure(**settings)
        return
    others = sorted(set(settings) - {"step_protection"})
    if others:
        raise ValueError(f"the checkpoint's attention is dense, so that it has no {', '.join(others)} to change")
    if isinstance(protection, ProtectedSteps):
        protection.enabled = settings.get("step_protection") is not False
    elif settings.get("step_protection") is not None:
        raise ValueError("step_protection is given, but the checkpoint has no protected steps")

"""What the calibration stages found: candidates' scores and choice, and every block's losses and layer errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.report.run_data import RunData
from reelquant.calibration.salience import minmax
from reelquant.checkpoint.reader import SECOND_TRANSFORMER, TRANSFORMER

ScoreMap = NDArray[np.float64]
"""`[prompts, steps]`, 0 to 1."""


@dataclass(frozen=True)
class Salience:
    """Scores of all candidates, each min-max normalized over the whole pool, as the selection does it."""

    strategy: str
    feature: str
    """The quantization salience that the product uses."""
    prompts: tuple[str, ...]
    maps: Mapping[str, ScoreMap]
    """`diffusion` and `feature`, whose product counts, then the other quantization features."""
    constant: tuple[str, ...]
    """Maps whose raw scores are all equal: they decide nothing."""
    chosen: tuple[tuple[int, int], ...]
    """(prompt, step), best first where the strategy is `salience`."""

    @property
    def product(self) -> ScoreMap:
        """The score that the strategy `salience` ranks by."""
        scores: ScoreMap = self.maps["diffusion"] * self.maps[self.feature]
        return scores


@dataclass(frozen=True)
class CalibratedBlock:
    """One block of one method."""

    name: str
    losses: tuple[float, ...]
    """Mean of every epoch; estimates where steps see a part of the tokens."""
    loss_before: float | None
    loss_after: float | None
    layer_sqnr_db: Mapping[str, float]
    fell_back: str | None
    """Why it was rounded without learning."""


@dataclass(frozen=True)
class RepairedBlock:
    """One block of a method's drift repair; errors are relative, of the stream after the block, on held-back samples."""

    name: str
    without: float
    """With no block repaired."""
    after: float
    """With this block and those before it repaired, as far as that helped."""
    accepted: bool


@dataclass(frozen=True)
class Refined:
    """What was fitted on a method's whole model."""

    blocks: tuple[RepairedBlock, ...]
    """In model order; empty without drift repair."""
    velocity: Mapping[str, Any] | None
    """`RefinementWorker`'s account of the velocity correction."""
    residual: Mapping[str, Any] | None = None
    """`RefinementWorker`'s account of the residual; None where it was not measured."""


def read_salience(run: RunData) -> Salience | None:
    """None before the selection."""
    record = run.record("selection", "selection")
    if record is None:
        return None
    result = record.result
    names = [prompt["name"] for prompt in result["prompts"]]
    feature = result["quantization_feature"]
    order = sorted(result["scores"], key=lambda name: (name != "diffusion", name != feature, name))
    raw = {name: torch.tensor(result["scores"][name], dtype=torch.float64) for name in order}
    return Salience(
        result["strategy"],
        feature,
        tuple(prompt["prompt"] for prompt in result["prompts"]),
        {name: minmax(scores).double().numpy() for name, scores in raw.items()},
        tuple(name for name, scores in raw.items() if bool((scores == scores.flatten()[0]).all())),
        tuple((names.index(chosen["prompt"]), chosen["step"]) for chosen in result["chosen"]),
    )


def read_blocks(run: RunData) -> dict[str, tuple[CalibratedBlock, ...]]:
    """Blocks in model order, by method, those of a second transformer behind its component's name; a method without any
    calibrated segment has none."""
    found: dict[str, list[CalibratedBlock]] = {name: [] for name in run.method_names}
    for record in run.stages["distillation"].records:
        blocks = record.result["blocks"]
        # JSON objects are stored with sorted keys; the files are listed in the order in which the model runs the blocks.
        written = [PurePosixPath(output.path).name.removesuffix(".safetensors") for output in record.outputs]
        for name in sorted(blocks, key=lambda name: (written.index(name) if name in written else len(written), name)):
            summary = blocks[name]
            role = record.result.get("role", TRANSFORMER)
            found[record.result["method"]].append(
                CalibratedBlock(
                    name if role == TRANSFORMER else f"{role}.{name}",
                    tuple(summary["losses"]),
                    summary["loss_before"],
                    summary["loss_after"],
                    summary["layer_sqnr_db"],
                    summary["fell_back"],
                )
            )
    return {name: tuple(blocks) for name, blocks in found.items()}


def read_refined(run: RunData) -> dict[str, Refined]:
    """By unit: the method, and the component of a second transformer; what is not yet refined is not there."""
    found = {}
    for record in run.stages["refinement"].records:
        drift = record.result["drift"]
        # JSON objects are stored with sorted keys.
        order = sorted(drift, key=lambda name: (name.startswith("single"), _natural(name)))
        blocks = tuple(
            RepairedBlock(
                name,
                drift[name]["without"],
                drift[name]["after" if drift[name]["accepted"] else "before"],
                drift[name]["accepted"],
            )
            for name in order
        )
        found[record.unit] = Refined(blocks, record.result["velocity"], record.result.get("residual"))
    return found


def layer_kinds(blocks: tuple[CalibratedBlock, ...]) -> list[str]:
    """Names of the layers inside the blocks, those of the first blocks first, in natural order."""
    kinds: dict[str, None] = {}
    for block in blocks:
        kinds.update(dict.fromkeys(sorted(block.layer_sqnr_db, key=_natural)))
    return list(kinds)


def sqnr_map(blocks: tuple[CalibratedBlock, ...], kinds: list[str]) -> NDArray[np.float64]:
    """`[kinds, blocks]` in dB; NaN where a block has no such layer."""
    rows = [[block.layer_sqnr_db.get(kind, np.nan) for block in blocks] for kind in kinds]
    return np.array(rows, dtype=np.float64).reshape(len(kinds), len(blocks))


def short_name(block: str) -> str:
    """`single_transformer_blocks.12` -> `S12`, `transformer_2.blocks.3` -> `2/3`; others keep the last part alone."""
    family, _, index = block.rpartition(".")
    if family.startswith(f"{SECOND_TRANSFORMER}."):
        return f"2/{index}"
    return f"S{index}" if family.startswith("single") else index


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]

"""Heads whose kind is known by construction."""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.attention.head_kind import band_errors, kinds_of, sampled_rows
from reelquant.ops.token_order import place_major_positions
from reelquant.tokens import TokenLayout

LAYOUT = TokenLayout(7, 5, 9, 6)


def head_that_looks_at(positions: Tensor, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `[L, D]` of a head whose attention falls with the distance in `positions` `[num_video]`."""
    generator = torch.Generator().manual_seed(seed)
    length, angle = LAYOUT.num_tokens, torch.zeros(LAYOUT.num_tokens)
    angle[: LAYOUT.num_video] = positions * (torch.pi / LAYOUT.num_video)
    features = 30 * torch.stack([angle.cos(), angle.sin()], dim=1)
    features = torch.cat([features, torch.randn(length, 14, generator=generator) * 0.1], dim=1)
    return features, features, torch.randn(length, 16, generator=generator)


def test_constructed_heads_are_told_apart() -> None:
    frame_major = torch.arange(LAYOUT.num_video).float()
    place_major = place_major_positions(LAYOUT).float()
    heads = [head_that_looks_at(p, seed=i) for i, p in enumerate([frame_major, place_major, place_major, frame_major])]
    q, k, v = (torch.stack(parts) for parts in zip(*heads, strict=True))
    errors = band_errors(q, k, v, layout=LAYOUT, width=25, rows=sampled_rows(LAYOUT))
    assert kinds_of(errors) == "stts"
    assert float(errors.min(dim=1).values.max()) < 0.2 * float(errors.max(dim=1).values.min())


def test_errors_are_those_of_the_sampled_rows() -> None:
    from tests.reelquant.ops.test_band_attention import brute_force, qkv, whole_mask

    q, k, v = qkv(LAYOUT, 3, 16, seed=4)
    rows = sampled_rows(LAYOUT, 20)
    errors = band_errors(q, k, v, layout=LAYOUT, width=30, rows=rows)
    full = (q @ k.transpose(1, 2) / 4).softmax(2) @ v
    for column, kind in enumerate("st"):
        banded = brute_force(q, k, v, kinds=kind * 3, layout=LAYOUT, width=30)
        expected = (banded - full)[:, rows].square().sum((1, 2)) / full[:, rows].square().sum((1, 2))
        assert torch.allclose(errors[:, column].double(), expected, rtol=1e-5)
    assert whole_mask(LAYOUT, 30, "s").sum() == whole_mask(LAYOUT, 30, "t").sum()


def test_rows_are_spread_over_the_whole_sequence() -> None:
    rows = sampled_rows(TokenLayout(16, 45, 80, 20), 64)
    frames = rows // (45 * 80)
    assert len(rows) == 64
    assert sorted(set(frames.tolist())) == list(range(16))
    assert sampled_rows(TokenLayout(1, 2, 3, 5), 64).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_band_that_holds_everything_has_no_error_and_is_called_spatial() -> None:
    from tests.reelquant.ops.test_band_attention import qkv

    q, k, v = qkv(LAYOUT, 2, 16)
    errors = band_errors(q, k, v, layout=LAYOUT, width=LAYOUT.num_video, rows=sampled_rows(LAYOUT))
    assert float(errors.abs().max()) == 0
    assert kinds_of(errors) == "ss"

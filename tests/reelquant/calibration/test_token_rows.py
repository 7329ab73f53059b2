"""Which tokens a step sees: without repetition, all equally often, the same for a seed; what they estimate is unbiased."""

import pytest
import torch

from reelquant.calibration.token_rows import TokenRows, token_rows
from reelquant.tokens import TokenLayout

LAYOUT = TokenLayout(3, 5, 7, 4)


def drawn(fraction: float, seed: int, layout: TokenLayout = LAYOUT) -> TokenRows:
    rows = token_rows(layout, fraction, seed=seed)
    assert rows is not None
    return rows


@pytest.mark.parametrize("fraction", [1e-6, 0.1, 0.25, 0.5, 0.7, 0.99])
def test_every_token_is_drawn_once_at_most_and_stands_for_a_stratum(fraction: float) -> None:
    num = max(1, round(fraction * LAYOUT.num_video))
    for seed in range(20):
        rows = drawn(fraction, seed)
        indices, video = rows.indices, rows.indices[: -LAYOUT.num_text]
        assert indices.dtype == torch.int64
        assert len(video) == num
        assert bool((indices.diff() > 0).all()), "ascending, without repetition"
        assert int(indices[0]) >= 0
        assert indices[-LAYOUT.num_text :].tolist() == list(range(LAYOUT.num_video, LAYOUT.num_tokens))
        assert rows.counts[-LAYOUT.num_text :].tolist() == [1.0] * LAYOUT.num_text
        assert float(rows.counts.sum()) == rows.num_tokens == LAYOUT.num_tokens
        assert float(rows.counts[:num].max() - rows.counts[:num].min()) <= 1
        gap = LAYOUT.num_video / num
        assert float(video.diff().max() if num > 1 else 0) < 2 * gap + 1, "scattered: no run of strata is left out"


def test_all_tokens_need_no_drawing() -> None:
    assert token_rows(LAYOUT, 1.0, seed=0) is None
    assert token_rows(LAYOUT, 1 - 1e-4, seed=0) is None, "a share that rounds to all"
    assert token_rows(TokenLayout(1, 1, 1, 3), 0.5, seed=0) is None, "one video token at least"


def test_the_seed_alone_decides() -> None:
    first, again, other = (drawn(0.25, seed) for seed in (7, 7, 8))
    assert torch.equal(first.indices, again.indices)
    assert torch.equal(first.counts, again.counts)
    assert not torch.equal(first.indices, other.indices)
    with torch.device("meta"):
        assert torch.equal(drawn(0.25, 7).indices, first.indices), "drawn on the CPU wherever tensors go"
    assert len(drawn(0.25, 2**63 + 14).indices) == len(first.indices)


@pytest.mark.parametrize("fraction", [0.25, 0.7])
def test_each_video_token_is_as_likely_as_any_other(fraction: float) -> None:
    """105 tokens in strata of different sizes; 4000 draws: binomial errors, five of them at most (measured: 3.1)."""
    times, num = 4000, round(fraction * LAYOUT.num_video)
    seen = torch.zeros(LAYOUT.num_tokens)
    for seed in range(times):
        seen[drawn(fraction, seed).indices] += 1
    share = num / LAYOUT.num_video
    deviation = (seen[: LAYOUT.num_video] / times - share) / (share * (1 - share) / times) ** 0.5
    assert float(deviation.abs().max()) < 5
    assert bool((seen[LAYOUT.num_video :] == times).all())


@pytest.mark.parametrize("fraction", [0.25, 0.7])
def test_the_mean_is_estimated_without_bias(fraction: float) -> None:
    """Values that grow along the stream, and text tokens unlike the video's (the worst for a plain mean of what is drawn)."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(LAYOUT.num_tokens, generator=generator) + torch.arange(LAYOUT.num_tokens) / 20
    values[LAYOUT.num_video :] += 50
    found = []
    for seed in range(2000):
        rows = drawn(fraction, seed)
        found.append(rows.mean(values[rows.indices]))
    estimates = torch.stack(found).double()
    error = (estimates.mean() - values.double().mean()) / (estimates.std() / len(estimates) ** 0.5)
    assert abs(float(error)) < 4  # 0.3 and 0.6
    plain = torch.stack([values[drawn(fraction, seed).indices].mean() for seed in range(50)]).mean()
    assert abs(float(plain - values.mean())) > 0.5, "without what each stands for it would be"


def test_strata_leave_less_variance_than_tokens_drawn_anywhere() -> None:
    layout = TokenLayout(4, 10, 20, 3)
    position = torch.arange(layout.num_tokens) / 40
    values = 2 + torch.sin(position) + 0.1 * torch.rand(layout.num_tokens, generator=torch.Generator().manual_seed(0))
    ours, anywhere = [], []
    for seed in range(300):
        rows = drawn(0.25, seed, layout)
        ours.append(rows.mean(values[rows.indices]))
        order = torch.randperm(layout.num_video, generator=torch.Generator().manual_seed(seed))
        anywhere.append(values[order[: layout.num_video // 4]].mean())
    assert float(torch.stack(ours).std()) < 0.2 * float(torch.stack(anywhere).std())  # 0.05

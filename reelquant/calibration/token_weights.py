"""How much every token counts in the distillation loss (attention-guided sparse token distillation, S2Q-VDiT 3.3)."""

from __future__ import annotations

from torch import Tensor

from reelquant.calibration.salience import minmax


def token_weights(column_sums: Tensor, lambda_min: float = 0.5, lambda_max: float = 1.0) -> Tensor:
    """`(S - min S) / (max S - min S) * (lambda_max - lambda_min) + lambda_min`.

    Args:
        column_sums: [L] floating, the attention every token receives (`attention.column_sums`).
        lambda_min, lambda_max: weights of the least and of the most attended token, 0 <= lambda_min <= lambda_max.

    Returns: float32 [L] in lambda_min..lambda_max; all lambda_max where every token receives the same.
    Raises: ValueError for other shapes, NaN or inf, or lambdas out of order.
    """
    if column_sums.ndim != 1:
        raise ValueError(f"column_sums must be [L], got {tuple(column_sums.shape)}")
    if not 0.0 <= lambda_min <= lambda_max < float("inf"):
        raise ValueError(f"needs 0 <= lambda_min <= lambda_max, got {lambda_min!r} and {lambda_max!r}")
    return (minmax(column_sums) * (lambda_max - lambda_min) + lambda_min).clamp_(lambda_min, lambda_max)

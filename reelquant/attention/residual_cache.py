"""What the sparse attention of a step misses, from the steps at which both were computed (SSAR, QuantSparse §3.3).

    refresh at r:   D = dense - sparse          change = D - D of the refresh before
    step t > r:     dense is about sparse + gain(t - r) D + P_k(change)

`P_k` projects every head on its top k right singular directions. One cache belongs to one attention layer and one generation.

| storage | order 1 keeps | order 2 keeps |
|---|---|---|
| `full` | D | D, and the change (in factors of rank k; whole without a rank) |
| `low_rank` | factors of D | factors of D and of the change |
| `low_rank_int8` | the same, their rows in 8 bits with a scale for 128 tokens of a head and direction | the same |

There are two readings of the change (QuantSparse's equation 14 and Fig. 2; its Proposition 3.3 and appendix G):

| `extrapolation` | change | times, at step t |
|---|---|---|
| `constant` | D less that of the refresh before, r' | 1 |
| `linear` | the same | `(t - r) / (r - r')` |
| `adjacent` | D less that of step r - 1, if that was a refresh; otherwise none | 1 |

With factors the change is taken against what was kept of the refresh before, so it holds what that truncation lost too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from reelquant.ops.band_attention.reference import SCALED_TOKENS, Correction, decoded
from reelquant.ops.residual_factorization.op import Factors, factorize, factorize_refresh
from reelquant.ops.residual_factorization.reference import head_groups
from reelquant.settings.attention import Residual

_LARGEST_CODE = 127
_TINY = 1e-30


@dataclass(frozen=True)
class _Term:
    """A residual of every head: whole `[H, L, D]`, or `rows @ directions^T`."""

    rows: Tensor
    """[H, L, k] or, whole, [H, L, D]; in the dtype of the attention, or int8 codes."""
    directions: Tensor | None = None
    """[H, D, k], float32 or wider: it is small. Times the largest scale of the codes, where rows are codes."""
    row_scale: Tensor | None = None
    """[H, ceil(L / 128), k] bfloat16, at most 1: scales of the codes, beside the largest of a head and direction."""

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.rows, self.directions, self.row_scale) if x is not None)

    def decoded(self, heads: slice, dtype: torch.dtype) -> Tensor:
        """The rows of these heads in `dtype`."""
        return decoded(self.rows[heads], None if self.row_scale is None else self.row_scale[heads], dtype)

    def added_to(self, x: Tensor, heads: slice, scale: float = 1.0) -> Tensor:
        """`x + scale * term` for `x` [h, L, D] of these heads, in the dtype of `x`."""
        rows = self.decoded(heads, x.dtype)
        if self.directions is None:
            return torch.add(x, rows, alpha=scale)
        return torch.baddbmm(x, rows, self.directions[heads].to(x.dtype).transpose(1, 2), alpha=scale)


@dataclass(frozen=True)
class _Kept:
    """All that stays of a refresh."""

    step: int
    shape: torch.Size
    residual: _Term
    change: _Term | None = None
    interval: int = 1
    """Steps between this refresh and the one before."""


class ResidualCache:
    """Corrects sparse attention by what it missed when both were computed.

    Args:
        order: 0 nothing, 1 `sparse + D`, 2 `sparse + D + P_k(change)`; order 2 is order 1 until the second refresh.
        rank: k, at most the head size; None for no projection.
        extrapolation: `constant`, `linear` or `adjacent`, see above; of order 2.
        storage: `full` keeps D whole and projects the change alone, as the paper's formula does; `low_rank` keeps every
            term in factors of rank k, as the paper's memory does: `H L k` numbers a term, not `H L D`; `low_rank_int8` in
            bytes, not in numbers of the attention's dtype.
        gain: of order 1: factors on D at lags 1, 2, ... after the refresh, the last one at all later lags; None for 1.

    Raises: ValueError for other values, or factors without a rank.
    """

    def __init__(
        self,
        order: int,
        rank: int | None,
        extrapolation: str,
        *,
        storage: str = "full",
        gain: Sequence[float] | None = None,
    ) -> None:
        given: dict[str, Any] = {"order": order, "extrapolation": extrapolation, "storage": storage}
        self._spec = Residual(**given, rank=rank, gain=None if gain is None else tuple(gain))
        _raise_problems(self._spec.problems())
        self._kept: _Kept | None = None

    @property
    def nbytes(self) -> int:
        """Bytes kept between steps."""
        if self._kept is None:
            return 0
        return self._kept.residual.nbytes + (0 if self._kept.change is None else self._kept.change.nbytes)

    @torch.no_grad()
    def refresh(self, step: int, dense: Tensor, sparse: Tensor) -> None:
        """Keeps what `sparse` misses of `dense`; with order 0, nothing. What was kept stays as it was if this raises.

        Args:
            step: of the generation, above that of the refresh before.
            dense, sparse: [H, L, D] floating, the layer's attention both ways; differences in float32 or wider.

        Raises: ValueError for other shapes or steps, a rank above the head size, NaN or inf.
        """
        self._check_refresh(step, dense, sparse)
        if self._spec.order == 0:
            return
        before = self._kept
        terms = self._full_terms if self._spec.storage == "full" else self._low_rank_terms
        residual, change = terms(step, dense, sparse)
        self._kept = _Kept(step, sparse.shape, residual, change, 1 if before is None else step - before.step)

    def correct(self, step: int, sparse: Tensor) -> Tensor:
        """`sparse` with what the last refreshes found missing; float32 or wider inside. Differentiable in `sparse`.

        Args:
            step: of the generation, not before the last refresh.
            sparse: [H, L, D] floating, of the shape that was refreshed.

        Returns: [H, L, D] in the dtype of `sparse`; with order 0, `sparse` itself.
        Raises: ValueError before any refresh (order 1 and 2), for another shape or an earlier step.
        """
        kept = self._checked_kept(step, sparse)
        if kept is None:
            return sparse
        scale = self._change_scale(kept, step)
        corrected = torch.empty_like(sparse, memory_format=torch.contiguous_format)
        for heads in head_groups(sparse):
            wide = sparse[heads].to(torch.promote_types(sparse.dtype, torch.float32))
            wide = kept.residual.added_to(wide, heads, self._spec.gain_at(step - kept.step))
            if kept.change is not None and scale != 0:
                wide = kept.change.added_to(wide, heads, scale)
            corrected[heads] = wide
        return corrected

    def corrections(self, step: int, sparse: Tensor) -> tuple[Correction, ...] | None:
        """What `correct` adds at `step`, for an attention that adds it itself; None where a term is kept whole.

        Args, Raises: as `correct`; of `sparse` only shape and dtype are read (the queries will do).
        """
        kept = self._checked_kept(step, sparse)
        if kept is None:
            return ()
        scaled = [(kept.residual, self._spec.gain_at(step - kept.step))]
        if kept.change is not None:
            scaled.append((kept.change, self._change_scale(kept, step)))
        found = []
        for term, scale in scaled:
            if term.directions is None:
                return None
            found.append(Correction(term.rows, term.directions, scale, term.row_scale))
        return tuple(found)

    def _change_scale(self, kept: _Kept, step: int) -> float:
        return (step - kept.step) / kept.interval if self._spec.extrapolation == "linear" else 1.0

    def _compared(self, step: int) -> _Kept | None:
        """The refresh to which that of `step` is compared; None where it has no change."""
        kept = self._kept
        if self._spec.order < 2 or kept is None:
            return None
        return kept if self._spec.extrapolation != "adjacent" or step == kept.step + 1 else None

    def _checked_kept(self, step: int, sparse: Tensor) -> _Kept | None:
        """What the last refresh left for `step`; None where nothing is to be added at all."""
        if self._spec.order == 0:
            return None
        kept = self._kept
        if kept is None:
            raise ValueError(f"step {step}: nothing to correct with before the first refresh; refresh, or use order 0")
        if sparse.shape != kept.shape or not sparse.is_floating_point():
            raise ValueError(
                f"step {step}: sparse is {sparse.dtype} {tuple(sparse.shape)}, the cache was refreshed with "
                f"{tuple(kept.shape)} at step {kept.step}; refresh, or use one cache a layer and generation"
            )
        if step < kept.step:
            raise ValueError(f"step {step} is before the last refresh at step {kept.step}; use a new cache")
        return kept

    def _low_rank_terms(self, step: int, dense: Tensor, sparse: Tensor) -> tuple[_Term, _Term | None]:
        assert self._spec.rank is not None
        before, compared = None, self._compared(step)
        if compared is not None:
            term = compared.residual
            assert term.directions is not None
            before = Factors(term.decoded(slice(None), sparse.dtype), term.directions)
        found = factorize_refresh(dense, sparse, self._spec.rank, before=before)
        if not bool(found[0].directions.isfinite().all()):
            _raise_not_finite(step, dense, sparse)
        term_of = _coded if self._spec.storage == "low_rank_int8" else _Term
        return term_of(*found[0]), None if found[1] is None else term_of(*found[1])

    def _full_terms(self, step: int, dense: Tensor, sparse: Tensor) -> tuple[_Term, _Term | None]:
        """The residual whole, and its change whole or in factors."""
        before = self._compared(step)
        finite = torch.ones((), dtype=torch.bool, device=sparse.device)
        wide = torch.promote_types(sparse.dtype, torch.float32)
        residuals, changes = [], []
        for heads in head_groups(sparse):
            residual = dense[heads].to(wide) - sparse[heads].to(wide)
            finite &= torch.stack(residual.aminmax()).isfinite().all()
            residuals.append(_Term(residual.to(sparse.dtype)))
            if before is not None:
                changes.append(self._change(before.residual.added_to(residual, heads, scale=-1.0), sparse.dtype))
        if not bool(finite):
            _raise_not_finite(step, dense, sparse)
        return _joined(residuals), _joined(changes) if changes else None

    def _change(self, change: Tensor, dtype: torch.dtype) -> _Term:
        if self._spec.rank is None:
            return _Term(change.to(dtype))
        rows, directions = factorize(change, self._spec.rank)
        return _Term(rows.to(dtype), directions)

    def _check_refresh(self, step: int, dense: Tensor, sparse: Tensor) -> None:
        if dense.ndim != 3 or dense.shape != sparse.shape or dense.numel() == 0:
            raise ValueError(
                f"refresh at step {step}: dense and sparse must both be [H, L, D], "
                f"got {tuple(dense.shape)} and {tuple(sparse.shape)}"
            )
        if not (dense.is_floating_point() and sparse.is_floating_point()):
            raise ValueError(f"refresh at step {step}: needs floating tensors, got {dense.dtype} and {sparse.dtype}")
        _raise_problems(self._spec.problems(sparse.shape[2]))
        kept = self._kept
        if kept is None:
            return
        if step <= kept.step:
            raise ValueError(f"refresh at step {step}, but the last one was at step {kept.step}; use a new cache")
        if sparse.shape != kept.shape:
            raise ValueError(
                f"refresh at step {step} with {tuple(sparse.shape)}, but the one at step {kept.step} had "
                f"{tuple(kept.shape)}; use one cache a layer and generation"
            )


def _coded(rows: Tensor, directions: Tensor) -> _Term:
    """The term with rows as int8 codes, symmetric, a scale for 128 tokens of every head and direction."""
    length = rows.shape[1]
    groups = pad(rows, (0, 0, 0, -length % SCALED_TOKENS)).unflatten(1, (-1, SCALED_TOKENS))
    largest = groups.abs().amax(dim=2).to(directions.dtype)
    scale = (largest.amax(dim=1, keepdim=True) / _LARGEST_CODE).clamp_min(_TINY)
    relative = (largest / (_LARGEST_CODE * scale)).clamp_min(_TINY).to(torch.bfloat16)
    steps = (relative.to(directions.dtype) * scale).unsqueeze(2)
    codes = (groups.to(directions.dtype) / steps).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8)
    return _Term(codes.flatten(1, 2)[:, :length].contiguous(), directions * scale, relative)


def _joined(terms: list[_Term]) -> _Term:
    if len(terms) == 1:
        return terms[0]
    directions = [term.directions for term in terms if term.directions is not None]
    return _Term(torch.cat([term.rows for term in terms]), torch.cat(directions) if directions else None)


def _raise_problems(problems: list[str]) -> None:
    if problems:
        raise ValueError("residual cache: " + "; ".join(problems))


def _raise_not_finite(step: int, dense: Tensor, sparse: Tensor) -> None:
    for name, tensor in (("dense", dense), ("sparse", sparse)):
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise ValueError(f"refresh at step {step}: {name} holds {bad} NaN or infinite values of {tensor.numel()}")
    raise ValueError(
        f"refresh at step {step}: dense - sparse overflows {torch.promote_types(sparse.dtype, torch.float32)}"
    )

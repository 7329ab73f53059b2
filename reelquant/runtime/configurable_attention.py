"""The settings of a loaded transformer's sparse attention: what its checkpoint says, and what its user changes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, Unpack

from reelquant.attention.sparse_spec import SparseAttentionSpec
from reelquant.families.family import Family, family_of_architecture
from reelquant.noise_schedule import USUAL_STEPS, Schedule, shifted_levels
from reelquant.ops.band_attention.op import Implementation, Precision
from reelquant.runtime.generation import GenerationTracker
from reelquant.runtime.knobs import AttentionKnobs, changed


@dataclass
class Visited:
    """Pairs (query, key) of the attention maps since `SparseAttention.visited` was last set anew."""

    pairs: int = 0
    of: int = 0

    def add(self, pairs: int, of: int) -> None:
        """Counts `pairs` of a map's `of`."""
        self.pairs += pairs
        self.of += of

    def __add__(self, other: Visited) -> Visited:
        return Visited(self.pairs + other.pairs, self.of + other.of)

    @property
    def density(self) -> float:
        """Share of the maps that was visited; a refresh counts as dense, not more. NaN before any pass."""
        return self.pairs / self.of if self.of else float("nan")


@dataclass(frozen=True)
class AttentionPrecision:
    """In which precision attention runs (`ops/eight_bit_attention/op.py`); `full` is that of its tensors, the default.

    The residual of a refresh is what its sparse side misses of its dense side: with a sparse side in 8 bits it also holds
    that rounding, as far as its rank goes. With both sides in the same 8 bits, one pass over one quantization makes both.
    """

    sparse: Precision = "full"
    """Of the sparse steps, and of the sparse side of a refresh."""
    dense: Precision = "full"
    """Of all that is dense: refreshes, first steps, dense blocks, every step of a transformer that is not `enabled`."""


class Switch(Protocol):
    """A part of a loaded transformer that can be turned off (`runtime.step_protection.ProtectedSteps`)."""

    enabled: bool


class ConfigurableAttention:
    """The settings of a transformer's sparse attention.

    Attributes:
        spec: what the checkpoint says, as far as `configure` has not changed it.
        enabled: whether attention runs sparse; change it between generations.
        implementation: of `band_attention`.
        precision: of the products, at first the checkpoint's; change it between generations. On CUDA without the kernels
            for 8 bits (before Hopper) attention runs in full precision, which is faster there, and says so once.
        visited: counts the pairs that ran, for the effective density.
    """

    def __init__(
        self,
        spec: SparseAttentionSpec,
        *,
        architecture: str,
        config: Mapping[str, Any],
        schedule: Schedule = shifted_levels,
        num_steps: int = USUAL_STEPS,
        tracker: GenerationTracker | None = None,
        protection: Switch | None = None,
        stored: Any = None,
    ) -> None:
        """
        Args:
            schedule, num_steps: noise levels of a generation by its number of steps, and the number of steps that
                `configure` counts in where it is given none.
            tracker: of the generations whose states `configure` forgets.
            protection: of the transformer's first steps.
            stored: what is saved of the transformer; its `spec`, a `QuantizationSpec`, follows `configure`.
        """
        self.spec = self._as_loaded = spec
        self.enabled = True
        self.implementation: Implementation = "auto"
        self.precision = AttentionPrecision(sparse=spec.precision, dense=spec.precision)
        self.visited = Visited()
        self._architecture, self._config = architecture, config
        self._schedule, self._num_steps = schedule, num_steps
        self._tracker, self._protection, self._stored = tracker, protection, stored
        self._too_small: set[tuple[float, tuple[int, ...]]] = set()
        """Densities and shapes of latents for which it was said that attention runs dense."""

    def __repr__(self) -> str:
        spec = {**self.spec.to_dict(), "precision": self.precision.sparse}
        kinds = {kind for letters in spec.pop("head_kinds").values() for kind in letters}
        shown = ", ".join(f"{key}={value!r}" for key, value in {"enabled": self.enabled, **spec}.items())
        return (
            f"{type(self).__name__}({shown}, head_kinds={'online' if self.spec.online else ''.join(sorted(kinds))!r})"
        )

    def configure(
        self,
        *,
        num_steps: int | None = None,
        enabled: bool | None = None,
        step_protection: bool | None = None,
        **knobs: Unpack[AttentionKnobs],
    ) -> None:
        """Changes settings between generations: one calibration serves them all. Generations under way begin anew, and
        `visited` does. `save_pretrained` stores what was changed, but for `enabled`.

        Example: `configure(density=0.25, dense_steps=5, interval=5, residual={"order": 1}, precision="int8_fp8")`.

        Args:
            num_steps: steps of the generation in which `dense_steps` and `refresh_steps` count; None for the calibration's.
                They are stored as noise levels, so that other generations have the same part dense.
            enabled: whether attention runs sparse at all.
            step_protection: whether the checkpoint's protected steps are.
            knobs: `AttentionKnobs`; None keeps one as it is.

        Raises:
            ValueError: names every knob that is unknown or has an impossible value; nothing is changed then.
        """
        spec = changed(self.spec, knobs, schedule=self._schedule, num_steps=num_steps or self._num_steps)
        self._check_model(spec)
        if step_protection is not None and self._protection is None:
            raise ValueError(f"step_protection is {step_protection}, but the checkpoint has no protected steps")
        if step_protection is not None and self._protection is not None:
            self._protection.enabled = step_protection
        self._take(spec, precision=knobs.get("precision"))
        self.enabled = self.enabled if enabled is None else enabled

    def restore(self) -> None:
        """Takes back all that `configure` changed, `enabled` and the protected steps too."""
        if self._protection is not None:
            self._protection.enabled = True
        self._take(self._as_loaded, precision=self._as_loaded.precision)
        self.enabled = True

    def _take(self, spec: SparseAttentionSpec, *, precision: Precision | None) -> None:
        self.spec, self.visited = spec, Visited()
        if precision is not None:
            self.precision = AttentionPrecision(sparse=precision, dense=precision)
        if self._stored is not None:
            self._stored.spec = replace(self._stored.spec, sparse_attention=spec)
        if self._tracker is not None:
            self._tracker.forget_all()

    @property
    def _family(self) -> Family:
        return family_of_architecture(self._architecture)

    def check_model(self) -> None:
        """Whether the stored blocks and heads are the model's.

        Raises:
            ValueError: names every block that is missing, unknown or has another number of heads; or a rank too high.
        """
        self._check_model(self.spec)

    def _check_model(self, spec: SparseAttentionSpec) -> None:
        blocks, (heads, head_dim) = self._family.block_names(self._config), self._family.num_heads(self._config)
        problems = spec.residual.problems(head_dim)
        sparse = [name for name in blocks if name not in spec.dense_blocks]
        if not spec.online:
            problems += [f"head_kinds has no block {name}" for name in sparse if name not in spec.head_kinds]
        problems += [
            f"head_kinds of {name} has {len(kinds)} heads, the model {heads}"
            for name, kinds in spec.head_kinds.items()
            if len(kinds) != heads
        ]
        unknown = sorted((set(spec.head_kinds) | set(spec.dense_blocks)) - set(blocks))
        problems += [f"the model has no block {name}" for name in unknown]
        if problems:
            raise ValueError("sparse_attention does not fit the model: " + "; ".join(problems))

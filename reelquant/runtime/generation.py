"""Which generation a forward pass of the transformer belongs to, and where in its schedule it is.

A pipeline hands the same conditioning tensor (text embeddings) to every step of one generation, and another one to the
unconditional pass of classifier-free guidance. That tensor's identity, within its thread, is the generation's: requests
that share a transformer, both passes of guidance and nested calls each have their own state. A state dies with its tensor or
with its pipeline's call, whether that ended or failed.

The place in the schedule is the noise level, from 1 (noise) to 0 (video). A pass whose level lies above the last one's, or
whose shapes are others, begins a new generation; so does the first step's level when it comes again. Later steps may share
one: pipelines round timesteps to bfloat16, which holds multiples of 4 near 1000.

Compiled code sees none of this: the hooks are not traced, and what reads the current pass does so inside an operation.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reelquant.calibration.block_call import arguments
from reelquant.diffusers_internals import at_end_of_call
from reelquant.tokens import Grid

logger = logging.getLogger(__name__)

MOST_STATES = 8
"""Passes of generations that one transformer remembers: four requests at once under guidance."""

_ARGUMENTS = ("hidden_states", "timestep", "encoder_hidden_states")
Hook = TypeVar("Hook", bound=Callable[..., Any])
_current: ContextVar[GenerationState | None] = ContextVar("current_pass", default=None)


def not_traced(hook: Hook) -> Hook:
    """`hook` as compiled code calls it: at a graph break, eagerly."""
    disabled: Hook = torch.compiler.disable(hook)
    return disabled


@dataclass
class GenerationState:
    """One generation (one pass of it under classifier-free guidance) up to now."""

    step: int
    """Number of the current pass, from 0."""
    timestep: float
    """As the scheduler gives it."""
    noise_level: float
    """In [0, 1], falling."""
    latent_shape: tuple[int, ...]
    """Of the batch."""
    grid: Grid
    """Of the video tokens."""
    identity: tuple[Any, ...]
    """Shapes, dtypes and device that one generation keeps."""
    memory: dict[Any, Any] = field(default_factory=dict)
    """Values that live as long as the generation."""


def current_pass() -> GenerationState:
    """State of the forward pass at work in this thread.

    Raises:
        RuntimeError: no watched transformer is in its forward pass here.
    """
    state = _current.get()
    if state is None:
        raise RuntimeError("outside of a forward pass of the transformer: call the transformer, not a part of it")
    return state


class GenerationTracker:
    """Watches a transformer's forward passes and keeps the states of its generations.

    A copy of a tracker (with its transformer, by `copy.deepcopy` or pickle) begins without states.
    """

    def __init__(
        self, noise_level: Callable[[float], float], grid: Callable[[Mapping[str, Any]], Grid] | None = None
    ) -> None:
        """
        Args:
            noise_level: of a timestep, by the family.
            grid: of the video tokens by the arguments of a transformer's call; None where nobody asks for it.
        """
        self._noise_level, self._grid = noise_level, grid
        self.forget_all()

    def forget_all(self) -> None:
        """Forgets all generations: each begins anew with its next pass."""
        # Last used comes last. Single operations on the dictionary are atomic; iterations are over copies.
        self._states: dict[tuple[int, int], tuple[weakref.ref[Tensor], GenerationState]] = {}
        self._last_begun: float | None = None
        self._restarts = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"_noise_level": self._noise_level, "_grid": self._grid}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._noise_level, self._grid = state["_noise_level"], state["_grid"]
        self.forget_all()

    def begin_passes(self, transformer: nn.Module) -> RemovableHandle:
        """Begins every pass of `transformer` from now on, and ends generations with their pipeline's call."""
        at_end_of_call(transformer, self.end_call)
        return transformer.register_forward_pre_hook(self._before, with_kwargs=True)

    def end_passes(self, transformer: nn.Module) -> RemovableHandle:
        """Ends them; hooks that are registered in between see the current pass."""
        return transformer.register_forward_hook(self._after, always_call=True)

    @not_traced
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = arguments(module, args, kwargs)
        hidden, timestep, conditioning = (bound[name] for name in _ARGUMENTS)
        grid = (0, 0, 0) if self._grid is None else self._grid(bound)
        self.begin(conditioning, float(timestep.max()), hidden, grid)

    @not_traced
    def _after(self, *_: Any) -> None:
        _current.set(None)

    def begin(self, conditioning: Tensor, timestep: float, hidden: Tensor, grid: Grid = (0, 0, 0)) -> GenerationState:
        """Makes the state of a pass with these inputs this thread's current one."""
        level = self._noise_level(timestep)
        identity = (tuple(hidden.shape), grid, tuple(conditioning.shape), hidden.dtype, hidden.device)
        key = (threading.get_ident(), id(conditioning))
        known = self._states.pop(key, None)
        state = known[1] if known is not None and known[0]() is conditioning else None
        again = state is not None and (
            level > state.noise_level or (level == state.noise_level and state.step == 0) or identity != state.identity
        )
        if known is None or state is None or again:
            state = GenerationState(0, timestep, level, tuple(hidden.shape), grid, identity)
            known = (weakref.ref(conditioning, partial(_drop, weakref.ref(self), key)), state)
            self._warn_of_restarts(level)
        else:
            state.step += 1
            state.timestep, state.noise_level = timestep, level
        self._states[key] = known
        self._forget_oldest()
        _current.set(state)
        return state

    def end_call(self) -> None:
        """Forgets the generation whose passes this thread made last, both of them under guidance."""
        thread = threading.get_ident()
        mine = [(key, state) for key, (_, state) in list(self._states.items()) if key[0] == thread]
        for key, state in mine:
            if state.noise_level == mine[-1][1].noise_level:
                self._states.pop(key, None)

    @property
    def num_states(self) -> int:
        """Generations (passes) that are remembered."""
        return len(self._states)

    def _forget_oldest(self) -> None:
        for key in list(self._states)[:-MOST_STATES]:
            self._states.pop(key, None)
            logger.warning(
                "more than %d generations are under way in one transformer: the one that waits longest begins anew with its "
                "next step; let fewer requests share a transformer",
                MOST_STATES,
            )

    def _warn_of_restarts(self, level: float) -> None:
        falling = self._last_begun is not None and level < self._last_begun
        self._restarts = self._restarts + 1 if falling else 0
        self._last_begun = level
        if self._restarts == 3:
            logger.warning(
                "every forward pass begins a new generation, because each is given another conditioning tensor: every step "
                "then refreshes (dense attention). Pass the same encoder_hidden_states object to every step"
            )


def _drop(tracker: weakref.ref[GenerationTracker], key: tuple[int, int], dead: weakref.ref[Tensor]) -> None:
    alive = tracker()
    known = None if alive is None else alive._states.get(key)
    if alive is not None and known is not None and known[0] is dead:
        alive._states.pop(key, None)

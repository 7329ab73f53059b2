"""Which generation a forward pass of the transformer belongs to, and which of its steps it is.

A pipeline hands the same conditioning tensor (text embeddings) to every step of one generation, and another one to the
unconditional pass of classifier-free guidance. That tensor's identity is the generation's: both passes have their own
state, and a state dies with its tensor, whether the generation ended or failed. A pass whose timestep lies before the last
one, or whose shapes are others, begins a new generation; so does the first step's timestep when it comes again. Later steps
may share one: pipelines round timesteps to bfloat16, which holds multiples of 4 near 1000.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_ARGUMENTS = ("hidden_states", "timestep", "encoder_hidden_states")


@dataclass
class GenerationState:
    """One generation (one pass of it under classifier-free guidance) up to now."""

    step: int
    """Of the pass at work, from 0."""
    timestep: float
    """As the scheduler gives it, descending."""
    latent_shape: tuple[int, ...]
    """`[B, C, F, H, W]`."""
    identity: tuple[Any, ...]
    """Shapes, dtypes and device that one generation keeps."""
    memory: dict[Any, Any] = field(default_factory=dict)
    """What others keep for the length of the generation."""


class GenerationTracker:
    """Watches a transformer's forward passes; `current` is the state of the pass at work, None outside of one."""

    def __init__(self) -> None:
        self.current: GenerationState | None = None
        self._states: dict[int, tuple[weakref.ref[Tensor], GenerationState]] = {}
        self._last_begun: float | None = None
        self._restarts = 0
        self._observers: list[Callable[[GenerationState], None]] = []

    def observe(self, observer: Callable[[GenerationState], None]) -> None:
        """Calls `observer` with the state before every forward pass."""
        self._observers.append(observer)

    def attach(self, transformer: nn.Module) -> None:
        """Watches `transformer` from now on."""
        signature = inspect.signature(type(transformer).forward)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = signature.bind_partial(module, *args, **kwargs).arguments
            hidden, timestep, conditioning = (bound[name] for name in _ARGUMENTS)
            self.begin(conditioning, float(timestep.flatten()[0]), hidden)

        def after(*_: Any) -> None:
            self.current = None

        transformer.register_forward_pre_hook(torch.compiler.disable(before), with_kwargs=True)
        transformer.register_forward_hook(torch.compiler.disable(after), always_call=True)

    def begin(self, conditioning: Tensor, timestep: float, hidden: Tensor) -> GenerationState:
        """Makes `current` the state of a pass with these inputs."""
        identity = (tuple(hidden.shape), tuple(conditioning.shape), hidden.dtype, hidden.device)
        key = id(conditioning)
        known = self._states.get(key)
        state = known[1] if known is not None and known[0]() is conditioning else None
        again = state is not None and (timestep > state.timestep or (timestep == state.timestep and state.step == 0))
        if state is None or again or identity != state.identity:
            state = self._new(conditioning, timestep, hidden, identity)
        else:
            state.step += 1
            state.timestep = timestep
        self.current = state
        for observer in self._observers:
            observer(state)
        return state

    def reset(self) -> None:
        """Forgets all generations."""
        self._states.clear()
        self.current = None

    @property
    def num_states(self) -> int:
        """Generations (passes) that are remembered."""
        return len(self._states)

    def _new(self, conditioning: Tensor, timestep: float, hidden: Tensor, identity: tuple[Any, ...]) -> GenerationState:
        # A new generation ends the others; those at their first step are its other pass (classifier-free guidance).
        for other in [other for other, (_, known) in self._states.items() if known.step > 0]:
            del self._states[other]
        key, states = id(conditioning), self._states

        def drop(dead: weakref.ref[Tensor]) -> None:
            if key in states and states[key][0] is dead:
                del states[key]

        state = GenerationState(0, timestep, tuple(hidden.shape), identity)
        states[key] = (weakref.ref(conditioning, drop), state)
        self._warn_of_restarts(timestep)
        return state

    def _warn_of_restarts(self, timestep: float) -> None:
        falling = self._last_begun is not None and timestep < self._last_begun
        self._restarts = self._restarts + 1 if falling else 0
        self._last_begun = timestep
        if self._restarts == 3:
            logger.warning(
                "every forward pass begins a new generation, because each is given another conditioning tensor: all steps "
                "are then first steps (dense attention). Pass the same encoder_hidden_states object to every step"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> GenerationTracker:
        raise TypeError("a sparse or protected transformer cannot be copied; load it again with from_pretrained")

"""Generations are told apart by their conditioning, timesteps and shapes."""

from __future__ import annotations

import gc
import logging

import pytest
import torch

from reelquant.runtime.generation import GenerationTracker

HIDDEN = torch.zeros(1, 4, 2, 6, 8)


def steps_of(tracker: GenerationTracker, conditioning: torch.Tensor, times: list[float]) -> list[int]:
    return [tracker.begin(conditioning, time, HIDDEN).step for time in times]


def test_steps_are_counted_and_a_rising_timestep_begins_anew() -> None:
    tracker, text = GenerationTracker(), torch.zeros(1, 5, 3)
    assert steps_of(tracker, text, [1000.0, 700.0, 300.0]) == [0, 1, 2]
    assert steps_of(tracker, text, [1000.0, 700.0]) == [0, 1]
    # A generation that failed after its first step, and the next one.
    assert steps_of(tracker, text, [1000.0, 1000.0, 700.0]) == [0, 0, 1]


def test_later_steps_may_share_a_timestep_that_was_rounded() -> None:
    """50 steps with shift 7 in bfloat16: steps 1 and 2 are both 996."""
    tracker, text = GenerationTracker(), torch.zeros(1, 5, 3)
    sigmas = torch.linspace(1, 0, 51)[:-1]
    times = (1000 * 7 * sigmas / (1 + 6 * sigmas)).to(torch.bfloat16).tolist()
    assert times[1] == times[2]
    assert steps_of(tracker, text, times) == list(range(50))


def test_memory_is_that_of_one_generation() -> None:
    tracker, text = GenerationTracker(), torch.zeros(1, 5, 3)
    tracker.begin(text, 9.0, HIDDEN).memory["x"] = 1
    assert tracker.begin(text, 8.0, HIDDEN).memory == {"x": 1}
    assert tracker.begin(text, 9.0, HIDDEN).memory == {}


def test_both_passes_of_guidance_have_their_own_state() -> None:
    tracker, positive, negative = GenerationTracker(), torch.zeros(1, 5, 3), torch.zeros(1, 5, 3)
    for _ in range(2):
        for step, time in enumerate([1000.0, 600.0, 200.0]):
            for text in (positive, negative):
                state = tracker.begin(text, time, HIDDEN)
                assert state.step == step
                assert state.memory.setdefault("owner", id(text)) == id(text)
    assert tracker.num_states == 2


def test_a_new_generation_ends_the_others() -> None:
    tracker, first, second = GenerationTracker(), torch.zeros(1, 5, 3), torch.zeros(1, 5, 3)
    steps_of(tracker, first, [3.0, 2.0, 1.0])
    steps_of(tracker, second, [3.0])
    assert tracker.num_states == 1


def test_other_shapes_begin_anew() -> None:
    tracker, text = GenerationTracker(), torch.zeros(1, 5, 3)
    tracker.begin(text, 3.0, HIDDEN)
    assert tracker.begin(text, 2.0, torch.zeros(1, 4, 2, 8, 8)).step == 0


def test_a_state_dies_with_its_conditioning() -> None:
    tracker, text = GenerationTracker(), torch.zeros(1, 5, 3)
    steps_of(tracker, text, [3.0, 2.0])
    del text
    gc.collect()
    assert tracker.num_states == 0
    # A tensor that takes over the place in memory is another generation.
    assert steps_of(tracker, torch.zeros(1, 5, 3), [1.0]) == [0]


def test_says_so_when_the_conditioning_never_stays(caplog: pytest.LogCaptureFixture) -> None:
    tracker = GenerationTracker()
    with caplog.at_level(logging.WARNING):
        for time in (5.0, 4.0, 3.0, 2.0, 1.0):
            assert tracker.begin(torch.zeros(1, 5, 3), time, HIDDEN).step == 0
    assert len([r for r in caplog.records if "Pass the same encoder_hidden_states" in r.message]) == 1

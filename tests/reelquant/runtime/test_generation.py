"""Generations are told apart by their conditioning, their thread, noise levels and shapes."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading

import pytest
import torch

from reelquant.runtime.generation import MOST_STATES, GenerationTracker, current_pass
from tests.errors import raises

HIDDEN = torch.zeros(1, 4, 2, 6, 8)


def level(timestep: float) -> float:
    return timestep / 1000


def ascending(timestep: float) -> float:
    """Of a family whose timesteps rise from 0 (Mochi)."""
    return 1 - timestep / 1000


def new_tracker() -> GenerationTracker:
    return GenerationTracker(level)


def steps_of(tracker: GenerationTracker, conditioning: torch.Tensor, times: list[float]) -> list[int]:
    return [tracker.begin(conditioning, time, HIDDEN).step for time in times]


def test_steps_are_counted_and_a_rising_noise_level_begins_anew() -> None:
    tracker, text = new_tracker(), torch.zeros(1, 5, 3)
    assert steps_of(tracker, text, [1000.0, 700.0, 300.0]) == [0, 1, 2]
    assert steps_of(tracker, text, [1000.0, 700.0]) == [0, 1]
    # A generation that failed after its first step, and the next one.
    assert steps_of(tracker, text, [1000.0, 1000.0, 700.0]) == [0, 0, 1]


def test_ascending_timesteps_are_falling_noise_levels() -> None:
    tracker, text = GenerationTracker(ascending), torch.zeros(1, 5, 3)
    assert steps_of(tracker, text, [0.0, 300.0, 700.0]) == [0, 1, 2]
    assert current_pass().noise_level == pytest.approx(0.3)
    assert steps_of(tracker, text, [0.0, 300.0]) == [0, 1]


def test_later_steps_may_share_a_timestep_that_was_rounded() -> None:
    """50 steps with shift 7 in bfloat16: steps 1 and 2 are both 996."""
    tracker, text = new_tracker(), torch.zeros(1, 5, 3)
    sigmas = torch.linspace(1, 0, 51)[:-1]
    times = (1000 * 7 * sigmas / (1 + 6 * sigmas)).to(torch.bfloat16).tolist()
    assert times[1] == times[2]
    assert steps_of(tracker, text, times) == list(range(50))


def test_memory_is_that_of_one_generation() -> None:
    tracker, text = new_tracker(), torch.zeros(1, 5, 3)
    tracker.begin(text, 9.0, HIDDEN).memory["x"] = 1
    assert tracker.begin(text, 8.0, HIDDEN).memory == {"x": 1}
    assert tracker.begin(text, 9.0, HIDDEN).memory == {}


def test_both_passes_of_guidance_have_their_own_state() -> None:
    tracker, positive, negative = new_tracker(), torch.zeros(1, 5, 3), torch.zeros(1, 5, 3)
    for _ in range(2):
        for step, time in enumerate([1000.0, 600.0, 200.0]):
            for text in (positive, negative):
                state = tracker.begin(text, time, HIDDEN)
                assert state.step == step
                assert state.memory.setdefault("owner", id(text)) == id(text)
    assert tracker.num_states == 2


def test_a_generation_inside_another_disturbs_neither() -> None:
    tracker, outer, inner = new_tracker(), torch.zeros(1, 5, 3), torch.zeros(1, 5, 3)
    assert steps_of(tracker, outer, [1000.0, 700.0]) == [0, 1]
    assert steps_of(tracker, inner, [1000.0, 600.0, 200.0]) == [0, 1, 2]
    tracker.end_call()
    assert tracker.num_states == 1
    assert steps_of(tracker, outer, [400.0, 100.0]) == [2, 3]
    tracker.end_call()
    assert tracker.num_states == 0


def test_a_call_ends_both_passes_of_its_guidance() -> None:
    tracker, positive, negative = new_tracker(), torch.zeros(1, 5, 3), torch.zeros(1, 5, 3)
    for time in (900.0, 100.0):
        steps_of(tracker, positive, [time])
        steps_of(tracker, negative, [time])
    tracker.end_call()
    assert tracker.num_states == 0


def test_threads_with_one_conditioning_have_states_of_their_own() -> None:
    tracker, text = new_tracker(), torch.zeros(1, 5, 3)
    assert steps_of(tracker, text, [1000.0, 700.0]) == [0, 1]
    found: list[int] = []

    def other() -> None:
        found.extend(steps_of(tracker, text, [1000.0, 800.0, 500.0]))
        tracker._after()
        with raises(RuntimeError, "forward pass"):
            current_pass()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [0, 1, 2]
    assert current_pass().step == 1
    assert steps_of(tracker, text, [500.0]) == [2]


def test_other_shapes_begin_anew() -> None:
    tracker, text = new_tracker(), torch.zeros(1, 5, 3)
    tracker.begin(text, 3.0, HIDDEN)
    assert tracker.begin(text, 2.0, torch.zeros(1, 4, 2, 8, 8)).step == 0


def test_a_state_dies_with_its_conditioning() -> None:
    tracker, text = new_tracker(), torch.zeros(1, 5, 3)
    steps_of(tracker, text, [3.0, 2.0])
    del text
    gc.collect()
    assert tracker.num_states == 0
    # A tensor that takes over the place in memory is another generation.
    assert steps_of(tracker, torch.zeros(1, 5, 3), [1.0]) == [0]


def test_texts_that_live_on_do_not_pile_up(caplog: pytest.LogCaptureFixture) -> None:
    tracker, texts = new_tracker(), [torch.zeros(1, 5, 3) for _ in range(MOST_STATES + 1)]
    with caplog.at_level(logging.WARNING):
        for text in texts:
            steps_of(tracker, text, [9.0, 8.0])
    assert tracker.num_states == MOST_STATES
    assert len(caplog.records) == 1
    assert steps_of(tracker, texts[-1], [7.0]) == [2]
    assert steps_of(tracker, texts[0], [7.0]) == [0]


def test_a_copy_begins_without_states() -> None:
    tracker, text = new_tracker(), torch.zeros(1, 5, 3)
    steps_of(tracker, text, [9.0, 8.0])
    for other in (copy.deepcopy(tracker), pickle.loads(pickle.dumps(tracker))):  # noqa: S301
        assert other.num_states == 0
        assert steps_of(other, text, [7.0]) == [0]
    assert steps_of(tracker, text, [7.0]) == [2]


def test_says_so_when_the_conditioning_never_stays(caplog: pytest.LogCaptureFixture) -> None:
    tracker = new_tracker()
    with caplog.at_level(logging.WARNING):
        for time in (5.0, 4.0, 3.0, 2.0, 1.0):
            assert tracker.begin(torch.zeros(1, 5, 3), time, HIDDEN).step == 0
    assert len([r for r in caplog.records if "encoder_hidden_states" in r.message]) == 1

"""Writes beside the computation: in order, at most two at a time, and no error is lost."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from tests.errors import raises
from workers.write_behind import WriteBehind


def test_writes_come_in_order_and_are_done_at_the_end() -> None:
    written: list[int] = []
    with WriteBehind() as writer:
        for number in range(20):
            writer.put(partial(written.append, number))
    assert written == list(range(20))


def test_at_most_two_writes_are_held() -> None:
    may_end, third_is_taken = threading.Event(), threading.Event()

    def write() -> None:
        may_end.wait(60)

    def compute() -> None:
        with WriteBehind() as writer:
            for _ in range(3):
                writer.put(write)
            third_is_taken.set()

    thread = threading.Thread(target=compute)
    thread.start()
    assert not third_is_taken.wait(0.2)
    may_end.set()
    thread.join()
    assert third_is_taken.is_set()


def _computation(*, later: int, own: Exception | None, written: list[int]) -> None:
    def fail() -> None:
        raise OSError("disk full")

    with WriteBehind() as writer:
        writer.put(fail)
        for number in range(later):
            writer.put(partial(written.append, number))
        if own is not None:
            raise own


@pytest.mark.parametrize("later", [0, 5])
def test_an_error_of_a_write_ends_the_computation(later: int) -> None:
    written: list[int] = []
    with raises(OSError, "disk full"):
        _computation(later=later, own=None, written=written)
    assert len(written) < 3


def test_the_computation_s_own_error_comes_first() -> None:
    with pytest.raises(ZeroDivisionError):
        _computation(later=0, own=ZeroDivisionError(), written=[])

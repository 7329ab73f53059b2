"""Whose workers get the room."""

import pytest

from cluster.slot_shares import worker_shares


@pytest.mark.parametrize(
    ("single", "replicated", "free", "expected"),
    [
        ({0: 5}, {}, 4, (4, 0)),
        ({0: 1}, {1: 9}, 4, (1, 1)),
        ({1: 9}, {0: 3}, 8, (4, 2)),
        ({0: 1, 2: 9}, {1: 2}, 4, (2, 1)),
        ({3: 2}, {0: 1}, 1, (1, 0)),
        ({}, {0: 2, 5: 2}, 9, (0, 2)),
        ({0: 3}, {0: 3}, 0, (0, 0)),
    ],
)
def test_urgent_units_first_and_no_process_twice(
    single: dict[int, int], replicated: dict[int, int], free: int, expected: tuple[int, int]
) -> None:
    shares = worker_shares({True: single, False: replicated}, {True: 1, False: 2}, free=free)
    assert (shares[True], shares[False]) == expected

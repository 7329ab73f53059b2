"""Ray that comes up slowly is waited for; every other error is the user's at once."""

import pytest

from cluster.slow_start import ATTEMPTS, start_patiently

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


def errors_of(*errors: Exception | None) -> tuple[list[str], BaseException | None]:
    """What was called, and what came of it, where the starts one after the other end with `errors`."""
    calls, left = [], list(errors)

    def start() -> None:
        calls.append("start")
        if error := left.pop(0):
            raise error

    try:
        start_patiently(start, lambda: calls.append("clean up"))
    except Exception as error:  # noqa: BLE001 - it is what is looked at
        return calls, error
    return calls, None


@pytest.mark.parametrize("slow", [Exception(SLOW), TimeoutError("no answer"), RuntimeError("Failed to start GCS.")])
def test_a_slow_start_is_tried_again(slow: Exception, caplog: pytest.LogCaptureFixture) -> None:
    assert errors_of(slow, slow, None) == (["start", "clean up", "start", "clean up", "start"], None)
    assert str(slow)[:20] in caplog.text


def test_one_that_never_comes_up_says_why() -> None:
    calls, error = errors_of(*[Exception(SLOW)] * ATTEMPTS)
    assert calls == ["start", "clean up"] * ATTEMPTS
    assert isinstance(error, ConnectionError)
    assert SLOW in str(error)


def test_other_errors_are_not_tried_again() -> None:
    wrong = ValueError("object_store_memory is too small")
    assert errors_of(wrong) == (["start"], wrong)

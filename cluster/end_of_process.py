"""Why a worker's process ended, in one sentence: Ray's own explanation lists what it might have been."""

import re

from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

_CRASH = re.compile(r"^Fatal Python error: (.+)$", re.MULTILINE)
_EXIT_CODE = re.compile(r"exits with an exit code (\d+)")
_NODE = re.compile(r"[^.\n]*\bnode\b[^.\n]*\b(?:died|dead|lost|removed|terminated)\b[^\n]*", re.IGNORECASE)
_BAR = re.compile(r"[^\r\n]*\d+%\|[^|\r\n]*\|[^\[\r\n]*\[[^\]\r\n]*\]\r?")


def reason_of_death(error: RayError, last_words: str) -> str:
    """Say how a process ended that gave no answer.

    Args:
        error: what Ray raised for the answer.
        last_words: the end of the process's standard error; may be empty.
    """
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    if isinstance(error, OutOfMemoryError):
        return "its process was killed by Ray, because its node was running out of memory"
    if crash := _CRASH.search(last_words):
        return f"its process crashed: {crash[1]}"
    text = str(error)
    if code := _EXIT_CODE.search(text):
        return f"its process ended by itself with exit code {code[1]}"
    if "worker process has died" in text:
        return "its process was killed (SIGKILL): most often by the kernel, for want of memory; `dmesg` on its node says so"
    if node := _NODE.search(text):
        return f"its node was lost: {node[0].strip()}"
    return f"{type(error).__name__}: {text.strip().splitlines()[0] if text.strip() else 'no explanation'}"


def without_progress_bars(text: str) -> str:
    """Drop the lines that libraries draw progress bars in; of a line that goes on after a bar, the bar."""
    return "\n".join(line for line in _BAR.sub("", text).splitlines() if line.strip())

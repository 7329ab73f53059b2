"""What a user would read of a library's doing."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from workers.library_messages import _is_no_length_warning, quieten_libraries

LOGGER = logging.getLogger("transformers.tokenization_utils_base")


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Texts of the tokenizers' logger."""
    texts: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    listener, filters = Listener(), list(LOGGER.filters)
    LOGGER.addHandler(listener)
    yield texts
    LOGGER.removeHandler(listener)
    LOGGER.filters[:] = filters


@pytest.mark.parametrize("quiet", [False, True])
def test_a_long_prompt_says_nothing_untrue(quiet: bool, said: list[str], digits_model: Path) -> None:
    """The pipeline cuts it, so nothing "will result in indexing errors"; `plan` has a note of its own."""
    LOGGER.removeFilter(_is_no_length_warning)
    if quiet:
        quieten_libraries()
    tokenizer = AutoTokenizer.from_pretrained(str(digits_model / "tokenizer_2"), local_files_only=True)
    assert len(tokenizer("the digit 3 " * 200)["input_ids"]) > tokenizer.model_max_length
    assert len(said) == (not quiet)
    LOGGER.warning("something else")
    assert said[-1] == "something else"

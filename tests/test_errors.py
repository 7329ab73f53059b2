"""A message that lacks a word fails the test, and shows the message."""

import pytest

from tests.errors import names, raises


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ("density is 11.5", 1.5),
        ("density is 1.5", 1),
        ("density is 1.5", 5),
        ("rank is 10", 1),
        ("residual.ranks is 1", "rank"),
        ("q_q is wrong", "q"),
        ("got torch.float32 [2, 64]", [2, 6]),
    ],
)
def test_part_of_a_word_is_none(message: str, word: object) -> None:
    with pytest.raises(AssertionError) as caught, raises(ValueError, word):
        raise ValueError(message)
    assert message in str(caught.value)


def test_whole_words_anywhere() -> None:
    assert names(
        "transformer_blocks.0.attn: residual.rank is 1.", "transformer_blocks.0", "attn", "rank", "residual", 1
    )
    assert names("got torch.float32[2, 64]; density 0.5, 64-bit", [2, 64], 0.5, 64, "torch.float32")

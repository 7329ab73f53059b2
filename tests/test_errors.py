"""A message that lacks a word fails the test, and shows the message."""

import ast
from pathlib import Path

import pytest

from tests.errors import names, raises

TESTS = Path(__file__).parent


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


def test_no_sentence_is_asserted_where_an_error_is_expected() -> None:
    """`match=` takes a pattern of the sentence; `raises` takes its key and value."""
    found = [
        f"{path.relative_to(TESTS)}:{line}" for path in TESTS.rglob("*.py") for line in sentences(path.read_text())
    ]
    assert not found, f"{', '.join(found)}: assert the key and the value (tests.errors.raises), not the sentence"


def sentences(source: str) -> list[int]:
    """Lines of calls with `match=`, and of `.match(...)` on a caught error."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    caught = {
        item.optional_vars.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.With)
        for item in node.items
        if isinstance(item.optional_vars, ast.Name) and "raises" in ast.unparse(item.context_expr)
    }
    return [
        call.lineno
        for call in calls
        if any(keyword.arg == "match" for keyword in call.keywords)
        or (
            isinstance(call.func, ast.Attribute)
            and call.func.attr == "match"
            and ast.unparse(call.func.value) in caught
        )
    ]


def test_a_sentence_is_found() -> None:
    assert sentences("with pytest.raises(\n    E,\n    match='a b',\n):\n    f()") == [1]
    assert sentences("with raises(E) as seen:\n    f()\nseen.match('a b')\nre.match('a', x)") == [3]

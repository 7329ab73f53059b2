"""`schema`: the reference of all keys is that of the declarations."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
from pydantic import BaseModel

from pipeline.config.loading import ConfigError
from pipeline.config.reference import keys
from pipeline.config.schema import RunConfig
from reelquant.settings.declaration import Settings
from tests.errors import raises
from tests.pipeline.test_cli import invoke


def sections_in(kind: Any) -> Iterator[type]:
    if isinstance(kind, type) and issubclass(kind, BaseModel | Settings):
        yield kind
    for part in get_args(kind):
        yield from sections_in(part)


def declared(section: Any, prefix: str = "") -> Iterator[str]:
    """Keys of a section and of those inside it; members of lists and of mappings are left out."""
    names = section.model_fields if issubclass(section, BaseModel) else [f.name for f in fields(section)]
    kinds = get_type_hints(section)
    for name in names:
        yield prefix + name
        if not str(kinds[name]).startswith(("tuple", "collections.abc.Mapping")):
            for inner in sections_in(kinds[name]):
                yield from declared(inner, f"{prefix}{name}.")


def test_every_key_is_there_once_with_its_meaning() -> None:
    found = keys()
    names = [key.name for key in found]
    assert len(names) == len(set(names))
    expected = list(declared(RunConfig))
    assert "method.attention.residual.gain" in expected
    assert [name for name in expected if name not in names] == []
    beside = {name for name in names if name not in expected}
    assert {name.partition("NAME")[0].partition("[]")[0] for name in beside} == {
        "evaluation.settings.",
        "bits.exceptions",
    }
    assert [key.name for key in found if not key.meaning] == []


@pytest.mark.parametrize(
    ("name", "type_", "default"),
    [
        ("model", "path", "required"),
        ("seed", "whole number at least 0 and below 9223372036854775808", "default 0"),
        ("method.preset", None, "default reelquant"),
        ("method.epochs", "whole number at least 0", "default 5"),
        ("method.attention.density", "number above 0 and at most 1", "default 1.0"),
        ("bits.embedder.weight", "whole number at least 2 and at most 8 | 16", "default 8"),
        ("bits.exceptions[].pattern", "text", "required"),
        ("evaluation.settings.NAME.density", "number above 0 and at most 1 | null", "default null"),
        ("compare", "list of sections like `method`", "default []"),
        ("workers", "section", ""),
    ],
)
def test_a_key_has_values_and_default(name: str, type_: str | None, default: str) -> None:
    [key] = [key for key in keys() if key.name == name]
    assert key.default == default
    assert type_ in (None, key.type)


def test_command_lists_all_or_those_inside_one() -> None:
    whole = invoke("schema")
    assert whole.exit_code == 0
    assert all(f"{key.name}: " in whole.output for key in keys())
    part = invoke("schema", "method.attention")
    assert [line.split(":")[0] for line in part.output.splitlines() if not line.startswith(" ")] == [
        key.name for key in keys() if key.name.startswith("method.attention")
        if key.name not in ("method.attention_distillation",)
    ]  # fmt: skip
    unknown = invoke("schema", "method.density")
    assert unknown.exit_code == 1
    assert "method.attention.density" in unknown.output
    with raises(ConfigError, "method.density"):
        keys("method.density")

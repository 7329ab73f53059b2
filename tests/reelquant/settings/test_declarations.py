"""A setting is declared once: its default, its meaning and its possible values."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import TypeAdapter, ValidationError

from reelquant.settings.attention import BandAttention, Residual, SparseAttention
from reelquant.settings.declaration import Bounds, Settings, fits
from reelquant.settings.generation import Generation, LayerBits, Numerics, StepProtection
from reelquant.settings.recipe import PRESETS, Recipe
from tests.errors import raises

ROOT = Path(__file__).resolve().parents[3]
DECLARED: tuple[type[Settings], ...] = (
    Recipe,
    SparseAttention,
    Residual,
    Generation,
    Numerics,
    LayerBits,
    StepProtection,
)
OTHER_CONCEPTS = {
    "activation", "activation_bits", "attention", "channel_scale", "dtype", "gain", "head_kinds", "height", "interval", "name",
    "num_frames", "rank", "refresh_steps", "residual", "rotation", "velocity_correction", "weight", "weight_layout", "width",
}  # fmt: skip
"""Names that something else has too, such as the tensor `channel_scale` of a layer or the width of a picture."""
WAY_OF_DENSITY = [
    "pipeline/config/method.py", "reelquant/attention/sparse_spec.py", "reelquant/runtime/sparse_attention.py",
    "reelquant/settings/attention.py", "reelquant/settings/recipe.py", "reelquant/tokens.py",
]  # fmt: skip
"""Choice of the preset, declaration, checkpoint, and the width of the band that kernels take."""
BESIDE_THE_WAY = {"reelquant/runtime/knobs.py", "pipeline/config/knobs.py"}
"""Changes of a finished checkpoint."""


def sources(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        path = ROOT / folder
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            yield file.relative_to(ROOT).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def declarations() -> Iterator[tuple[str, str]]:
    """Field and class of all dataclasses and pydantic models; the TypedDict of a function's keywords is neither."""
    for _, module in sources("reelquant", "storage", "cluster", "workers", "pipeline"):
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef) and not any("TypedDict" in ast.unparse(base) for base in node.bases):
                names = (
                    n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
                )
                yield from ((name, node.name) for name in names)


def test_a_setting_is_declared_once() -> None:
    found = list(declarations())
    assert [owner for name, owner in found if name == "density"] == ["BandAttention"]
    names = {f.name for declaration in DECLARED for f in fields(declaration)}  # type: ignore[arg-type]
    assert names >= OTHER_CONCEPTS
    repeated = {
        name: owners for name in names - OTHER_CONCEPTS if len(owners := [c for n, c in found if n == name]) != 1
    }
    assert not repeated


def test_few_files_stand_between_a_configuration_and_the_kernel() -> None:
    def touches(node: ast.AST) -> bool:
        name = {ast.Name: "id", ast.Attribute: "attr", ast.arg: "arg", ast.keyword: "arg", ast.Constant: "value"}.get(
            type(node)
        )
        return name is not None and getattr(node, name) == "density"

    folders = ("attention", "checkpoint", "ops", "runtime", "settings", "diffusers_plugin.py", "tokens.py")
    way = [f"reelquant/{name}" for name in folders] + ["pipeline/config", "pipeline/stages/assembly.py"]
    found = [
        file for file, module in sources(*way, "workers/assembly_worker.py") if any(map(touches, ast.walk(module)))
    ]
    assert sorted(set(found) - BESIDE_THE_WAY) == WAY_OF_DENSITY
    assert len(WAY_OF_DENSITY) <= 6


def test_every_field_has_its_meaning() -> None:
    for declaration in (*DECLARED, BandAttention):
        keys = TypeAdapter(declaration).json_schema()["properties"]
        assert [name for name, key in keys.items() if not key.get("description")] == [], declaration


def test_declarations_need_no_torch() -> None:
    modules = ", ".join(f"reelquant.settings.{name}" for name in ("attention", "declaration", "generation", "recipe"))
    code = f"import sys; import {modules}; print([n for n in ('torch', 'diffusers', 'pydantic', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("declaration", "wrong", "words"),
    [
        (SparseAttention, {"density": 0.0}, ("density", "0.0", 1)),
        (SparseAttention, {"density": float("nan")}, ("density", "nan")),
        (SparseAttention, {"interval": 2.5}, ("interval", "2.5")),
        (SparseAttention, {"residual": Residual(rank=0)}, ("residual.rank", 0)),
        (Recipe, {"epochs": -1}, ("epochs", -1)),
        (Recipe, {"rounding": "up"}, ("rounding", "'up'", "nearest", "gptq")),
        (Recipe, {"lambda_min": 2}, ("lambda_min", 2)),
        (Generation, {"height": 7}, ("generation.height", 7)),
        (Numerics, {"threads": 0}, ("numerics.threads", 0)),
        (LayerBits, {"activation": 9}, ("activation", 9)),
        (StepProtection, {"noise_above": 2.0}, ("noise_above", "2.0")),
    ],
)
def test_impossible_values_are_refused_by_both_doors(
    declaration: type[Settings], wrong: dict[str, Any], words: tuple[object, ...]
) -> None:
    with raises(ValueError, *words):
        declaration(**wrong)
    plain = {name: value.to_dict() if isinstance(value, Settings) else value for name, value in wrong.items()}
    with pytest.raises(ValidationError):
        TypeAdapter(declaration).validate_python(plain)


def test_values_fit_their_kinds() -> None:
    list_of_shares = tuple[Annotated[float, Bounds(ge=0, le=1)], ...]
    for value, kind, expected in (
        (True, int, False), (3, float, True), (0.5, int, False), (None, int | None, True), (1, Literal[1, 2], True),
        (True, Literal[1, 2], False), ((0, 0.5), list_of_shares, True), ((0, 1.5), list_of_shares, False),
        ([0.5], list_of_shares, False), ({"a": "s"}, dict[str, str], True),
    ):  # fmt: skip
        assert fits(value, kind) == expected, (value, kind)


def test_settings_are_stored_as_before_there_were_added_ones() -> None:
    plain = SparseAttention(residual=Residual(order=1))
    assert not {"refresh_steps", "gain"} & {*plain.to_dict(), *plain.to_dict()["residual"]}
    used = replace(plain, refresh_steps=(0, 4), residual=Residual(order=1, gain=(0.5,)))
    assert (used.to_dict()["refresh_steps"], used.to_dict()["residual"]["gain"]) == ([0, 4], [0.5])
    with pytest.raises(FrozenInstanceError):
        used.density = 0.5  # type: ignore[misc]


def test_presets_have_their_names() -> None:
    assert {name: (recipe.preset, recipe.name) for name, recipe in PRESETS.items()} == {n: (n, n) for n in PRESETS}

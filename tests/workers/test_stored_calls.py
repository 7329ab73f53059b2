"""Calls come back from the store as they were: values, structure, and what is one tensor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reelquant.calibration.block_call import Constants, RepeatedRows
from reelquant.tokens import TokenLayout
from tests.errors import raises
from tests.unit_cache import UnitCache
from workers.stored_calls import (
    RecordedSteps,
    StoredConstants,
    StoredSteps,
    TreeWriter,
    decoded,
    encoded,
    rebuilt,
    write_constants,
)

CPU = torch.device("cpu")


def test_a_tree_comes_back_with_its_structure() -> None:
    shared = torch.randn(2, 3)
    tree = {"a": (shared, [1, 2.5, None, "x"], {"b": shared.T, "c": shared}), "d": torch.tensor([True, False])}
    arrays: dict[str, Tensor] = {}
    writer = TreeWriter(arrays.__setitem__)
    structure = decoded(encoded({name: writer.structure(value, name) for name, value in tree.items()}))
    assert sorted(arrays) == ["a.0", "a.2.b", "d"], "one tensor is one array"
    found = {name: rebuilt(value, arrays.__getitem__) for name, value in structure.items()}
    assert isinstance(found["a"], tuple)
    assert found["a"][1] == [1, 2.5, None, "x"]
    assert torch.equal(found["a"][2]["b"], shared.T)
    assert found["a"][2]["c"] is found["a"][0]
    with raises(ValueError, "e.f", "object"):
        writer.structure({"f": object()}, "e")


def test_equal_constants_of_samples_are_one_tensor(tmp_path: Path) -> None:
    cache, layout = UnitCache(tmp_path), TokenLayout(1, 2, 3, 4)
    table = torch.randn(6, 2)
    for name in ("one", "two"):
        calls: dict[str, Any] = {
            "blocks": {"temb": torch.randn(1, 8), "rotary": (table.clone(), -table), "scale": 0.1},
            "others": {"rotary_emb": (table.clone(), -table)},
        }
        arrays: dict[str, Tensor] = {}
        write_constants(Constants(calls, layout), arrays.__setitem__)
        cache.write("activations", name, {f"cond/{array}": value for array, value in arrays.items()})
    reader = StoredConstants(CPU)
    one, two = (reader.read(cache.outputs, f"activations/{name}/cond") for name in ("one", "two"))
    assert one.layout == two.layout == layout
    assert one.calls["blocks"]["rotary"][0] is two.calls["others"]["rotary_emb"][0]
    assert torch.equal(one.calls["blocks"]["rotary"][1], -table)
    assert not torch.equal(one.calls["blocks"]["temb"], two.calls["blocks"]["temb"])
    assert two.calls["blocks"]["scale"] == 0.1


def test_what_is_the_same_in_all_steps_is_one_tensor_and_latents_are_kept_once(tmp_path: Path) -> None:
    cache, text = UnitCache(tmp_path), torch.randn(1, 5, 4)
    latents = [torch.randn(2, 3) for _ in range(4)]
    steps = RecordedSteps()
    for step in range(3):
        hidden = latents[step].bfloat16().unsqueeze(0)
        call = {"hidden_states": hidden, "timestep": torch.tensor([900.0 - step]), "text": text.clone(), "size": (1, 2)}
        steps.add({**call, "return_dict": True})
    written: dict[str, Tensor] = {}
    steps.write(written.__setitem__, latents)
    assert sorted(written) == ["calls", "text", "timestep"]
    arrays = {f"cond/{name}": value for name, value in written.items()}
    cache.write("trajectories", "p", {**arrays, "latents": torch.stack(latents)})
    stored = StoredSteps(cache.outputs, "p", "cond", CPU)
    calls = [stored.call(step, torch.bfloat16) for step in range(3)]
    assert all(call["text"] is calls[0]["text"] for call in calls)
    assert torch.equal(calls[0]["text"], text)
    for step, found in enumerate(calls):
        assert torch.equal(found["hidden_states"], latents[step].bfloat16().unsqueeze(0))
        assert float(found["timestep"]) == 900.0 - step
        assert found["size"] == (1, 2)
        assert found["return_dict"] is False


@pytest.mark.parametrize("axis", [1, 2])
def test_channels_behind_the_latents_are_kept_once(axis: int, tmp_path: Path) -> None:
    """As image to video has them, and HunyuanVideo-1.5 always; as many as the latents' or not."""
    cache, latents = UnitCache(tmp_path), [torch.randn(2, 2, 3) for _ in range(4)]
    conditions = {
        name: torch.randn(1, 2, 2, 3).narrow(axis, 0, num).bfloat16() for name, num in (("two", 2), ("one", 1))
    }
    changing = [torch.randn(1, 1, 2, 3).bfloat16() for _ in range(3)]
    steps = RecordedSteps()
    for step, own in enumerate(latents[:3]):
        hidden = own.bfloat16().unsqueeze(0)
        call = {name: torch.cat([hidden, condition], dim=axis) for name, condition in conditions.items()}
        steps.add({**call, "three": torch.cat([hidden, changing[step]], dim=1)})
    written: dict[str, Tensor] = {}
    steps.write(written.__setitem__, latents)
    assert sorted(written) == ["calls", "one", "three", "two"]
    assert all(torch.equal(written[name], condition) for name, condition in conditions.items())
    assert len(written["three"]) == 3
    cache.write("trajectories", "p", {**{f"cond/{k}": v for k, v in written.items()}, "latents": torch.stack(latents)})
    stored = StoredSteps(cache.outputs, "p", "cond", CPU)
    for step in range(3):
        found, hidden = stored.call(step, torch.bfloat16), latents[step].bfloat16().unsqueeze(0)
        for name, condition in conditions.items():
            assert torch.equal(found[name], torch.cat([hidden, condition], dim=axis)), name
        assert torch.equal(found["three"], torch.cat([hidden, changing[step]], dim=1))


def test_what_stands_in_front_of_the_latents_is_kept_once(tmp_path: Path) -> None:
    """As the image's frame in TI2V models; an argument whose frame changes is kept whole."""
    cache, latents = UnitCache(tmp_path), [torch.randn(2, 4, 3) for _ in range(4)]
    frame, steps = torch.randn(1, 2, 1, 3).bfloat16(), RecordedSteps()
    changing = [torch.randn(1, 2, 1, 3).bfloat16() for _ in range(3)]
    for step, own in enumerate(latents[:3]):
        behind = own[:, 1:].bfloat16().unsqueeze(0)
        call = {"fixed": torch.cat([frame, behind], dim=2), "changing": torch.cat([changing[step], behind], dim=2)}
        steps.add(call)
    written: dict[str, Tensor] = {}
    steps.write(written.__setitem__, latents)
    assert torch.equal(written["fixed"], frame)
    assert len(written["changing"]) == 3
    cache.write("trajectories", "p", {**{f"cond/{k}": v for k, v in written.items()}, "latents": torch.stack(latents)})
    stored = StoredSteps(cache.outputs, "p", "cond", CPU)
    for step in range(3):
        found, behind = stored.call(step, torch.bfloat16), latents[step][:, 1:].bfloat16().unsqueeze(0)
        assert torch.equal(found["fixed"], torch.cat([frame, behind], dim=2))
        assert torch.equal(found["changing"], torch.cat([changing[step], behind], dim=2))


def test_latents_behind_a_frame_of_their_own_are_kept_once(tmp_path: Path) -> None:
    """As where the scheduler never has the image's frame."""
    cache, latents = UnitCache(tmp_path), [torch.randn(2, 3, 4) for _ in range(4)]
    frame, steps = torch.randn(1, 2, 1, 4).bfloat16(), RecordedSteps()
    whole = [torch.cat([frame, own.bfloat16().unsqueeze(0)], dim=2) for own in latents]
    for step in range(3):
        steps.add({"fixed": whole[step], "elsewhere": whole[step].roll(1, dims=2)})
    written: dict[str, Tensor] = {}
    steps.write(written.__setitem__, latents)
    assert torch.equal(written["fixed"], frame)
    assert len(written["elsewhere"]) == 3
    cache.write("trajectories", "p", {**{f"cond/{k}": v for k, v in written.items()}, "latents": torch.stack(latents)})
    stored = StoredSteps(cache.outputs, "p", "cond", CPU)
    for step in range(3):
        found = stored.call(step, torch.bfloat16)
        assert torch.equal(found["fixed"], whole[step])
        assert torch.equal(found["elsewhere"], whole[step].roll(1, dims=2))


@pytest.mark.parametrize("timesteps", [[0.0, 0.0, 700.0, 700.0, 700.0], [300.0] * 5, [5.0, 3.0, 5.0, 4.0, 3.0]])
def test_rows_of_equal_timesteps_are_kept_once(timesteps: list[float], tmp_path: Path) -> None:
    timestep = torch.tensor([timesteps])
    whole = torch.stack([timestep, -timestep], dim=2)
    repeated = RepeatedRows.by_timestep(whole, timestep)
    assert repeated.rows.shape == (1, len(set(timesteps)), 2)
    constants = Constants({"blocks": {"temb": repeated, "other": timestep}}, TokenLayout(5, 1, 1, 0))
    arrays: dict[str, Tensor] = {}
    write_constants(constants.to("cpu"), arrays.__setitem__)
    cache = UnitCache(tmp_path)
    cache.write("activations", "a", {f"cond/{array}": value for array, value in arrays.items()})
    found = StoredConstants(CPU).read(cache.outputs, "activations/a/cond")
    assert torch.equal(found.arguments("blocks.3")["temb"], whole)
    assert torch.equal(found.arguments("blocks.3")["other"], timestep)

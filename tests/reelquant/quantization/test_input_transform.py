import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor

from reelquant.quantization.input_transform import InputTransform, QuantizedInput
from reelquant.quantization.rotation import hadamard, transform_input


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry whenever an input is transformed."""
    found: list[int] = []
    real = transform_input

    def counted(x: Tensor, channel_scale: Tensor | None, rotation: Tensor | None) -> Tensor:
        found.append(id(x))
        return real(x, channel_scale, rotation)

    monkeypatch.setattr("reelquant.quantization.input_transform.transform_input", counted)
    return found


class Group:
    """A transform with its tensors."""

    def __init__(self, bits: int = 6) -> None:
        self.transform = InputTransform(bits)
        self.channel_scale = torch.rand(24) + 0.5
        self.rotation = hadamard(8).bfloat16()
        self.activation_clip = torch.tensor([0.9])

    def __call__(self, x: Tensor) -> QuantizedInput:
        return self.transform(
            x, channel_scale=self.channel_scale, rotation=self.rotation, activation_clip=self.activation_clip
        )


def test_same_input_is_transformed_once(calls: list[int]) -> None:
    group, x = Group(), torch.randn(2, 5, 24)
    first = group(x)
    assert group(x).values is first.values
    assert group(x).scale is first.scale
    assert len(calls) == 1


def test_input_changed_in_place_is_transformed_again(calls: list[int]) -> None:
    group, x = Group(), torch.randn(5, 24)
    before = group(x).values.clone()
    x[2:].mul_(torch.randn(24))
    after = group(x)
    assert len(calls) == 2
    assert not torch.equal(after.values, before)
    torch.testing.assert_close(after.values, Group.__call__(group, x.clone()).values, rtol=0, atol=0)


def test_change_through_a_view_is_seen() -> None:
    group, base = Group(), torch.randn(6, 24)
    x = base[1:]
    before = group(x).values
    base.mul_(torch.randn(24))
    assert not torch.equal(group(x).values, before)


def test_equal_but_other_tensor_is_transformed_again(calls: list[int]) -> None:
    group, x = Group(), torch.randn(5, 24)
    group(x)
    group(x.clone())
    group(x)
    assert len(calls) == 3


def test_new_tensor_at_the_same_address_is_transformed_again(calls: list[int]) -> None:
    group = Group()
    addresses = set()
    for i in range(20):
        x = torch.full((5, 24), float(i + 1))
        addresses.add(id(x))
        scale = group(x).scale
        del x
        assert scale is not None
        expected = torch.full((5, 24), float(i + 1))
        torch.testing.assert_close(scale, Group.__call__(group, expected).scale, rtol=0, atol=0)
        del expected
    assert len(addresses) < 20, "no address was used twice: the test proves nothing"
    assert len(calls) == 40


@pytest.mark.parametrize("part", ["channel_scale", "rotation", "activation_clip"])
@pytest.mark.parametrize("in_place", [True, False])
def test_change_of_the_transform_is_seen(calls: list[int], part: str, in_place: bool) -> None:
    group, x = Group(), torch.randn(5, 24)
    before = group(x)
    if in_place:
        getattr(group, part).mul_(0.5)
    else:
        setattr(group, part, getattr(group, part) * 0.5)
    after = group(x)
    assert len(calls) == 2
    assert before.scale is not None
    assert after.scale is not None
    assert not torch.equal(before.scale, after.scale)


def test_result_is_dropped_when_the_input_dies() -> None:
    group, x = Group(), torch.randn(5, 24)
    result = weakref.ref(group(x).values)
    gc.disable()
    try:
        assert result() is not None
        del x
        assert result() is None
    finally:
        gc.enable()


def test_dying_input_does_not_drop_the_result_for_another(calls: list[int]) -> None:
    group, old, new = Group(), torch.randn(5, 24), torch.randn(5, 24)
    group(old)
    group(new)
    del old
    group(new)
    assert len(calls) == 2


def test_transform_is_freed_though_an_input_lives() -> None:
    group, x = Group(), torch.randn(5, 24)
    group(x)
    transform = weakref.ref(group.transform)
    del group
    assert transform() is None
    del x


def test_nothing_is_remembered_in_inference_mode_and_under_autograd(calls: list[int]) -> None:
    group = Group()
    with torch.inference_mode():
        x = torch.randn(5, 24)
        first = group(x).values
        x.mul_(torch.randn(24))
        assert not torch.equal(group(x).values, first)
    y = torch.randn(5, 24, requires_grad=True)
    group(y)
    group(y)
    assert len(calls) == 4
    with torch.no_grad():
        group(y)
        group(y)
    assert len(calls) == 5


def test_is_copied_and_pickled_without_its_memory(calls: list[int]) -> None:
    group, x = Group(), torch.randn(5, 24)
    before = group(x)
    for other in (copy.deepcopy(group), pickle.loads(pickle.dumps(group))):  # noqa: S301
        assert torch.equal(other(x).values, before.values)
    assert len(calls) == 3


def test_bits_16_only_transform() -> None:
    group, x = Group(bits=16), torch.randn(5, 24).bfloat16()
    values, scale = group(x)
    assert scale is None
    assert values.dtype == torch.float32
    expected = (x.double() / group.channel_scale.double()).reshape(5, 3, 8) @ group.rotation.double()
    torch.testing.assert_close(values.double(), expected.reshape(5, 24), rtol=1e-5, atol=1e-6)

"""Recorded calls in the calibration store: trees of arguments whose leaves are arrays, and whose structure is JSON.

    trajectories/<prompt>/<branch>/calls            structure of the transformer's calls, of all steps
                                  /<argument>...    arguments, once; those that change from step to step [T, ...]; of those
                                                    with the latents in them what is beside the latents
    activations/<sample>/<branch>/calls             structure of what the blocks read besides their streams
                                 /<argument>...     its tensors: one in the model, one array
                                 /<block>/<stream>  streams in front of a segment [1, N, d] bfloat16

A branch is `cond`, and with classifier-free guidance also `uncond`. A structure is kept as an array of its JSON's bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reelquant.calibration.block_call import Constants, RepeatedRows, Streams
from reelquant.tokens import TokenLayout
from storage.recorded_outputs import RecordedOutputs
from storage.unit_store import UnitStore

STRUCTURE = "calls"
Write = Callable[[str, Tensor], object]
"""Takes an array by its name below a prefix."""


class TreeWriter:
    """Takes trees apart: tensors are written, each once, and JSON is left."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._known: dict[Any, tuple[Tensor, str]] = {}

    def structure(self, value: Any, path: str) -> Any:
        """The JSON value of `value`, an argument or a part of one.

        Raises:
            ValueError: it is something that cannot be kept.
        """
        if isinstance(value, Tensor):
            # Sharded models hand on other objects with the same values; what is known stays alive, and so does its place.
            key = id(value) if value.is_meta else (value.data_ptr(), value.shape, value.stride(), value.dtype)
            known = self._known.get(key)
            if known is None:
                known = self._known[key] = (value, path)
                self._write(path, value)
            return {"array": known[1]}
        if isinstance(value, RepeatedRows):
            return {"repeated": self.structure((value.rows, value.index), path)}
        if isinstance(value, tuple | list):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [self.structure(part, f"{path}.{index}") for index, part in enumerate(value)]}
        if isinstance(value, Mapping):
            return {"dict": {name: self.structure(part, f"{path}.{name}") for name, part in value.items()}}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        raise ValueError(f"argument {path} is a {type(value).__name__}, which cannot be recorded")


def rebuilt(structure: Any, read: Callable[[str], Tensor]) -> Any:
    """The value that `TreeWriter.structure` has taken apart."""
    [(kind, content)] = structure.items()
    if kind == "array":
        return read(content)
    if kind in ("tuple", "list"):
        parts = [rebuilt(part, read) for part in content]
        return tuple(parts) if kind == "tuple" else parts
    if kind == "repeated":
        return RepeatedRows(*rebuilt(content, read))
    if kind == "dict":
        return {name: rebuilt(part, read) for name, part in content.items()}
    return content


def encoded(structure: Any) -> Tensor:
    """A structure's JSON, `[bytes]` uint8."""
    return torch.frombuffer(bytearray(json.dumps(structure, sort_keys=True).encode()), dtype=torch.uint8)


def decoded(array: Tensor) -> Any:
    """The structure of `encoded`."""
    return json.loads(array.numpy().tobytes())


def write_constants(constants: Constants, write: Write) -> None:
    """Writes what a sample's blocks read besides their streams."""
    writer, layout = TreeWriter(write), constants.layout
    calls = {modules: writer.structure(dict(call), modules) for modules, call in constants.calls.items()}
    sizes = [*layout.grid, layout.num_text, *([layout.dense_frames] if layout.dense_frames else [])]
    write(STRUCTURE, encoded({"layout": sizes, "calls": calls}))


class StoredConstants:
    """Reads them; equal tensors of several samples are one on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: list[Tensor] = []

    def read(self, store: RecordedOutputs, prefix: str) -> Constants:
        """Those of the sample and branch whose arrays are below `prefix`."""
        structure = decoded(store.read(f"{prefix}/{STRUCTURE}"))
        arrays: dict[str, Tensor] = {}

        def read(name: str) -> Tensor:
            if name not in arrays:
                arrays[name] = self._one(store.read(f"{prefix}/{name}").to(self._device))
            return arrays[name]

        calls = {modules: rebuilt(call, read) for modules, call in structure["calls"].items()}
        return Constants(calls, TokenLayout(*structure["layout"]))

    def _one(self, tensor: Tensor) -> Tensor:
        for known in self._kept:
            if known.shape == tensor.shape and known.dtype == tensor.dtype and torch.equal(known, tensor):
                return known
        self._kept.append(tensor)
        return tensor


def write_streams(store: UnitStore, prefix: str, block: str, streams: Streams) -> None:
    """Writes the streams in front of a block, which are on the CPU."""
    for name, stream in streams.items():
        store.write(f"{prefix}/{block}/{name}", stream)


@dataclass(frozen=True)
class LatentsPlace:
    """Where an argument has latents in it, and what it has beside them."""

    axis: int
    """Without the batch's."""
    start: int
    """First index along it."""
    skipped: int
    """So many of the latents along it, the first, are not there."""
    rest: Tensor
    """`[1, ...]`: the argument without the latents, the same at all steps."""

    @classmethod
    def find(cls, values: Sequence[Tensor], latents: Sequence[Tensor]) -> LatentsPlace | None:
        """The place of the latents of each step in its value `[1, ...]`; None where they are not in all of them, or what is
        beside them changes."""
        first, shape = values[0].cpu(), latents[0].shape
        if first.ndim != len(shape) + 1:
            return None
        longer = [axis for axis in range(len(shape)) if first.shape[axis + 1] != shape[axis]]
        for axis in longer or range(len(shape)):
            if len(longer) > 1 or first.shape[axis + 1] < shape[axis]:
                return None
            own = first[0].narrow(axis, 0, shape[axis])
            same = (own == latents[0].to(own.dtype)).movedim(axis, 0).flatten(1).all(dim=1).tolist()
            start = same.index(True) if True in same else len(same)
            # The latents in place of the argument's first ones, but for some that are others; or behind others.
            for place in (cls(axis, start, start, first), cls(axis, first.shape[axis + 1] - shape[axis], 0, first)):
                place = replace(place, rest=place.without_latents(first, shape[axis]))
                pairs = zip(values, latents, strict=False)
                if place.skipped < shape[axis] and all(place.holds(value.cpu(), x) for value, x in pairs):
                    return place
        return None

    def without_latents(self, value: Tensor, length: int) -> Tensor:
        """What `value` has beside latents that are `length` long."""
        axis = self.axis + 1
        end = self.start + length - self.skipped
        return torch.cat(
            [value.narrow(axis, 0, self.start), value.narrow(axis, end, value.shape[axis] - end)], dim=axis
        )

    def filled(self, latents: Tensor) -> Tensor:
        """The argument with latents `[1, ...]` in it."""
        axis, length = self.axis + 1, latents.shape[self.axis + 1] - self.skipped
        before, behind = self.rest.to(latents.dtype).tensor_split([self.start], dim=axis)
        return torch.cat([before, latents.narrow(axis, self.skipped, length), behind], dim=axis)

    def holds(self, value: Tensor, latents: Tensor) -> bool:
        """Whether `value` is this with `latents`, which have no batch's axis."""
        return torch.equal(value, self.filled(latents.unsqueeze(0).to(value.dtype)))


class RecordedSteps:
    """The transformer's calls in one branch of a generation, step by step."""

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {}

    def add(self, call: Mapping[str, Any]) -> None:
        """Adds the call of the next step; a tensor that is equal to the first step's is not kept again."""
        for name, value in call.items():
            steps = self._values.setdefault(name, [])
            if isinstance(value, Tensor):
                same = bool(steps) and steps[0].shape == value.shape and torch.equal(steps[0], value)
                # The first is compared with; others would fill the device step by step.
                steps.append(steps[0] if same else value.detach().cpu() if steps else value.detach().clone())
            else:
                steps.append(value)

    def write(self, write: Write, latents: Sequence[Tensor]) -> None:
        """Writes what was added.

        Args:
            latents: those with which each step begins, without the batch's axis, on the CPU.
        """
        constant: dict[str, Any] = {}
        changing: dict[str, Tensor] = {}
        of_latents: dict[str, LatentsPlace | None] = {}
        for name, values in self._values.items():
            first = values[0]
            if not isinstance(first, Tensor) or all(value is first for value in values):
                constant[name] = first
            elif all(torch.equal(v[0].cpu(), x.to(v.dtype)) for v, x in zip(values, latents, strict=False)):
                of_latents[name] = None
            elif place := LatentsPlace.find(values, latents):
                of_latents[name] = place
            else:
                changing[name] = torch.stack([value.cpu() for value in values])
        write_steps(write, constant, changing, of_latents)


def write_steps(
    write: Write,
    constant: Mapping[str, Any],
    changing: Mapping[str, Tensor],
    of_latents: Mapping[str, LatentsPlace | None],
) -> None:
    """Writes the calls of all steps.

    Args:
        constant: arguments that are the same in all steps.
        changing: those that are not, `[T, ...]`.
        of_latents: those that are the latents with which the step begins, which are kept elsewhere, or have them in them.
    """
    writer = TreeWriter(write)
    structure = {name: writer.structure(value, name) for name, value in constant.items()}
    for name, value in changing.items():
        write(name, value)
        structure[name] = {"steps": name}
    for name, place in of_latents.items():
        structure[name] = {"latents": None}
        if place is not None:
            where = {"axis": place.axis, "start": place.start, "skipped": place.skipped}
            structure[name] = {"latents": {**where, "rest": name}}
            write(name, place.rest)
    write(STRUCTURE, encoded(structure))


class StoredSteps:
    """The stored calls of one prompt and branch. What is the same in all steps is one tensor on the device, by which a
    transformer knows that its steps belong to one generation."""

    def __init__(self, store: RecordedOutputs, prompt: str, branch: str, device: torch.device) -> None:
        prefix = f"trajectories/{prompt}"

        def read(name: str) -> Tensor:
            return store.read(f"{prefix}/{branch}/{name}").to(device)

        structure: dict[str, Any] = decoded(store.read(f"{prefix}/{branch}/{STRUCTURE}"))
        places = {name: value["latents"] for name, value in structure.items() if "latents" in value}
        self._latents = {
            name: place and LatentsPlace(**{**place, "rest": read(place["rest"])}) for name, place in places.items()
        }
        self._steps = {name: read(value["steps"]) for name, value in structure.items() if "steps" in value}
        kept = {name: value for name, value in structure.items() if not {"latents", "steps"} & value.keys()}
        self._constant = {name: rebuilt(value, read) for name, value in kept.items()}
        self._store, self._prefix, self._device = store, prefix, device

    def call(self, step: int, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the transformer's call at `step`, its latents in `dtype`; its result is a tuple."""
        changing = {name: values[step] for name, values in self._steps.items()}
        if self._latents:
            rows = self._store.read(f"{self._prefix}/latents", rows=slice(step, step + 1)).to(self._device, dtype)
            changing |= {name: place.filled(rows) if place else rows for name, place in self._latents.items()}
        return {**self._constant, **changing, "return_dict": False}

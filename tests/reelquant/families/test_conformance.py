"""What holds for every family, of tiny random models: blocks are replayed bit for bit from one recorded call, groups partition
the linears, a core takes the place of attention, and noise levels are those of the family's scheduler."""

import copy
import functools
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reelquant.calibration.block_call import (
    BlockCall,
    Constants,
    Recording,
    Streams,
    block_list,
    num_text,
    stream_names,
    without_padding,
)
from reelquant.calibration.input_groups import find_block_calls
from reelquant.families.attention_core import set_attention_core
from reelquant.families.family import VideoSize
from reelquant.ops.band_attention.op import band_attention, dense_attention
from reelquant.tokens import band_width
from tests.reelquant.families.tiny_models import TINY, Tiny


@functools.cache
def _block_calls(name: str) -> dict[str, BlockCall]:
    return find_block_calls(TINY[name].family, TINY[name].model().config)


def block_calls(tiny: Tiny) -> dict[str, BlockCall]:
    """Of a tiny model."""
    return _block_calls(next(name for name, known in TINY.items() if known is tiny))


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # Mochi's rotary tables are always in float32
@pytest.mark.parametrize("tiny", TINY.values(), ids=TINY)
class TestFamily:
    """Every declaration."""

    @staticmethod
    def recorded(tiny: Tiny) -> tuple[Any, dict[str, Any], dict[str, Streams], Constants, dict[str, Streams]]:
        """A model, its call, the streams in front of its blocks and behind them, and what else they read."""
        model = tiny.model()
        call = without_padding(tiny.family, tiny.call())
        names = tiny.family.block_names(model.config)
        for name in names:
            set_attention_core(tiny.family, model.get_submodule(name), None)
        entries: dict[str, Streams] = {}
        exits: dict[str, Streams] = {}
        recording = Recording(tiny.family, model, call, names)
        handles = []
        for name in names:
            block = model.get_submodule(name)

            def after(module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
                outputs = output if isinstance(output, tuple) else (output,)
                exits[name] = {argument: outputs[i] for i, argument in stream_names(tiny.family, module).items()}

            handles.append(block.register_forward_hook(after))

        def see(name: str, streams: Streams | None) -> None:
            assert streams is not None
            entries[name] = streams

        with torch.no_grad(), recording.watching(see):
            model(**call)
        for handle in handles:
            handle.remove()
        assert recording.constants is not None
        return model, call, entries, recording.constants, exits

    def test_blocks_are_replayed_bit_for_bit_from_one_recorded_call(self, tiny: Tiny) -> None:
        model, _, entries, constants, exits = self.recorded(tiny)
        calls, names = block_calls(tiny), tiny.family.block_names(model.config)
        assert list(calls) == list(names)
        assert set(constants.calls) == set(tiny.family.blocks)
        streams = entries[names[0]]
        for name in names:
            with torch.no_grad():
                streams = calls[name](model.get_submodule(name), streams, constants)
            for argument, value in exits[name].items():
                assert torch.equal(streams[argument], value), (name, argument)
        moved = constants.to("cpu")
        assert moved.layout == constants.layout

    def test_groups_partition_the_linears_and_read_equal_tensors(self, tiny: Tiny) -> None:
        model, _, entries, constants, _ = self.recorded(tiny)
        config = model.config
        calls = block_calls(tiny)
        for name in tiny.family.block_names(config):
            block = model.get_submodule(name)
            linears = [layer for layer, module in block.named_modules() if isinstance(module, nn.Linear)]
            groups = [group for level in calls[name].levels for group in level]
            assert sorted(layer for group in groups for layer in group.layers) == sorted(linears)
            seen: dict[str, Tensor] = {}

            def keep_first(layer: str, x: Tensor, seen: dict[str, Tensor] = seen) -> None:
                seen.setdefault(layer, x)

            handles = [
                block.get_submodule(layer).register_forward_pre_hook(
                    lambda _m, args, layer=layer, keep=keep_first: keep(layer, args[0])
                )
                for layer in linears
            ]
            with torch.no_grad():
                calls[name](block, entries[name], constants)
            for handle in handles:
                handle.remove()
            order = list(seen)
            layout = constants.layout
            rows = {"video": layout.num_video, "text": layout.num_text, "joint": layout.num_tokens}
            for group in groups:
                assert all(torch.equal(seen[layer], seen[group.name]) for layer in group.layers), group
                assert list(group.layers) == sorted(group.layers, key=order.index)
                assert (seen[group.name].ndim == 2) == (group.stream == "conditioning")
                if group.stream in rows:
                    assert seen[group.name].shape[1] == rows[group.stream], group
            assert calls[name].streams == tuple(entries[name])
        first = calls[tiny.family.block_names(config)[0]].levels
        shared = [layer for level in first for group in level if len(group.layers) > 1 for layer in group.layers]
        assert len(shared) == tiny.num_grouped

    def test_a_core_takes_the_place_of_self_attention(self, tiny: Tiny) -> None:
        model, call, entries, constants, exits = self.recorded(tiny)
        layout = constants.layout
        assert layout.num_video == tiny.family.layout(model.config, call, 0).num_video
        for name in {block_list(n): n for n in reversed(tiny.family.block_names(model.config))}.values():
            block, call_block = copy.deepcopy(model.get_submodule(name)), block_calls(tiny)[name]
            calls: list[torch.Size] = []
            heads = "st" * (tiny.settings["num_attention_heads"] // 2)

            def band(_item: int, q: Tensor, k: Tensor, v: Tensor, heads: str = heads) -> Tensor:
                real = replace(layout, num_text=q.shape[1] - layout.num_video)
                return band_attention(q, k, v, kinds=heads, layout=real, width=band_width(real, 1.0))

            def dense(_item: int, q: Tensor, k: Tensor, v: Tensor, calls: list[torch.Size] = calls) -> Tensor:
                calls.append(q.shape)
                return dense_attention(q, k, v)

            found = {}
            for core in (band, dense):
                call_block.set_core(block, core)
                with torch.no_grad():
                    found[core] = call_block(copy.deepcopy(block), entries[name], constants)
            assert len(calls) == 1, "one self-attention a block"
            num_real = calls[0][1]
            assert layout.num_video <= num_real <= layout.num_tokens
            seen: list[Tensor] = []

            def observe(q: Tensor, _k: Tensor, _v: Tensor, seen: list[Tensor] = seen) -> None:
                seen.append(q)

            with torch.no_grad(), call_block.watch_attention(block, observe):
                call_block(block, entries[name], constants)
            assert [q.shape[1] for q in seen] == [num_real]
            call_block.set_core(block, None)
            with torch.no_grad():
                plain = call_block(block, entries[name], constants)
            for argument, value in exits[name].items():
                valid = num_real - layout.num_video if argument != "hidden_states" else None
                assert torch.equal(plain[argument], value)
                for core in (band, dense):
                    error = (found[core][argument] - value)[:, :valid].norm() / value.norm()
                    assert float(error) < 1e-5, (name, argument)

    def test_a_core_that_changes_attention_changes_the_block(self, tiny: Tiny) -> None:
        model, _, entries, constants, exits = self.recorded(tiny)
        name = tiny.family.block_names(model.config)[0]
        block, call_block = model.get_submodule(name), block_calls(tiny)[name]
        call_block.set_core(block, lambda _item, q, _k, _v: q * 0)
        with torch.no_grad():
            found = call_block(block, entries[name], constants)
        assert not torch.allclose(found["hidden_states"], exits[name]["hidden_states"], rtol=1e-2)

    def test_rows_of_a_block_are_those_of_the_whole(self, tiny: Tiny) -> None:
        if tiny.family.rows is None:
            assert tiny.family.name not in ("HunyuanVideo", "Wan")
            return
        model, _, entries, constants, exits = self.recorded(tiny)
        layout = constants.layout
        rows = torch.cat([torch.arange(0, layout.num_video, 3), torch.arange(layout.num_video, layout.num_tokens)])
        for name in tiny.family.block_names(model.config):
            block, call_block = model.get_submodule(name), block_calls(tiny)[name]
            expected = torch.cat(list(exits[name].values()), dim=1)[0, rows]
            queries: list[int] = []

            def observe(q: Tensor, _k: Tensor, _v: Tensor, queries: list[int] = queries) -> None:
                queries.append(q.shape[1])

            with torch.no_grad():
                torch.testing.assert_close(call_block.rows(block, entries[name], constants, rows), expected)
                with call_block.watch_attention(block, observe):
                    torch.testing.assert_close(call_block.rows(block, entries[name], constants, rows), expected)
            assert queries == [layout.num_tokens]

    def test_inputs_without_values_are_those_of_a_call(self, tiny: Tiny) -> None:
        model, call = tiny.model(), without_padding(tiny.family, tiny.call())
        shape = call["hidden_states"].shape
        if len(shape) == 3:  # packed
            frames, height, width = (call[name] for name in ("num_frames", "height", "width"))
        else:
            frames, height, width = shape[-3:] if tiny.family.channel_axis == 1 else (shape[1], *shape[-2:])
        image = call.get("encoder_hidden_states_image", call.get("image_embeds"))
        size = VideoSize(
            frames,
            height,
            width,
            call["encoder_hidden_states"].shape[1],
            num_image=image.shape[1] if image is not None else 0 if "ofs" in call else None,
            token_timesteps=call["timestep"].ndim == 2,
        )
        inputs = tiny.family.inputs(model.config, size)
        for argument, value in call.items():
            assert argument in inputs, argument
            if isinstance(value, Tensor):
                assert inputs[argument].shape == value.shape, argument

    def test_noise_levels_are_the_schedulers(self, tiny: Tiny) -> None:
        levels = tiny.family.noise_levels(copy.deepcopy(tiny.scheduler), 6, None)
        assert len(levels) == 6
        assert levels[0] > 0.8
        assert all(before > after >= 0 for before, after in pairwise(levels))

    def test_text_is_counted_where_attention_sees_it(self, tiny: Tiny) -> None:
        _, _, entries, constants, _ = self.recorded(tiny)
        streams = next(iter(entries.values()))
        assert constants.layout.num_text == num_text(tiny.family, streams)
        assert (constants.layout.num_text == 0) == (tiny.family.text == "apart")

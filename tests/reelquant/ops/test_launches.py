"""How kernels are launched: on the device of their tensors, and compiled once for all lengths."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import reelquant.ops
from reelquant.tokens import TokenLayout
from tests.reelquant.runtime.test_block_fusion import SPARSE, error, outputs, quantized

FOLDER = Path(reelquant.ops.__file__).parent
SOURCES = sorted({*FOLDER.glob("*/kernel.py"), *FOLDER.glob("*/launch.py")})
LENGTHS = {
    "num_tokens", "num_video", "num_text", "num_chunks", "num_keys", "num_values", "L", "tokens_of_part",
    "places", "width",
}  # fmt: skip
"""Arguments of kernels that change with a prompt or a video; `length` elsewhere than in column sums is a multiple of 128."""


def launches(tree: ast.AST, guarded: bool = False) -> Iterator[tuple[int, bool]]:
    """Lines where a kernel is launched, `kernel[grid](...)`, and whether that is within `with launching(...)`."""
    for node in ast.iter_child_nodes(tree):
        inside = guarded
        if isinstance(node, ast.With):
            calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
            inside |= any(isinstance(call.func, ast.Name) and call.func.id == "launching" for call in calls)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            yield node.lineno, inside
        yield from launches(node, inside)


def test_every_launch_is_on_the_device_of_its_tensors() -> None:
    # Two functions launch for a caller that has made the device current.
    within = {"launch.py": {"_run"}, "kernel.py": {"_vectors"}}
    found = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
            told = function.name in within[path.name]
            found += [(path, line, guarded or told) for line, guarded in launches(function)]
    assert len(found) >= 14
    assert not [f"{path}:{line}" for path, line, guarded in found if not guarded]


def test_no_kernel_is_compiled_for_a_length() -> None:
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    checked = set()
    for path in SOURCES:
        module = import_module(f"reelquant.ops.{path.parent.name}.{path.stem}")
        for name, kernel in vars(module).items():
            if not isinstance(kernel, JITFunction) or kernel.fn.__module__ != module.__name__ or name in DEVICE_SIDE:
                continue
            for parameter in kernel.params:
                if parameter.name in LENGTHS and not parameter.is_constexpr:
                    assert parameter.do_not_specialize, f"{path}: {name} is compiled anew for {parameter.name}"
                    checked.add(name)
    assert checked >= {
        "int8_linear_kernel", "_quantize_input", "_qk_norm_rope", "_grams", "_project", "band_attention_kernel",
        "eight_bit_attention_kernel", "partial_statistics", "final_statistics", "quantize_keys_values_kernel",
    }  # fmt: skip


DEVICE_SIDE = {"_tile", "_attend", "_residual", "_known", "_rows", "_passing"}
"""Functions that kernels call; nothing launches them."""


def test_kept_tensors_belong_to_a_stream() -> None:
    """Another stream would not wait for the one that makes a tensor; so the stream is a part of the key (`current_stream`)."""
    kept = {
        f"{path.relative_to(FOLDER.parent)}: {function.name}": [argument.arg for argument in function.args.args]
        for path in FOLDER.parent.rglob("*.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        and any(re.match(r"(lru_)?cache\b(?!d)", ast.unparse(decorator)) for decorator in function.decorator_list)
        and function.returns is not None
        and ast.unparse(function.returns) in ("Tensor", "BlockMask", "tuple[Tensor, ...]", "tuple[Tensor, Tensor]")
    }
    assert len(kept) >= 4
    assert [name for name, arguments in kept.items() if not {"device", "_stream"} <= set(arguments)] == []


def calls(device: str, length: int) -> dict[str, Callable[[], Any]]:
    """An operation of every kernel for so many tokens, 36 of them of the video's 3 frames."""
    from reelquant.ops.band_attention.op import band_attention
    from reelquant.ops.column_sums.op import column_sums
    from reelquant.ops.fake_quantization.op import fake_quantize
    from reelquant.ops.input_quantization.op import quantize_input
    from reelquant.ops.int8_linear.op import int8_linear
    from reelquant.ops.qk_norm_rope.op import qk_norm_rope
    from reelquant.ops.residual_factorization.op import factorize_refresh
    from reelquant.ops.rounding_error.op import rounding_error
    from reelquant.ops.weight_expansion.op import expand_weight

    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    def ones(num: int) -> torch.Tensor:
        return torch.ones(num, device=device)

    layout = TokenLayout(3, 3, 4, length - 36)
    q, k, v = drawn(length, 3, 2, 64).permute(1, 2, 0, 3)
    codes = torch.ones(length, 128, dtype=torch.int8, device=device)
    x, qkv, rotary = drawn(length, 128), drawn(length, 3 * 128), ones(36 * 64).view(36, 64)
    options: dict[str, Any] = {"kinds": "st", "layout": layout, "width": 9}
    before = factorize_refresh(q, k, 16, implementation="reference")[0]
    packed = torch.zeros(32, 64, dtype=torch.uint8, device=device)
    return {
        "int8_linear": lambda: int8_linear(codes, ones(length), codes[:32], ones(32), implementation="triton"),
        "input": lambda: quantize_input(x, bits=8, channel_scale=ones(128), implementation="triton"),
        "rotated": lambda: quantize_input(x, bits=8, rotation=torch.eye(64, device=device), implementation="triton"),
        "qk": lambda: qk_norm_rope(
            qkv.clone(),
            num_heads=2,
            norm_weights=(ones(64), ones(64)),
            rotary=(rotary, rotary),
            implementation="triton",
        ),
        "expansion": lambda: expand_weight(packed, bits=4, num_inputs=128, group_scale=None, implementation="triton"),
        "band": lambda: band_attention(q, k, v, implementation="triton", **options),
        "8 bits": lambda: band_attention(q, k, v, implementation="triton", precision="int8_fp8", **options),
        "column sums": lambda: column_sums(q, k, implementation="triton"),
        "refresh": lambda: factorize_refresh(q, k, 16, before=before, implementation="triton")[1],
        "fake quantization": lambda: fake_quantize(x, 1.0, 7, -1, implementation="triton"),
        "rounding error": lambda: rounding_error(x[:32], bits=4, implementation="triton"),
    }


@pytest.mark.gpu
def test_two_lengths_are_compiled_once() -> None:
    from triton.runtime.jit import JITFunction

    def compiled() -> dict[str, int]:
        modules = [import_module(f"reelquant.ops.{path.parent.name}.{path.stem}") for path in SOURCES]
        kernels = {
            f"{module.__name__}.{name}": kernel
            for module in modules
            for name, kernel in vars(module).items()
            if isinstance(kernel, JITFunction)
        }
        device = torch.cuda.current_device()
        ran = {name: kernel.device_caches for name, kernel in kernels.items() if device in kernel.device_caches}
        return {name: len(caches[device][0]) for name, caches in ran.items()}

    def run(length: int) -> None:
        for call in calls("cuda:0", length).values():
            call()

    run(112)
    first = compiled()
    assert sum(first.values()) >= 11
    for length in (113, 127, 160):
        run(length)
        assert compiled() == first, length


def same(found: Any, expected: Any) -> bool:
    if isinstance(found, torch.Tensor):
        return torch.equal(found.cpu().float(), expected.cpu().float())
    return all(same(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_operations_run_on_a_gpu_that_is_not_the_current_one() -> None:
    assert torch.cuda.current_device() == 0
    there, here = calls("cuda:1", 113), calls("cuda:0", 113)
    for name, call in there.items():
        assert same(call(), here[name]()), name
        assert torch.cuda.current_device() == 0


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("mode", ["auto", "off"])
def test_a_model_runs_on_a_gpu_that_is_not_the_current_one(mode: Any) -> None:
    here, there = (
        outputs(
            quantized(head_dim=64, sparse_attention=SPARSE).to(torch.bfloat16).to(device),
            mode,
            device=device,
            dtype=torch.bfloat16,
        )
        for device in ("cuda:0", "cuda:1")
    )
    assert torch.cuda.current_device() == 0
    for found, expected in zip(there, here, strict=True):
        assert error(found.cpu(), expected.cpu()) < 1e-3

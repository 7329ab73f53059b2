"""Triton kernels on a CPU: its interpreter, in a process of its own, because Triton reads the choice when it is imported. The
process imports once, and forks for each function."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.needs import need_module

ROOT = Path(__file__).resolve().parents[3]
# Triton 3.6 takes int() of an array with one element, which numpy 2.4 no longer converts. Its interpreter rounds to e4m3 with
# a carry that is lost, and cuts off to bfloat16; torch's rounding is the hardware's. Every call inside a kernel looks through
# the whole language for what a launch has not patched, a third of the time: once a launch will do. Reductions of our own go
# element by element, nearly all of a kernel's time: halves are combined as a whole instead, as the hardware does. Kernels
# overflow and make NaN on purpose, as the hardware does without a word.
PROCESS = """
import importlib.util, json, os, sys, traceback, warnings
import numpy
import torch
import triton.language as tl
from triton.runtime import interpreter

patch = interpreter._patch_lang_tensor

def patch_with_index(tensor, scope):
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

interpreter._patch_lang_tensor = patch_with_index
convert = interpreter._convert_float

def convert_as_torch(values, source, target, mode):
    if source != tl.float32 or target not in (tl.float8e4nv, tl.bfloat16):
        return convert(values, source, target, mode)
    wide = torch.from_numpy(numpy.ascontiguousarray(values).view(numpy.float32).copy())
    if target == tl.bfloat16:
        return wide.to(torch.bfloat16).view(torch.uint16).numpy()
    return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

interpreter._convert_float = convert_as_torch
patch_language, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

def patch_language_once(function):
    languages = tuple(value for value in function.__globals__.values() if value is tl or value is tl.core)
    if languages in patched:
        return interpreter._LangPatchScope()
    patched.add(languages)
    return patch_language(function)

def launch_patched(self, *args, **options):
    patched.clear()
    try:
        return launch(self, *args, **options)
    finally:
        patched.clear()

interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_language_once, launch_patched

def reduce_by_halves(self, values):
    kept_axis = self.axis
    values, axis = self.unravel(values, self.axis)
    while values[0].handle.data.shape[axis] > 1:
        halves = [numpy.split(value.handle.data, 2, axis) for value in values]
        first, second = ([self.to_tensor(half, v.dtype) for half, v in zip(each, values)] for each in zip(*halves))
        values = self.combine_fn.fn(*first, *second)
        values = values if isinstance(values, tuple) else (values,)
    found = [value.handle.data for value in values]
    if not self.keep_dims:
        found = [data.item() if kept_axis is None else data.squeeze(axis) for data in found]
    return [self.to_tensor(data, value.dtype) for data, value in zip(found, values)]

interpreter.ReduceOps.generic_reduce = reduce_by_halves
numpy.seterr(all="ignore")

def called(file, function):
    spec = importlib.util.spec_from_file_location("interpreted", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["interpreted"] = module
    spec.loader.exec_module(module)
    warnings.simplefilter("error")
    getattr(module, function)()

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            called(*json.loads(line))
        except BaseException:
            print(json.dumps(traceback.format_exc()), flush=True)
        else:
            print(json.dumps(None), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        print(json.dumps(f"the process of {line} died"), flush=True)
"""


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[[str, str], None]]:
    """`interpreted(file, function)` calls a function of a test file where Triton interprets kernels; what it asserts counts."""
    need_module("triton", extra="dev")

    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    asked, told = process.stdin, process.stdout

    def run(file: str, function: str) -> None:
        asked.write(json.dumps([file, function]) + "\n")
        asked.flush()
        answer = told.readline()
        assert answer, "the interpreter's process died"
        failed = json.loads(answer)
        assert failed is None, failed[-4000:]

    yield run
    process.communicate()

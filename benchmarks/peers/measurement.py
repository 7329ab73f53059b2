"""One peer with one seed, in a process of its own: `python -m benchmarks.peers.measurement TASK`.

Libraries that quantize change torch and diffusers for the whole process, so that two of them never share one. The task
and what was found are JSON files; what goes wrong is found too, a crash by `run_task`, from outside.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness import ROOT, read_record, write_json
from benchmarks.peers.adapters import Opened, Peer, block_linears
from benchmarks.peers.roster import PEERS, REFERENCE

ERROR_CHARACTERS = 300
STDERR_LINES = 3


@dataclass(frozen=True)
class Task:
    """What a process measures."""

    peer: str
    seed: int
    model: str
    generation: Mapping[str, Any]
    held_out: Sequence[str]
    calibration: Sequence[str]
    recognizer: str | None
    dtype: Literal["auto", "float32", "bfloat16"]
    threads: int
    reference: str
    """safetensors file of the reference's videos, by prompt: the peer `full_precision` writes it, all others read it."""
    result: str
    """JSON file, written last."""


def run_task(task: Task, *, timeout_s: float, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs a task in a process of its own and returns what it found, or `{"error": ...}` in a line."""
    result = Path(task.result)
    result.unlink(missing_ok=True)
    given = result.with_suffix(".task.json")
    write_json(given, asdict(task))
    command = command or [sys.executable, "-m", "benchmarks.peers.measurement", str(given)]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout_s:.0f} s"}
    if result.is_file():
        return read_record(result)
    return {"error": shortened(f"{_end_of_process(done.returncode)}: {_last_lines(done.stderr)}")}


def shortened(message: str) -> str:
    """A message in one line of at most `ERROR_CHARACTERS`."""
    line = " ".join(message.replace(f"{ROOT}/", "").split())
    return line if len(line) <= ERROR_CHARACTERS else line[: ERROR_CHARACTERS - 3] + "..."


def package_version(package: str | None) -> str | None:
    """Of an installed distribution; None where it is not installed."""
    try:
        return None if package is None else version(package)
    except PackageNotFoundError:
        return None


def measure(task: Task) -> dict[str, Any]:
    """Quantizes, generates every held-out prompt, compares with the reference's videos.

    Raises:
        ValueError: the peer's package is not installed.
    """
    peer = REFERENCE if task.peer == REFERENCE.name else PEERS[task.peer]
    if peer.package is not None and package_version(peer.package) is None:
        raise ValueError(
            f"{peer.package} is not installed: pip install -e '.[application,peers]', or pip install {peer.package}"
        )
    from safetensors.torch import load_file, save_file

    from reelquant.settings.generation import Numerics
    from workers.fidelity import fidelity
    from workers.perceptual import PerceptualDistance
    from workers.process import device_name, prepare_process
    from workers.recognition import DigitRecognizer

    device, dtype = prepare_process(Numerics(peer.dtype or task.dtype, task.threads))
    started = time.perf_counter()
    pipeline = _quantized(peer, task, device, dtype)
    quantize_s = time.perf_counter() - started
    recognizer = DigitRecognizer(Path(task.recognizer)) if task.recognizer else None
    perceptual = PerceptualDistance.available()
    found: dict[str, Any] = {"psnr_db": [], "ssim": [], "recognized": [], "lpips": []}
    videos, seconds = {}, []
    reference = {} if peer is REFERENCE else load_file(task.reference)
    for name, prompt in _named(task.held_out):
        begun = time.perf_counter()
        videos[name] = _generate(pipeline, task, prompt, stage="evaluation", name=name)
        seconds.append(time.perf_counter() - begun)
        video = videos[name].float() / 255
        if recognizer is not None:
            found["recognized"].append(recognizer.recognized(video, prompt))
        if peer is not REFERENCE:
            for metric, value in fidelity(reference[name].float() / 255, video, perceptual).items():
                found[metric].append(value)
    if peer is REFERENCE:
        save_file(videos, task.reference)
    found = {metric: values for metric, values in found.items() if values}
    found |= {"seconds_per_video": statistics.median(seconds), "quantize_s": quantize_s, "device": device_name(device)}
    return found | {"dtype": str(dtype).removeprefix("torch."), "sizes": _sizes(peer, task, device)}


def _named(prompts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Prompts with the names that a run gives them; a name decides the noise."""
    return ((f"prompt-{index:03d}", prompt) for index, prompt in enumerate(prompts))


def _generate(pipeline: Any, task: Task, prompt: str, *, stage: str, name: str) -> Any:
    from reelquant.settings.generation import Generation
    from workers.generation import generate
    from workers.messages import PromptUnit
    from workers.process import unit_seed

    seed = unit_seed(task.seed, stage, name)
    generation = Generation(**task.generation)
    unit = PromptUnit(name, prompt)
    return generate(pipeline, unit, generation, seed=seed, progress=lambda _done, _total: None).video.contiguous()


def _quantized(peer: Peer, task: Task, device: Any, dtype: Any, *, num_calibration: int | None = None) -> Any:
    from workers.model_source import open_pipeline

    folder = Path(task.model)
    pipeline = open_pipeline(folder, device=device, dtype=dtype)

    def calibrate() -> None:
        for name, prompt in list(_named(task.calibration))[:num_calibration]:
            _generate(pipeline, task, prompt, stage="trajectories", name=name)

    quantized = peer.quantize(Opened(pipeline, folder, dtype, block_linears(pipeline.transformer), calibrate))
    quantized.transformer.eval()
    return quantized


def _sizes(peer: Peer, task: Task, device: Any) -> dict[str, Any]:
    """Of the model quantized from 16 bits, as people store it: float32 is only what it is measured in here."""
    import torch

    from benchmarks.peers.sizes import tensor_bytes, transformer_sizes
    from workers.model_source import family_of_model, linear_shapes, transformer_config

    folder = Path(task.model)
    transformer = _quantized(peer, task, device, torch.bfloat16, num_calibration=1).transformer
    state = transformer.state_dict()
    if peer.package is None:
        return {"transformer_bytes": sum(map(tensor_bytes, state.values()))}
    shapes = linear_shapes(transformer_config(folder), family_of_model(folder))
    in_blocks = {name: shapes[name] for name in shapes if name.split(".")[0].endswith("transformer_blocks")}
    return asdict(transformer_sizes(state, in_blocks, peer.value_bits))


def _end_of_process(returncode: int) -> str:
    if returncode >= 0:
        return f"the process ended with status {returncode}"
    try:
        return f"the process died of {signal.Signals(-returncode).name}"
    except ValueError:
        return f"the process died of signal {-returncode}"


def _last_lines(text: str) -> str:
    return " | ".join([line.strip() for line in text.splitlines() if line.strip()][-STDERR_LINES:])


def main() -> None:
    """Measures the task in the file named on the command line."""
    task = Task(**read_record(Path(sys.argv[1])))
    try:
        found = measure(task)
    except Exception as error:  # noqa: BLE001  (whatever a library raises is what the row says)
        found = {"error": shortened(f"{type(error).__name__}: {error}")}
    write_json(Path(task.result), found)


if __name__ == "__main__":
    main()

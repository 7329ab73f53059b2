"""The golden run: computed by this checkout or, in a process of its own, by another commit's, and its digests.

| digest | of | changes with |
|---|---|---|
| `weights` | dtype, shape and bytes of every tensor of a checkpoint's transformer, by name | calibration, rounding, packing |
| `values` | the numbers among the JSON: head kinds, velocity correction | calibration |
| `latents` | what the checkpoint generates | the library at work: linears, attention, steps |
| `files` | every file, by path | all of these, and the format |
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.pipeline.small_run import call

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("run.yaml")
RECORD = Path(__file__).with_name("digests.json")
CHECKPOINTS = {"learned": "checkpoint", "rounded": "checkpoints/rounded"}
"""Folder below the run by method."""
GENERATE = """
import sys
import torch
import reelquant
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
torch.set_num_threads(1)
for checkpoint, output in zip(sys.argv[1::2], sys.argv[2::2]):
    latents = DiffusionPipeline.from_pretrained(checkpoint)(
        "the digit 4 moving left", height=48, width=64, num_frames=9, num_inference_steps=4, max_sequence_length=32,
        generator=torch.Generator().manual_seed(5), output_type="latent",
    ).frames
    save_file({"latents": latents}, output)
"""

Digests = dict[str, Any]


def platform_key() -> str:
    """All that may decide a result's last digits besides this repository: packages, processor, threads."""
    packages = " ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "numpy"))
    return f"{packages} | {_processor()} {torch.backends.cpu.get_cpu_capability()} | 1 thread"


def _processor() -> str:
    """Architecture and model: libraries choose kernels by more than the vector width."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.is_file() else []
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    model = [values[name] for name in ("vendor_id", "cpu family", "model") if name in values]
    return " ".join([platform.machine(), *model])


def golden_digests(folder: Path, *, source: Path = ROOT) -> dict[str, Digests]:
    """Computes the run in `folder` with the code of `source`, and returns the digests of each method's checkpoint."""
    arguments = ("run", str(CONFIG), "--set", f"run={folder / 'run'}", "--until", "assembly")
    if source == ROOT:
        done = call(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        _python(source, "-m", "pipeline", *arguments)
    checkpoints = {method: folder / "run" / name for method, name in CHECKPOINTS.items()}
    latents = {method: folder / f"{method}.safetensors" for method in CHECKPOINTS}
    _python(source, "-c", GENERATE, *(str(path) for m in CHECKPOINTS for path in (checkpoints[m], latents[m])))
    return {m: {**checkpoint_digests(checkpoints[m]), "latents": tensors_digest([latents[m]])} for m in CHECKPOINTS}


def _python(source: Path, *arguments: str) -> None:
    """Runs this interpreter on the code in `source`."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=source, env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def checkpoint_digests(checkpoint: Path) -> Digests:
    """`weights`, `values` and `files` of a checkpoint."""
    config = json.loads((checkpoint / "transformer" / "config.json").read_text())["quantization_config"]
    values = {
        "head_kinds": (config["sparse_attention"] or {}).get("head_kinds"),
        "velocity_correction": config["velocity_correction"],
    }
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    return {
        "weights": tensors_digest(sorted((checkpoint / "transformer").glob("*.safetensors"))),
        "values": _sha256(json.dumps(values, sort_keys=True).encode()),
        "files": {path.relative_to(checkpoint).as_posix(): _sha256(path.read_bytes()) for path in files},
    }


def tensors_digest(paths: list[Path]) -> str:
    """Of dtype, shape and bytes of all tensors in the files, by name; how they are spread over the files does not count."""
    lines = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name).contiguous()
                data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                lines.append(f"{name} {tensor.dtype} {list(tensor.shape)} {_sha256(data)}")
    return _sha256("\n".join(sorted(lines)).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def differences(expected: dict[str, Digests], found: dict[str, Digests]) -> list[str]:
    """What differs, numbers first: `learned: weights`, `learned: transformer/config.json`."""
    parts = []
    for method in sorted(expected.keys() | found.keys()):
        one, other = expected.get(method, {}), found.get(method, {})
        parts += [f"{method}: {name}" for name in ("weights", "values", "latents") if one.get(name) != other.get(name)]
        before, now = one.get("files", {}), other.get("files", {})
        names = sorted(before.keys() | now.keys())
        parts += [f"{method}: {name}" for name in names if before.get(name) != now.get(name)]
    return parts


def read_record() -> dict[str, Any]:
    """`base`, the commit that made the digests, and `digests` by platform."""
    record: dict[str, Any] = json.loads(RECORD.read_text())
    return record


def write_record(base: str, digests: dict[str, Any]) -> None:
    RECORD.write_text(json.dumps({"base": base, "digests": digests}, indent=1, sort_keys=True) + "\n")


def unpack_commit(commit: str, folder: Path) -> Path:
    """The files of a commit, in `folder`.

    Raises:
        LookupError: there is no git, or it does not have the commit.
    """
    try:
        done = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise LookupError("git is not installed") from error
    if done.returncode:
        raise LookupError(done.stderr.decode(errors="replace").strip())
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def head() -> str:
    """The commit of this checkout.

    Raises:
        ValueError: files differ from it, so that it does not say what made a result.
    """
    recorded = [f":!{path.relative_to(ROOT)}" for path in (RECORD, RECORD.with_name("messages.txt"))]
    status = _git("status", "--porcelain", "--", ".", *recorded)
    if status:
        raise ValueError(f"commit these first, as the record names the commit that made it:\n{status}")
    return _git("rev-parse", "HEAD")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

"""The golden run gives the bytes that it gave, or, on a machine without a record, those of the recorded commit's code.

`python -m pytest tests/golden --record-golden` takes what comes out now (CONTRIBUTING.md, numerics proof).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden.golden_run import (
    checkpoint_digests,
    differences,
    golden_digests,
    head,
    platform_key,
    read_record,
    unpack_commit,
    write_record,
)
from tests.needs import lacking

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The run's folder and its digests."""
    folder = tmp_path_factory.mktemp("golden")
    return folder, golden_digests(folder)


def recorded_code_gives(folder: Path, commit: str) -> dict[str, Any]:
    """The digests by the code of a commit, computed here."""
    try:
        source = unpack_commit(commit, folder / "source")
    except LookupError as error:
        lacking(f"no digests for {platform_key()!r} in tests/golden/digests.json, and none can be made: {error}")
    return golden_digests(folder, source=source)


def test_every_byte_is_as_recorded(
    computed: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    pytestconfig: pytest.Config,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, found = computed
    stored = json.loads((folder / "run" / "checkpoint" / "transformer" / "config.json").read_text())
    parts = {name for name, part in stored["quantization_config"].items() if part}
    assert {"velocity_correction", "step_protection", "sparse_attention"} <= parts, "the run does not cover them"
    record, key = read_record(), platform_key()
    expected = record["digests"].get(key)
    known = expected is not None
    if not known:
        expected = recorded_code_gives(tmp_path, record["base"])
    changed = differences(expected, found)
    if pytestconfig.getoption("--record-golden"):
        if changed:
            write_record(head(), {key: found})
        elif not known:
            write_record(record["base"], {**record["digests"], key: found})
        with capsys.disabled():
            print(f"\nchanged since {record['base'][:12]}:", *changed or ["nothing"], sep="\n  ")
        return
    assert changed == [], f"changed since {record['base']}; if that is meant: CONTRIBUTING.md, numerics proof"


def test_digests_tell_numbers_from_the_way_they_are_stored(
    computed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, found = computed
    checkpoint = folder / "run" / "checkpoint"
    again = {"learned": {**found["learned"], **checkpoint_digests(checkpoint)}}
    assert differences({"learned": found["learned"]}, again) == []
    transformer = checkpoint / "transformer"
    shards = sorted(transformer.glob("*.safetensors"))
    assert len(shards) > 1
    contents = {shard: load_file(shard) for shard in shards}
    first, second = contents[shards[0]], contents[shards[1]]
    moved = next(iter(first))
    second[moved] = first.pop(moved)
    for shard in shards[:2]:
        save_file(contents[shard], shard)
    again["learned"].update(checkpoint_digests(checkpoint))
    assert differences({"learned": found["learned"]}, again) == [
        f"learned: transformer/{shard.name}" for shard in shards[:2]
    ]
    tensor = second[moved].flatten().view(torch.uint8)
    tensor[0] ^= 1
    save_file(contents[shards[1]], shards[1])
    again["learned"].update(checkpoint_digests(checkpoint))
    assert differences({"learned": found["learned"]}, again)[0] == "learned: weights"

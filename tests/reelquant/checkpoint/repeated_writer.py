"""What processes that write one checkpoint over and over do. Imports neither pytest nor diffusers: each of them would anew."""

import itertools
from multiprocessing.connection import Connection
from pathlib import Path

from reelquant.checkpoint.writer import write_checkpoint
from storage.folder import Folder


def write(source: Path, output: Path, artifacts: list[Path]) -> None:
    """Puts the checkpoint, a file a tensor, in its place as a run does."""

    def write_folder(folder: Path) -> None:
        write_checkpoint(source, folder, artifacts=artifacts, bits="W4A6", method="test", max_shard_bytes=1)

    Folder(output.parent).put_folder(output.name, write_folder, last="model_index.json")


def write_on_and_on(connection: Connection, source: Path, output: Path, artifacts: list[Path]) -> None:
    """Writes the checkpoint until killed; tells how often it has, or why it could not."""
    for number in itertools.count(1):
        try:
            write(source, output, artifacts)
        except OSError as error:
            connection.send(repr(error))
        connection.send(number)

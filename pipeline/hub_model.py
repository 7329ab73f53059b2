"""`model:` of a configuration as a folder, or as an id of the Hugging Face Hub at a commit that is resolved once.

    model, model_revision -> pinned -> model_commit, recorded in the run's config.json
    model_commit, model_variant -> find_model -> the files that loaders read -> run: fetched, checked; plan: outlined

A folder of the name comes before an id. A run that is resumed keeps the commit that it recorded.
"""

from __future__ import annotations

import atexit
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory, mkdtemp

from huggingface_hub import HfApi, constants, get_cached_repo_tree
from huggingface_hub.errors import CachedRepoTreeNotFoundError, SafetensorsParsingError

from pipeline.config.loading import ConfigError
from pipeline.config.schema import RunConfig
from reelquant.checkpoint.pipeline_files import MODEL_INDEX, list_files, read_components
from storage.location import Location
from storage.run_directory import RunDirectory
from workers.hub_snapshot import HUB_ERRORS, HubSnapshot, ask_directly, fetch_files, hub_problem, model_folder

_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHT_INDEX = re.compile(r"\.safetensors\.index(\.\w+)?\.json$")
_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class FoundModel:
    """Where a model is read on this machine."""

    folder: Path
    """The user's; the snapshot in the Hub's cache; or, where the cache lacks weights, its outline: all other files, and of
    the weights their headers, with the size of the whole."""
    snapshot: HubSnapshot | None = None
    """What workers fetch; None for a folder."""
    missing_bytes: int = 0
    """Of files that the cache lacks."""
    problems: tuple[str, ...] = ()
    """What the repository lacks of a pipeline's files."""

    @property
    def name(self) -> str:
        """Of the folder, or the repository's id."""
        return self.folder.name if self.snapshot is None else self.snapshot.repo_id

    @property
    def is_outline(self) -> bool:
        """Whether weights have to be fetched first."""
        return self.missing_bytes > 0

    def named(self, problems: Iterable[str]) -> list[str]:
        """Problems with the repository's id where an outline's folder stands in them."""
        return [problem.replace(str(self.folder), self.name) if self.is_outline else problem for problem in problems]


def could_be_hub_id(model: Path) -> bool:
    """Whether `model:` has the form `owner/name`."""
    return not model.is_absolute() and len(model.parts) == 2 and ".." not in model.parts


def is_hub_id(model: Path) -> bool:
    """Whether `model:` is an id of the Hub: nothing of that name is here."""
    return could_be_hub_id(model) and not model.exists()


def pinned(config: RunConfig, *, others: Iterable[Location] = ()) -> tuple[RunConfig, str | None]:
    """The configuration with its model's commit, and one line about it; of a folder, as it is.

    The commit is that of the configuration, else the one that the run recorded for the same model and revision, else the one
    of `others`, else what the Hub or its cache says of the revision.

    Args:
        others: runs that must have the same, such as those of a study.

    Raises:
        ConfigError: the model cannot be one of the Hub, or the Hub does not tell its commit.
    """
    if not is_hub_id(config.model):
        if config.model_revision is None and config.model_commit is None:
            return config, None
        given = " and ".join(key for key in ("model_revision", "model_commit") if getattr(config, key) is not None)
        raise ConfigError([f"{given}: model {config.model} is a path, not an id of the Hub: leave it out"])
    if config.model_commit is not None:
        return config, f"model: {config.hub_model}"
    repo_id, revision = config.model.as_posix(), config.model_revision or constants.DEFAULT_REVISION
    recorded = (commit for place in (config.run, *others) if (commit := _recorded_commit(place, config)))
    if (commit := next(recorded, None)) is not None:
        said = f"model: {repo_id} stays at commit {commit}, as the run recorded it{_moved(repo_id, revision, commit)}"
    else:
        try:
            commit = resolve_revision(config)
        except ConfigError as error:
            raise ConfigError(
                [f"model: {config.model} is not a folder here, and as an id of the Hub: {error}"]
            ) from error
        said = f"model: {repo_id} at commit {commit} ({revision})"
    return config.model_copy(update={"model_commit": commit}), said


def resolve_revision(config: RunConfig) -> str:
    """The commit of a model on the Hub at its `model_revision`, as the Hub says, or its cache where that cannot be asked.

    Raises:
        ConfigError: neither knows; says why, and every way out.
    """
    repo_id, revision = config.model.as_posix(), config.model_revision or constants.DEFAULT_REVISION
    try:
        ask_directly()
        return HfApi().resolve_revision(repo_id, revision=revision).resolved
    except HUB_ERRORS as error:
        raise ConfigError([hub_problem(error, repo_id, revision)]) from error


def find_model(config: RunConfig) -> FoundModel:
    """Where the model of a pinned configuration is; of a repository all files but the weights are fetched.

    Raises:
        ConfigError: there is no such folder, or the repository cannot be read or is no diffusers pipeline.
    """
    if config.model_commit is None:
        if not config.model.is_dir():
            raise ConfigError([_not_found(config.model)])
        return FoundModel(config.model)
    repo_id, commit = config.model.as_posix(), config.model_commit
    try:
        listing = _list_repository(repo_id, commit, config.model_variant)
        small = [name for name in listing.sizes if not name.endswith(_WEIGHTS)]
        folder = fetch_files(repo_id, commit, small)
        snapshot = HubSnapshot(repo_id, commit, tuple(listing.sizes))
        missing = sum(size for name, size in listing.sizes.items() if not (folder / name).is_file())
        found = _outline(snapshot, folder, tuple(listing.sizes.values())) if missing else folder
    except HUB_ERRORS as error:
        raise ConfigError([f"model: {hub_problem(error, repo_id, commit)}"]) from error
    return FoundModel(found, snapshot, missing, listing.problems)


def fetch_model(model: FoundModel) -> None:
    """Fetches what the cache lacks, with progress bars in a terminal.

    Raises:
        OSError: it cannot be fetched.
    """
    if model.snapshot is not None:
        model_folder(model.snapshot, bars=True)


def _not_found(model: Path) -> str:
    if model.exists():
        return f"model: {model} is a file; give the folder of a diffusers pipeline"
    return (
        f"model: {model} is not a folder, and no id of the Hub, which is owner/name: give the folder of a diffusers pipeline, "
        "or an id such as hunyuanvideo-community/HunyuanVideo"
    )


def _recorded_commit(place: Location, config: RunConfig) -> str | None:
    """The commit in a run's `config.json`, if that has the same model and revision."""
    try:
        stored = RunDirectory.open(place).config
    except (ValueError, OSError):  # no run, or none that can be read: whoever opens it says so
        return None
    if (stored.get("model"), stored.get("model_revision")) != (str(config.model), config.model_revision):
        return None
    commit = stored.get("model_commit")
    return commit if isinstance(commit, str) else None


def _moved(repo_id: str, revision: str, commit: str) -> str:
    """Words for a revision that is at another commit by now, as far as the Hub can be asked."""
    if _COMMIT.fullmatch(revision) or constants.is_offline_mode():
        return ""
    try:
        ask_directly()
        now = HfApi().repo_info(repo_id, revision=revision, timeout=constants.DEFAULT_ETAG_TIMEOUT).sha
    except HUB_ERRORS:
        return ""
    if now in (None, commit):
        return ""
    return f"; {revision} is at {now} now, which `run --update --set model_revision={now}` takes"


@dataclass(frozen=True)
class _Listing:
    sizes: Mapping[str, int]
    """Bytes of the files that the loaders read, by name."""
    problems: tuple[str, ...]


@lru_cache(maxsize=32)
def _list_repository(repo_id: str, commit: str, variant: str | None) -> _Listing:
    """The files that the loaders read, by the rule for folders (`list_files`): in a folder with empty files of all the names,
    and the few in it that the rule reads."""
    folder = fetch_files(repo_id, commit, [MODEL_INDEX])
    sizes = _tree(repo_id, commit, folder)
    if MODEL_INDEX not in sizes:
        shown = ", ".join(sorted(sizes)[:8])
        raise ConfigError(
            [
                f"model: {repo_id} at {commit} has no {MODEL_INDEX}, so it is no diffusers pipeline (it holds {shown}): give "
                "the repository in diffusers format, often named ...-diffusers, or a revision that has it"
            ]
        )
    try:
        components = read_components(folder)
    except ValueError as error:
        raise ConfigError([f"model: {str(error).replace(str(folder), repo_id)}"]) from error
    inside = [name for name in sizes if PurePosixPath(name).parts[0] in components]
    read = [MODEL_INDEX, *(name for name in inside if _WEIGHT_INDEX.search(name))]
    fetch_files(repo_id, commit, read)
    with TemporaryDirectory(prefix="reelquant-listing-") as made:
        listed = Path(made)
        for name in inside:
            (listed / name).parent.mkdir(parents=True, exist_ok=True)
            (listed / name).touch()
        for name in read:
            shutil.copyfile(folder / name, listed / name)
        files, problems = list_files(listed, variant=variant)
        names = [path.relative_to(listed).as_posix() for path in files.values()]
        said = tuple(f"model: {problem.replace(str(listed), repo_id)}" for problem in problems)
    return _Listing({name: sizes[name] for name in names}, said)


def _tree(repo_id: str, commit: str, folder: Path) -> dict[str, int]:
    """Bytes of all files of a repository by name; offline, and fetched by other programs, of those in the cache."""
    try:
        found = {file.path: file.size for file in get_cached_repo_tree(repo_id, revision=commit)}
    except CachedRepoTreeNotFoundError:
        files = (path for path in folder.rglob("*") if path.is_file())
        found = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return {name: size for name, size in found.items() if _is_inside(PurePosixPath(name))}


def _is_inside(name: PurePosixPath) -> bool:
    return not name.is_absolute() and ".." not in name.parts and "\\" not in str(name)


@lru_cache(maxsize=32)
def _outline(snapshot: HubSnapshot, folder: Path, sizes: tuple[int, ...]) -> Path:
    """A folder for as long as this process lives: links to the files that are there, and files without content that have the
    header and the size of the weights that are not."""
    outline = Path(mkdtemp(prefix="reelquant-outline-"))
    atexit.register(shutil.rmtree, outline, ignore_errors=True)
    for name, size in zip(snapshot.files, sizes, strict=True):
        place = outline / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (folder / name).is_file():
            place.symlink_to(folder / name)
            continue
        header, num_bytes = _header(snapshot, name, size)
        with place.open("wb") as file:
            file.write(header)
            file.truncate(num_bytes)
    return outline


def _header(snapshot: HubSnapshot, name: str, size: int) -> tuple[bytes, int]:
    """The header of a safetensors file (its length, and JSON that is padded to it), and the bytes of the whole file.

    Raises:
        ConfigError: the file is no safetensors file.
    """
    try:
        found = HfApi().parse_safetensors_file_metadata(snapshot.repo_id, name, revision=snapshot.commit)
    except SafetensorsParsingError as error:
        raise ConfigError([f"model: {snapshot.repo_id}/{name} is no safetensors file ({error})"]) from error
    tensors = {
        key: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
        for key, tensor in found.tensors.items()
    }
    data = max((tensor.data_offsets[1] for tensor in found.tensors.values()), default=0)
    text = json.dumps(tensors, separators=(",", ":")).encode()
    num_bytes = max(size - data - 8, len(text))
    return num_bytes.to_bytes(8, "little") + text.ljust(num_bytes), max(size, 8 + num_bytes + data)

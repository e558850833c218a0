"""Models from the Hugging Face Hub: `org/name` or `org/name@revision`, downloaded into the usual cache.

    folder, commit = download("org/name", "main")
    Remote("org/name", "main").parameters          # from headers: some kilobytes instead of gigabytes

Only weights as safetensors, settings and tokenizer files are fetched, never code. A token comes from HF_TOKEN alone. A branch
is resolved to its commit first, so that a merge can be repeated. Without network the cache answers.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError, ResourceError
from fusion.files import list_tensors
from fusion.header import TensorInfo, check_entries
from fusion.side_files import is_side_file

_REF = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./+-]+))?")
_SMALL = (".json", ".txt", ".model", ".jinja")
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Repo:
    """A model (or a `kind` "dataset") on the Hub at one commit: its files worth having with their sizes in bytes."""

    name: str
    commit: str
    files: Mapping[str, int]
    kind: str = "model"


def parse(text: str) -> tuple[str, str] | None:
    """Name and revision of "org/name[@revision]" ("main" when none is given); None when the text is no such reference."""
    found = _REF.fullmatch(text)
    if found is None or set(found[1].split("/")) & {".", ".."}:
        return None
    return found[1], found[2] or "main"


def look_up(name: str, revision: str) -> Repo:
    """What the Hub has under this name; CheckpointError when it has nothing, does not show it, or cannot be reached."""
    with _border(name, revision):
        info = _api().model_info(name, revision=revision, files_metadata=True)
    wanted = {file.rfilename: file.size or 0 for file in info.siblings or () if _wanted(file.rfilename)}
    if not any(file.endswith(".safetensors") for file in wanted):
        raise CheckpointError("the model has no safetensors weights on the Hub", where=name,
                              todo="Download it yourself and give the folder.")
    return Repo(name, str(info.sha), wanted)


def _wanted(file: str) -> bool:
    plain = _NAME.fullmatch(file) and file.endswith((*_SMALL, ".safetensors")) and not file.startswith("consolidated")
    return bool(plain) or is_side_file(file)


def download(name: str, revision: str) -> tuple[Path, str]:
    """Fetch what is missing and return the folder and the commit; ResourceError when the disk is too small."""
    try:
        repo = look_up(name, revision)
    except _Unreachable:
        return _cached(name, revision)
    _check_disk(repo)
    return _fetch(repo, list(repo.files)), repo.commit


def dataset(name: str, revision: str, card: str, choose: Callable[[list[str], str], list[str]]) -> tuple[Path, list[str]]:
    """Fetch some files of a dataset: those that `choose` takes of all names and the text of its `card`; the folder and their names.

    Raises as `look_up` and `download` do, and what `choose` raises.
    """
    try:
        with _border(name, revision, "dataset"):
            info = _api().dataset_info(name, revision=revision, files_metadata=True)
    except _Unreachable:
        with _border(name, revision, "dataset"):
            folder = _snapshot(name, revision, "dataset", local_files_only=True)
        return folder, choose([file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()],
                              _text(folder / card))
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or () if ".." not in file.rfilename.split("/")}
    folder = _fetch(Repo(name, str(info.sha), {}, "dataset"), [card]) if card in sizes else None
    files = choose(list(sizes), _text(folder / card) if folder else "")
    repo = Repo(name, str(info.sha), {file: sizes[file] for file in files}, "dataset")
    _check_disk(repo)
    return _fetch(repo, files), files


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


class Remote(Checkpoint):
    """A model on the Hub of which only small files and headers are fetched: everything but numbers is known.

    Reading a weight is a CheckpointError. Raises as `look_up` does.
    """

    def __init__(self, repo_name: str, revision: str, name: str | None = None):
        self.repo = look_up(repo_name, revision)
        folder = _fetch(self.repo, [file for file in self.repo.files if not file.endswith(".safetensors")])
        stored = list_tensors(folder, self._header, self.repo.files)
        super().__init__(folder, name or repo_name.split("/")[1], revision=self.repo.commit, stored=stored)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """CheckpointError: there are no weights here."""
        raise CheckpointError("its weights are not downloaded", where=self.name, todo="Open it with `open_checkpoint`.")

    def raw_into(self, name: str, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """See `raw`."""
        return self.raw(name)

    def span(self, name: str) -> None:
        """No file on this disk."""
        return

    @property
    def fingerprint(self) -> str:
        """The commit stands for the content."""
        return self.repo.commit

    @property
    def stamps(self) -> dict[Path, tuple[int, int, int]]:
        """No file on this disk."""
        return {}

    @property
    def origin(self) -> str:
        """See Checkpoint."""
        return f"{self.repo.name}@{self.repo.commit}"

    def _equal(self, one: str, other: str) -> bool:
        return self._says_tied is True and self.info[one].shape == self.info[other].shape

    def _header(self, path: Path) -> list[TensorInfo]:
        with _border(self.repo.name, self.repo.commit):
            header = _api().parse_safetensors_file_metadata(self.repo.name, path.name, revision=self.repo.commit)
        entries = {name: {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": list(entry.data_offsets)}
                   for name, entry in header.tensors.items()}
        size = self.repo.files[path.name]
        used = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        return check_entries(entries, path, size - used, size)


class _Unreachable(CheckpointError):
    """The Hub does not answer; the cache may."""


def _token() -> str | bool:
    return os.environ.get("HF_TOKEN") or False  # False: also no token that was stored on this machine


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=_token())


def _fetch(repo: Repo, files: list[str]) -> Path:
    with _border(repo.name, repo.commit, repo.kind):
        return _snapshot(repo.name, repo.commit, repo.kind, allow_patterns=[escape(file) for file in files])


def _snapshot(name: str, revision: str, kind: str, **more: Any) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, repo_type=kind, token=_token(),
                                  endpoint=os.environ.get("HF_ENDPOINT"), **more))


def _cached(name: str, revision: str) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    with _border(name, revision):
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True, ignore_patterns=["*/*", "consolidated*"],
                                        allow_patterns=[f"*{end}" for end in (*_SMALL, ".safetensors")]))
    return folder, folder.name


def _check_disk(repo: Repo) -> None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    missing = sum(size for file, size in repo.files.items()
                  if not isinstance(try_to_load_from_cache(repo.name, file, revision=repo.commit, repo_type=repo.kind), str))
    folder = Path(HF_HUB_CACHE)
    folder = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise ResourceError(f"downloading it takes {missing} bytes, the disk of {folder} has {free} free", where=repo.name,
                            todo="Free some space, or set HF_HOME to another disk.")


@contextmanager
def _border(name: str, revision: str, kind: str = "model") -> Iterator[None]:
    """Turn what the Hub's library raises into errors for people."""
    from huggingface_hub import errors

    path = f"datasets/{name}" if kind == "dataset" else name

    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(f"the {kind} is gated", where=name,
                              todo=f"Accept its terms on https://huggingface.co/{path} and set HF_TOKEN.") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"the {kind} has no revision {revision!r}", where=name,
                              todo="Give a branch, tag or commit.") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"there is no such folder, and no such {kind} on the Hub (or it is private)", where=name,
                              todo=f"Check the spelling; for a private {kind} set HF_TOKEN.") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"this is no folder and no name of a {kind} ({error})", where=name) from error
    except (errors.HfHubHTTPError, errors.SafetensorsParsingError) as error:
        raise CheckpointError(f"the Hub did not give it ({str(error).strip().splitlines()[0][:200]})", where=name,
                              todo="Try again later.") from error
    except (errors.HTTPError, ConnectionError, errors.LocalEntryNotFoundError) as error:  # no answer, offline, not in the cache
        raise _Unreachable("there is no such folder, and the Hub cannot be reached", where=name,
                           todo="Check the path, or the network.") from error

"""The models in a folder as people keep them: plain ones, organisation/name, fusion runs, the Hugging Face cache.

    for found in models_in(Path("~/.cache/huggingface").expanduser()):
        print(found.name, found.folder)        # org/name, …/hub/models--org--name/snapshots/<commit>

Only names and links are looked at; nothing is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_DEPTHS = ("*", "*/*", "*/targets/*")  # where checkpoints lie in a folder; the last are of fusion runs
_HUBS = ("", "hub", "huggingface/hub")  # where the cache lies in the folder that a person may give
_CACHED = "models--"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Found:
    """A model's name, unique in its folder, and where it lies."""

    name: str
    folder: Path


def models_in(root: Path) -> list[Found]:
    """Every model in a folder, by name; the folder itself when it is one."""
    if (root / "config.json").is_file():
        return [Found(cached_name(root) or root.resolve().name, root)]
    return list(_revisions(root)) if root.name.startswith(_CACHED) else [*_plain(root), *_cached(root)]


def cached_name(folder: Path) -> str:
    """org/name of a snapshot in the Hugging Face cache; "" for any other folder."""
    snapshots = Path(os.path.abspath(folder)).parent
    inside = snapshots.name == "snapshots" and snapshots.parent.name.startswith(_CACHED)
    return _name(snapshots.parent) if inside else ""


def nothing_in(root: Path) -> str:
    """Why a folder offers no model, in words; "" when it does offer some."""
    if not root.is_dir():
        return "There is no such folder of models."
    if models_in(root):
        return ""
    other = next((kind for kind, pattern in (("GGUF", "**/*.gguf"), ("adapters", "**/adapter_config.json"))
                  if any(True for _ in root.glob(pattern))), "")
    hint = {"GGUF": " Its GGUF files cannot be merged.", "adapters": " Its adapters need a base: add them under Open a folder."}
    return ("No model was found in the folder of models: a model is a folder with config.json and safetensors weights, at most two "
            f"levels down, or a repository of the Hugging Face cache.{hint.get(other, '')}")


def _plain(root: Path) -> Iterator[Found]:
    for config in sorted(config for depth in _DEPTHS for config in root.glob(f"{depth}/config.json")):
        parts = config.parent.relative_to(root).parts
        if not any(part.startswith((".", _CACHED)) for part in parts):
            yield Found("/".join(parts), config.parent)


def _cached(root: Path) -> Iterator[Found]:
    for hub in _HUBS:
        for repo in sorted((root / hub).glob(f"{_CACHED}*")):
            yield from _revisions(repo)


def _revisions(repo: Path) -> Iterator[Found]:
    """The snapshots of a repository: the one that "main" names, else the newest, by the name alone, others with their revision."""
    snapshots = [folder for folder in sorted(repo.glob("snapshots/*")) if _whole(folder, repo)]
    if not snapshots:
        return
    refs = [file for file in sorted(repo.glob("refs/**/*")) if file.is_file() and not file.is_symlink()]
    branches = {_commit(file): file.relative_to(repo / "refs").as_posix() for file in refs}
    newest = max(snapshots, key=lambda folder: (branches.get(folder.name) == "main", folder.stat().st_mtime_ns, folder.name))
    yield Found(_name(repo), newest)
    for folder in snapshots:
        if folder != newest:
            yield Found(f"{_name(repo)}@{branches.get(folder.name, folder.name[:7])}", folder)


def _whole(folder: Path, repo: Path) -> bool:
    """Whether a snapshot is a model of which every file lies in its repository: links are followed nowhere else."""
    if folder.is_symlink() or not (folder / "config.json").is_file():
        return False
    inside, files = repo.resolve(), [file for file in folder.iterdir() if not file.is_dir() or file.is_symlink()]
    return (any(file.name.endswith(_WEIGHTS) for file in files)
            and all(file.is_file() and file.resolve().is_relative_to(inside) for file in files))


def _name(repo: Path) -> str:
    return repo.name.removeprefix(_CACHED).replace("--", "/")


def _commit(ref: Path) -> str:
    try:
        return ref.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""

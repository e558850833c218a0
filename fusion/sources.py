"""What a person writes to name a model becomes a checkpoint here, and nowhere else.

    open_checkpoint("assets/demo/pivot")           # a folder, safetensors or pickles
    open_checkpoint("org/name@v2")                 # from the Hub, at a branch, tag or commit
    open_checkpoint("assets/demo/pivot+my-lora")   # with an adapter in it, a folder or from the Hub too

A folder that exists wins over every other reading, also one with a plus in its name. What looks like a folder is never looked up
on the Hub: "./outputs/gone" nowhere, "outputs/gone" not where there is a folder called outputs. A revision tells the Hub.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from fusion import hub
from fusion.adapter_settings import is_adapter, wanted_base
from fusion.adapters import Adapted
from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError
from fusion.pickles import converted, pickled_files

_CACHED = re.compile(r"models--([\w.-]+)/snapshots")  # where the Hub's library keeps a model, in front of its commit


def open_checkpoint(ref: str | os.PathLike, name: str | None = None) -> Checkpoint:
    """Open the checkpoint that `ref` names, downloading what is missing; `name` is what people see.

    CheckpointError when it cannot be one, MismatchError when an adapter does not fit its base.
    """
    return _open(os.fspath(ref), name, weights=True)


def peek(ref: str | os.PathLike, name: str | None = None) -> Checkpoint:
    """As `open_checkpoint`, but of a model on the Hub only headers and small files are fetched: enough for a preflight."""
    return _open(os.fspath(ref), name, weights=False)


def hub_ids(ref: str | os.PathLike) -> tuple[str, ...]:
    """The ids on the Hub of the model that `ref` names and of its adapter; a folder has one only in the Hub's own cache."""
    text = os.fspath(ref)
    return tuple(name for part in (_split(text) or (text,)) for name in _hub_id(part))


def _hub_id(text: str) -> tuple[str, ...]:
    if not os.path.isdir(text):
        found = hub_model(text)
        return (found[0],) if found else ()
    cached = _CACHED.fullmatch("/".join(Path(text).absolute().parts[-3:-1]))
    return (cached[1].replace("--", "/"),) if cached else ()


def hub_model(text: str) -> tuple[str, str] | None:
    """Name and revision where a reference without an adapter means a model of the Hub; None where it means a folder."""
    if os.path.isdir(text) or ("@" not in text and os.path.isdir(text.split("/")[0])):
        return None
    return hub.parse(text)


def written(ref: str) -> str:
    """A reference as a recipe keeps it: on no machine its folders are taken for models of the Hub."""
    parts = _split(ref)
    if parts is not None:
        return "+".join(map(written, parts))
    return f"./{ref}" if os.path.isdir(ref) and hub.parse(ref) else ref


def _open(text: str, name: str | None, weights: bool) -> Checkpoint:
    parts = _split(text)
    if parts is not None:
        base = _open(parts[0], None, weights)
        folder, label, revision = _adapter(parts[1])
        return Adapted(base, folder, name or f"{base.name}+{label}", revision)
    found = hub_model(text)
    if found is None:
        return _open_folder(text, name)
    if not weights:
        return hub.Remote(*found, name)
    folder, revision = hub.download(*found)
    return _open_folder(folder, name or found[0].split("/")[1], revision)


def _adapter(text: str) -> tuple[Path, str, str]:
    """Folder, name and commit of an adapter."""
    found = hub_model(text)
    if found is None:
        return _folder(text, "Give the folder that holds adapter_config.json."), Path(text).resolve().name, ""
    folder, commit = hub.download(*found)
    return folder, found[0].split("/")[1], commit


def _split(text: str) -> tuple[str, str] | None:
    """Base and adapter of "base+adapter", parted at the last plus that has a folder behind it, else at the last that has a
    model's name behind it; None without one."""
    if os.path.isdir(text):
        return None
    places = [i for i, letter in enumerate(text) if letter == "+" and 0 < i < len(text) - 1]
    ready = [i for i in places if os.path.isdir(text[i + 1:])]
    at = max(ready or places, default=None)
    return None if at is None else (text[:at], text[at + 1:])


def _folder(text: str | Path, todo: str) -> Path:
    """The folder that is meant; CheckpointError when there is none, also where the Hub may have been meant."""
    if not os.path.isdir(text):
        if hub.parse(str(text)):
            todo = f"{Path(text).parts[0]} is a folder here; for a model on the Hub write {text}@main."
        raise CheckpointError("there is no such folder", where=str(text), todo=todo)
    return Path(text)


def _open_folder(text: str | Path, name: str | None, revision: str = "") -> Checkpoint:
    folder = _folder(text, "Give the folder that holds config.json.")
    if is_adapter(folder):
        raise CheckpointError("this is an adapter, not a whole model", where=str(folder),
                              todo=f"Write BASE+{folder}; it was made for {wanted_base(folder) or 'a base that it does not name'}.")
    files = pickled_files(folder)
    return Checkpoint(folder, name, weights=converted(files) if files else None, revision=revision)

"""What a person writes to name a model becomes a checkpoint here, and nowhere else.

    open_checkpoint("assets/demo/pivot")           # a folder, safetensors or pickles
    open_checkpoint("assets/demo/pivot+my-lora")   # with an adapter in it

A folder that exists wins over every other reading, also one with a plus in its name.
"""

from __future__ import annotations

import os
from pathlib import Path

from fusion.adapters import Adapted, is_adapter, wanted_base
from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError
from fusion.pickles import converted, pickled_files


def open_checkpoint(ref: str | os.PathLike, name: str | None = None) -> Checkpoint:
    """Open the checkpoint that `ref` names; `name` is what people see.

    CheckpointError when it cannot be one, MismatchError when an adapter does not fit its base.
    """
    text = os.fspath(ref)
    parts = _split(text)
    if parts is None:
        return _open_folder(Path(text), name)
    return Adapted(open_checkpoint(parts[0]), Path(parts[1]), name)


def _split(text: str) -> tuple[str, str] | None:
    """Base and adapter of "base+adapter", parted at the last plus that has an adapter behind it; None without one."""
    if os.path.isdir(text):
        return None
    places = [i for i, letter in enumerate(text) if letter == "+" and 0 < i < len(text) - 1]
    ready = [i for i in places if os.path.isdir(text[i + 1:])]
    at = max(ready or places, default=None)
    return None if at is None else (text[:at], text[at + 1:])


def _open_folder(folder: Path, name: str | None, revision: str = "") -> Checkpoint:
    if is_adapter(folder):
        raise CheckpointError("this is an adapter, not a whole model", where=str(folder),
                              todo=f"Write BASE+{folder}; it was made for {wanted_base(folder) or 'a base that it does not name'}.")
    files = pickled_files(folder) if os.path.isdir(folder) else []
    return Checkpoint(folder, name, weights=converted(files) if files else None, revision=revision)

"""What a person writes to name a model becomes a checkpoint here, and nowhere else.

    open_checkpoint("assets/demo/pivot")
"""

from __future__ import annotations

import os
from pathlib import Path

from fusion.checkpoint import Checkpoint
from fusion.pickles import converted, pickled_files


def open_checkpoint(ref: str | os.PathLike, name: str | None = None) -> Checkpoint:
    """Open the checkpoint that `ref` names; `name` is what people see. CheckpointError when it cannot be one."""
    return _open_folder(Path(ref), name)


def _open_folder(folder: Path, name: str | None, revision: str = "") -> Checkpoint:
    files = pickled_files(folder) if os.path.isdir(folder) else []
    return Checkpoint(folder, name, weights=converted(files) if files else None, revision=revision)

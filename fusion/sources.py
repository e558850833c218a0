"""What a person writes to name a model becomes a checkpoint here, and nowhere else.

    open_checkpoint("assets/demo/pivot")
"""

from __future__ import annotations

import os

from fusion.checkpoint import Checkpoint


def open_checkpoint(ref: str | os.PathLike, name: str | None = None) -> Checkpoint:
    """Open the checkpoint that `ref` names; `name` is what people see. CheckpointError when it cannot be one."""
    return Checkpoint(ref, name)

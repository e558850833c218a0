"""Models to evaluate: named by what people write, opened before any work, loaded one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from fusion import chat
from fusion.checkpoint import Checkpoint
from fusion.errors import RecipeError, nearest
from fusion.recipe import short_names
from fusion.sources import open_checkpoint


def named(refs: Sequence[str]) -> dict[str, str]:
    """Short name → what was written; RecipeError when a model is given twice or none at all."""
    if not refs:
        raise RecipeError("no model to evaluate", todo="Name a folder or a model on the Hub.")
    names = short_names(refs)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RecipeError(f"the model {twice!r} is given twice", todo="Name each model once.")
    return dict(zip(names, refs, strict=True))


def fingerprints(models: dict[str, str]) -> dict[str, str]:
    """Name → fingerprint of its weights; opens (and downloads) every model, so that a wrong name fails before any work."""
    found = {}
    for name, ref in models.items():
        with closing(open_checkpoint(ref, name)) as checkpoint:
            found[name] = checkpoint.fingerprint
    return found


def chosen(wanted: str | None, models: dict[str, str]) -> str | None:
    """The name of the baseline, which may be written as a name or as the model itself; RecipeError for another."""
    if wanted is None or wanted in models:
        return wanted
    for name, ref in models.items():
        if wanted.rstrip("/") == ref.rstrip("/"):
            return name
    raise RecipeError(f"the baseline {wanted!r} is not among the models", todo=nearest(wanted, models))


def load(ref: str, name: str) -> chat.ChatModel:
    """Load a folder, "folder+adapter" or a model on the Hub, ready to answer; CheckpointError, ResourceError."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    with closing(open_checkpoint(ref, name)) as checkpoint:
        if type(checkpoint) is Checkpoint and any(checkpoint.folder.glob("*.safetensors")):
            return chat.load(checkpoint.folder, name)
        # An adapter, or weights that were converted elsewhere: the folder alone would be another model.
        tensors = {tensor: torch.from_numpy(checkpoint[tensor]) for tensor in checkpoint}
        return chat.from_tensors(tensors, "bfloat16", checkpoint.folder, checkpoint.folder, name)

"""Models to evaluate: named by what people write, opened before any work, loaded one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass

from fusion import chat
from fusion.errors import RecipeError, nearest
from fusion.recipe import short_names
from fusion.sources import open_checkpoint


@dataclass(frozen=True)
class Lent:
    """A model that somebody else holds, such as a merge in memory: `open` lends it while it is asked.

    `ref` is what results say about it, `fingerprint` tells its weights from others'.
    """

    ref: str
    open: Callable[[], AbstractContextManager[chat.ChatModel]]
    fingerprint: str


Models = Mapping[str, "str | Lent"]  # name → a folder, FOLDER+ADAPTER or model on the Hub, or a model that is lent


def named(refs: Sequence[str]) -> dict[str, str]:
    """Short name → what was written; RecipeError when a model is given twice or none at all."""
    if not refs:
        raise RecipeError("no model to evaluate", todo="Name a folder or a model on the Hub.")
    names = short_names(refs)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RecipeError(f"the model {twice!r} is given twice", todo="Name each model once.")
    return dict(zip(names, refs, strict=True))


def written(models: Models) -> dict[str, str]:
    """Name → what results say the model is, plain text for every kind."""
    return {name: ref.ref if isinstance(ref, Lent) else ref for name, ref in models.items()}


def fingerprints(models: Models) -> dict[str, str]:
    """Name → fingerprint of its weights; opens (and downloads) every model, so that a wrong name fails before any work."""
    found = {}
    for name, ref in models.items():
        if isinstance(ref, Lent):
            found[name] = ref.fingerprint
            continue
        with closing(open_checkpoint(ref, name)) as checkpoint:
            found[name] = checkpoint.fingerprint
    return found


@contextmanager
def lend(ref: str | Lent, name: str) -> Iterator[chat.ChatModel]:
    """The model, ready to answer until the `with` block ends: loaded, or borrowed from who holds it."""
    if isinstance(ref, Lent):
        with ref.open() as model:
            yield model
    else:
        yield load(ref, name)


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
    from transformers.utils import logging

    logging.disable_progress_bar()
    with closing(open_checkpoint(ref, name)) as checkpoint:
        return chat.load(checkpoint, name)

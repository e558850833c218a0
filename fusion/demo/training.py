"""Make the whole family: pivot and sources from nothing, two at a time; then the targets, by fusing the pivot with each source."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from fusion.demo.cards import write_cards
from fusion.demo.crew import together
from fusion.demo.family import FAMILY, FUSION, RECIPES, Fusion, members
from fusion.errors import CheckpointError, OutputError, RecipeError, nearest
from fusion.progress import Work


def train(out: Path, only: Sequence[str] = (), seed: int = 0, steps_scale: float = 1.0, fusion: Fusion = FUSION,
          ) -> Work[list[Path]]:
    """Make the family, or `only` the named models, as folders under `out`; the same seed gives the same weights.

    Each folder appears whole or not at all; the fusion run that makes the targets goes on where an earlier one was killed. When
    the family is complete and trained in full, it is measured and the model cards show the accuracies. Raises OutputError if a
    folder exists, CheckpointError if targets have no pivot or sources.
    """
    out = Path(out).absolute()
    names = _plan(out, only)
    out.mkdir(parents=True, exist_ok=True)
    singles = sorted((name for name in names if name in RECIPES), key=lambda name: -RECIPES[name].steps)  # the longest first
    targets = [name for name in names if name not in RECIPES]
    try:
        if singles:
            yield from together({name: (_make, (name, out, seed, steps_scale)) for name in singles}, "training")
    finally:
        for name in singles:
            shutil.rmtree(_partial(out, name), ignore_errors=True)
    if targets:
        yield from _fuse(out, targets, seed, fusion)
    yield from write_cards(out, measure=steps_scale >= 1 and all((out / member.name).is_dir() for member in FAMILY))
    return [out / name for name in names]


def _plan(out: Path, only: Sequence[str]) -> list[str]:
    """The names to make, in the family's order; refuse what cannot work before any work is done."""
    known = [member.name for member in FAMILY]
    for name in only:
        if name not in known:
            raise RecipeError(f"no model {name!r} in the demo family", todo=nearest(name, known))
    names = [name for name in known if not only or name in only]
    for name in names:
        if (out / name).exists():
            raise OutputError("the folder exists", where=str(out / name),
                              todo="Choose another folder or remove this one.")
    missing = [name for name in RECIPES if name not in names and not (out / name).is_dir()]
    if missing and not set(names) <= RECIPES.keys():
        raise CheckpointError(f"the targets are made from {', '.join(missing)}, which is not there", where=str(out),
                              todo=f"Train {' and '.join(missing)} too.")
    return names


def _make(name: str, out: Path, seed: int, steps_scale: float) -> Work[None]:
    """Train one model into a hidden sibling, then let it appear under its name."""
    from fusion.demo.fit import fit

    hidden = _partial(out, name)
    shutil.rmtree(hidden, ignore_errors=True)
    yield from fit(RECIPES[name], hidden, seed, steps_scale)
    hidden.rename(out / name)


def _fuse(out: Path, targets: Sequence[str], seed: int, fusion: Fusion) -> Work[None]:
    """Fuse the pivot with every source in a hidden folder, and let the wanted targets appear under their names."""
    from fusion.demo.fusing import fuse_seed

    seed += fusion.seed
    hidden = out / f".fusing-seed-{seed}"
    made = (yield from together({"targets": (fuse_seed, (out, hidden, seed, ("pairwise",), fusion))}, "fusing"))["targets"]
    for name in targets:
        made[name].rename(out / name)
    if set(targets) == set(members("target")):
        shutil.rmtree(hidden, ignore_errors=True)


def _partial(out: Path, name: str) -> Path:
    return out / f".{name}.partial-train"

"""Was this folder really made by its recipe? Run the recipe again, keep nothing, and compare digests.

    verdict = finish(verify("merged"))
    verdict.equal, verdict.differing               # True, ()

Three digests must agree: the one the recipe records, that of the weights in the folder, and that of the merge run again. Price:
a merge without its writing, and the folder's weights read once. Only earlier stages of a recipe are written, to be removed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fusion.digest import checkpoint_digest, digest_checkpoint, digest_tensors
from fusion.errors import CheckpointError, RecipeError
from fusion.merge import RECIPE_FILE, Computed, compute, merge
from fusion.plan import MergePlan
from fusion.progress import Work
from fusion.recipe import Recipe, load_stages
from fusion.sources import open_checkpoint
from fusion.stages import scratch_folder
from fusion.version import VERSION

_TODO = "Only a folder made by `merge` can be verified."


@dataclass(frozen=True)
class Verdict:
    """What running a folder's recipe again showed; `equal` when nothing differs.

    `recorded`, `stored`, `again`: content digests as the recipe has it, of the weights in the folder, and of the merge run
    again. `engine`: the version that made the folder, `ours`: the one that ran it again. `differing`: tensor → how the stored
    one differs from the new one. `changed`: models whose weights are no longer those of the recipe. `files`: small files
    (config, tokenizer …) that the recipe makes otherwise.
    """

    folder: str
    recorded: str
    stored: str
    again: str
    engine: str
    ours: str = VERSION
    differing: Mapping[str, str] = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether the folder is what its recipe makes, to the byte."""
        return self.recorded == self.stored == self.again and not (self.changed or self.files)

    @property
    def findings(self) -> list[str]:
        """What differs, in words; empty when nothing does."""
        found = [f"{name} has other weights than the merge was made of" for name in self.changed]
        found += [f"{name} {how}" for name, how in self.differing.items()]
        if self.recorded != self.stored:
            found.append(f"the recipe records the digest {self.recorded}, the weights in the folder have {self.stored}")
        if self.recorded != self.again:
            found.append(f"the recipe records the digest {self.recorded}, running it again gives {self.again}")
        return found + [f"{name} is not the file that the recipe makes" for name in self.files]

    def to_dict(self) -> dict:
        """Plain data: what `--json` prints."""
        return {**asdict(self), "equal": self.equal, "findings": self.findings}


class _Nowhere:
    """A sink that keeps nothing: the digests are taken on the way to it."""

    def __init__(self, plan: MergePlan):
        self.todo, self.finished = [name for name, _, _ in plan.outputs()], {}

    def write(self, name: str, start: int, stored: object) -> None:
        """Let the numbers go."""

    def done(self, name: str, notes: Mapping) -> None:
        """Nothing to finish."""


def verify(folder: str | os.PathLike) -> Work[Verdict]:
    """Run the recipe in an output folder again and compare; yields Progress, returns the Verdict.

    RecipeError when the folder holds no recipe or one without digests; FusionError when its models cannot be opened. Models
    are looked for where the recipe says, relative paths from the working directory.
    """
    folder = Path(folder)
    *earlier, last = _recorded(folder)
    changed: list[str] = []
    with ExitStack() as cleanup:
        stored = open_checkpoint(str(folder))
        cleanup.callback(stored.close)
        places: dict[str, Path] = {}
        scratch = cleanup.enter_context(scratch_folder(folder.absolute())) if earlier else folder
        for number, stage in enumerate(earlier, 1):
            result = yield from merge(_bare(stage), scratch / str(number), places=places)
            places[stage.name] = result.folder
            changed += [f"{stage.name}: {label}" for label in _others(stage, result.recipe.revisions)]
        plan = MergePlan.open(_bare(last), places=places, in_memory=False)
        cleanup.callback(plan.close)
        computed = yield from compute(plan, _Nowhere(plan))
        changed += _others(last, (yield from _revisions(plan, computed)))
        there = yield from digest_tensors(stored)
        return Verdict(str(folder), last.result["digest"], checkpoint_digest(there), computed.digest,
                       last.result.get("engine", "unknown"), differing=_differing(there, computed.outputs),
                       changed=tuple(changed), files=tuple(_files(plan, folder)))


def _recorded(folder: Path) -> tuple[Recipe, ...]:
    if not folder.is_dir():
        raise CheckpointError("there is no such folder", where=str(folder))
    if not (folder / RECIPE_FILE).is_file():
        raise RecipeError(f"there is no {RECIPE_FILE}", where=str(folder), todo=_TODO)
    stages = load_stages(folder / RECIPE_FILE)
    for stage in stages:
        if "digest" not in stage.result or set(stage.revisions) != {"pivot", *stage.names}:
            raise RecipeError("the recipe does not record the digests of its models and of its result",
                              where=str(folder / RECIPE_FILE), todo=_TODO)
    return stages


def _bare(recipe: Recipe) -> Recipe:
    """The recipe without what it records: a model that changed is a finding here, not an error."""
    return recipe.with_(revisions={}, result={})


def _revisions(plan: MergePlan, computed: Computed) -> Work[dict[str, str]]:
    """The content digest of every model; reads what the merge did not."""
    found = {}
    for label, model in plan.sources.items():
        found[label] = yield from digest_checkpoint(model, computed.inputs.get(label, {}))
    return found


def _others(recipe: Recipe, found: Mapping[str, str]) -> list[str]:
    """Models whose digest is not the one that the recipe records."""
    return [label for label, digest in recipe.revisions.items() if found[label] != digest]


def _differing(stored: Mapping[str, str], again: Mapping[str, str]) -> dict[str, str]:
    """How stored tensors differ from those of the merge run again, in the merge's order."""
    found = {name: "is missing in the folder" if name not in stored else "differs" for name, digest in again.items()
             if stored.get(name) != digest}
    return found | {name: "is in the folder, but not in the merge" for name in stored if name not in again}


def _files(plan: MergePlan, folder: Path) -> list[str]:
    """Small files that the recipe makes otherwise than they lie in the folder."""
    def same(name: str, content: bytes) -> bool:
        file = folder / name
        return file.is_file() and file.stat().st_size == len(content) and file.read_bytes() == content

    return [name for name, content in plan.small_files() if not same(name, content)]

"""The stages of a fusion run, each of which is skipped when its result is there: data, distributions, fused targets,
training, merge.

A run that was stopped, killed or extended by one more source does only what is not yet done. Everything lies in one folder:
`work/` holds what can be made again, `targets/` and `merged/` are the results, `README.md` tells of data, alignment and losses.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fusion.checkpoint import Checkpoint
from fusion.distill.dialogues import Dialogue
from fusion.distill.encoding import Encoder
from fusion.distill.fused import STATISTICS_FILE, FusedData, Knower, build
from fusion.distill.server import ServerTeacher
from fusion.distill.store import PLAN_FILE, Store, write_whole
from fusion.distill.teacher import LoadedTeacher, LocalTeacher, Teacher, prepare, represent
from fusion.errors import FusionError
from fusion.merge import merge
from fusion.pairwise.cards import mass_note, run_card, target_card
from fusion.pairwise.data import prepare_dialogues, stored_dialogues
from fusion.pairwise.place import Place, claim, current_merge
from fusion.pairwise.readers import encoders_of, template_of
from fusion.pairwise.recipe import FuseRecipe
from fusion.progress import Progress, Work
from fusion.sources import open_checkpoint
from fusion.train.crew import Crew, as_one
from fusion.train.history import history
from fusion.train.packing import refuse_leaks

CARD_FILE = "README.md"
_TITLES = {"data": "Reading dialogues", "distributions": "Distributions of {}", "fused targets": "Fusing for {}",
           "training": "Training {}", "merge": "Merging the targets"}


@dataclass(frozen=True)
class Stage:
    """One stage as it is shown: `name`, what it concerns, whether its result is there, and what else is to be known."""

    name: str
    subject: str
    done: bool = False
    note: str = ""

    @property
    def title(self) -> str:
        """What the Progress of this stage is called."""
        return _TITLES[self.name].format(self.subject)


@dataclass(frozen=True)
class FuseResult:
    """A finished run: folders of the targets and of their merge (None in mode multi), the data report, alignment statistics."""

    targets: dict[str, Path]
    merged: Path | None
    report: dict
    statistics: dict


def plan(recipe: FuseRecipe, out: str | os.PathLike) -> list[Stage]:
    """The stages of a run in order, and which of them are done."""
    place = Place(out)
    stages = [Stage("data", recipe.data, place.dialogues.exists())]
    for name, _ in recipe.teachers:
        stages.append(Stage("distributions", name, _complete(place.distributions(name))))
    for target in recipe.target_names:
        stages.append(_fused_stage(target, place.fused(target)))
    for target in recipe.target_names:
        stages.append(Stage("training", target, place.target(target).is_dir()))
    if recipe.mode == "pairwise":
        stages.append(_merge_stage(recipe, place))
    return stages


def _fused_stage(target: str, folder: Path) -> Stage:
    """With what came over of each source's words, once that is known."""
    try:
        statistics = json.loads((folder / STATISTICS_FILE).read_text(encoding="utf-8"))
        return Stage("fused targets", target, True, mass_note(statistics))
    except (OSError, ValueError, KeyError):
        return Stage("fused targets", target)


def _merge_stage(recipe: FuseRecipe, place: Place) -> Stage:
    current, earlier = current_merge(recipe, place), [folder.name for folder in place.merges()]
    note = ""
    if current and current.name != "merged":
        note = f"in {current.name}"
    elif earlier and not current:
        note = f"{', '.join(earlier)}: of other targets or settings; the new one will be {place.next_merge().name}"
    return Stage("merge", str(recipe.merge.get("method", "varm")), current is not None, note)


def run(recipe: FuseRecipe, out: str | os.PathLike) -> Work[FuseResult]:
    """Run every stage that is not yet done into the folder `out`; yields Progress, returns the FuseResult.

    A folder of another recipe is refused (only `sources`, `mode` and `merge` may change: one more source costs one more target
    and a new merge). Under `accelerate launch` the distributions are shared among the processes and training is data-parallel.
    """
    recipe.check()
    place, crew = Place(out), Crew()
    if crew.first:
        claim(recipe, place)
    crew.wait()
    encoders = encoders_of(recipe)
    dialogues, report = yield from _data(recipe, place, encoders, crew)
    knowers = {}
    for name, source in recipe.teachers:
        store = yield from _distributions(name, source, recipe, place, dialogues, encoders[name], crew)
        knowers[name] = Knower(name, encoders[name], store)
    statistics, targets = {}, {}
    names = [name for name, _ in recipe.teachers[1:]]
    groups = [[name] for name in names] if recipe.mode == "pairwise" else [names]
    heard = dict(zip(recipe.target_names, groups, strict=True))
    for target, group in heard.items():
        fused = yield from _fused(target, [knowers["pivot"], *(knowers[name] for name in group)], recipe, place, dialogues, crew)
        statistics[target] = json.loads((place.fused(target) / STATISTICS_FILE).read_text(encoding="utf-8"))
        targets[target] = yield from _trained(target, fused, recipe, place)
    crew.wait()
    if recipe.mode == "pairwise" and crew.first and current_merge(recipe, place) is None:
        paths = tuple(str(folder) for folder in targets.values())
        yield from _labelled(merge(recipe.merge_recipe(recipe.pivot, paths), place.next_merge()), Stage("merge", "").title)
    if crew.first:
        _write_cards(recipe, place, heard, report, statistics)
    crew.wait()
    return FuseResult(targets, current_merge(recipe, place) if recipe.mode == "pairwise" else None, report, statistics)


def _data(recipe: FuseRecipe, place: Place, encoders: dict[str, Encoder], crew: Crew) -> Work[tuple[list[Dialogue], dict]]:
    """Read, split and check the dialogues once; every model must be able to show each of them as it is."""
    if crew.first and not (place.dialogues.exists() and place.report.exists()):
        yield Progress(Stage("data", recipe.data).title, note=recipe.data)
        prepare_dialogues(recipe, place, encoders)
    crew.wait()
    return stored_dialogues(place.dialogues), json.loads(place.report.read_text(encoding="utf-8"))


def _distributions(name: str, source: str, recipe: FuseRecipe, place: Place, dialogues: Sequence[Dialogue],
                   encoder: Encoder, crew: Crew) -> Work[Store]:
    folder = place.distributions(name)
    if _complete(folder):
        yield Progress(Stage("distributions", name).title, note="already there")
    teacher = _teacher(name, source, recipe, encoder if _complete(folder) and crew.count == 1 else None)
    if name == "pivot" and recipe.training.pack and isinstance(teacher, LoadedTeacher):
        refuse_leaks(teacher.model, teacher.model, next(teacher.model.parameters()).dtype.itemsize == 4)  # before hours of work
    if crew.first:
        prepare(teacher, dialogues, folder, top_k=recipe.top_k)
    crew.wait()
    store = yield from _labelled(represent(teacher, dialogues, folder, top_k=recipe.top_k, batch_tokens=recipe.batch_tokens,
                                           part=(crew.rank, crew.count)), Stage("distributions", name).title)
    crew.wait()
    return store


def _teacher(name: str, source: str, recipe: FuseRecipe, finished: Encoder | None) -> Teacher:
    """The model itself, or its server; with the encoder of one whose distributions are all stored, weights are not loaded."""
    template, served = template_of(recipe), recipe.servers.get(name)
    if served:
        return ServerTeacher(source, served.server, served.model, template=template, max_tokens=recipe.max_tokens)
    if finished:
        return Finished(finished, open_checkpoint(source).fingerprint)
    gc.collect()  # a model that was read before may refer to itself; the next one needs the room
    with as_one():
        return LocalTeacher(source, template=template, max_tokens=recipe.max_tokens, dtype=recipe.teacher_dtype)


@dataclass(frozen=True)
class Finished:
    """A teacher whose distributions are all stored: it can only say who it is."""

    encoder: Encoder
    mark: str

    def rows(self, batch, top_k):
        """Never asked for."""
        raise FusionError("a shard of the distributions disappeared", todo="Run the command again.")


def _fused(target: str, knowers: Sequence[Knower], recipe: FuseRecipe, place: Place, dialogues: Sequence[Dialogue],
           crew: Crew) -> Work[FusedData]:
    if crew.first:
        work = build(dialogues, knowers[0], knowers[1:], place.fused(target), recipe.blend)
        yield from _labelled(work, Stage("fused targets", target).title)
    crew.wait()
    return FusedData(place.fused(target))


def _trained(target: str, fused: FusedData, recipe: FuseRecipe, place: Place) -> Work[Path]:
    from fusion.train.trainer import train

    folder = place.target(target)
    if folder.is_dir():
        Checkpoint(folder).close()
        yield Progress(Stage("training", target).title, note="already there")
        return folder
    training = replace(recipe.training, lm_weight=1.0) if recipe.mode == "sft" else recipe.training
    gc.collect()
    work = train(recipe.pivot, fused, folder, training, resume=True)
    result = yield from _labelled(work, Stage("training", target).title)
    return result.folder


def _write_cards(recipe: FuseRecipe, place: Place, heard: Mapping[str, Sequence[str]], report: Mapping,
                 statistics: Mapping[str, Mapping]) -> None:
    """Write the run's card anew, and a card into every target that has none."""
    curves = {target: history(place.target(target)) for target in heard}
    for target, sources in heard.items():
        file = place.target(target) / CARD_FILE
        if not file.exists():
            write_whole(file, target_card(recipe, target, sources, statistics[target], curves[target]).encode())
    current = current_merge(recipe, place) if recipe.mode == "pairwise" else None
    earlier = [folder.name for folder in place.merges() if folder != current]
    card = run_card(recipe, report, statistics, curves, current.name if current else "", earlier)
    write_whole(place.out / CARD_FILE, card.encode())


def _complete(folder: Path) -> bool:
    if not (folder / PLAN_FILE).exists():
        return False
    sizes = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8")).get("sizes", [])
    return all((folder / f"rows-{shard:05}.safetensors").exists() for shard in range(len(sizes)))


def _labelled(work: Work, stage: str) -> Work:
    """The same work with its stage called by another name."""
    try:
        while True:
            yield replace(next(work), stage=stage)
    except StopIteration as end:
        return end.value
    finally:
        work.close()


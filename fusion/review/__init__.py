"""What did this merge do? A finished merge beside its parents: distances, rounding, tokenizer, and whether it can talk.

    report = finish(review("outputs/my-merge"))
    report.level                                   # the worst of all findings: "good", "warning" or "bad"
    report.distance                                # [tensors, parents]: ‖result − parent‖ ÷ ‖parent‖

Price: one pass over the result and its parents, the merge once more in float32 for the rounding, and a loaded model for the
smoke test (which can be left out).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fusion import dtypes
from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError, RecipeError, ResourceError
from fusion.inspection.report import share
from fusion.inspection.streaming import fold
from fusion.live import LiveResult
from fusion.merge import RECIPE_FILE, MergeResult
from fusion.plan import MergePlan
from fusion.preflight import mergeable_names
from fusion.progress import Work
from fusion.recipe import Recipe, load_stages, short_names
from fusion.review.hull import nearest_mix
from fusion.review.memory import live_view
from fusion.review.report import Review, findings
from fusion.review.smoke import PROMPTS, Answer, ask, ask_model
from fusion.review.sums import ReviewSums, Rounding, rounding_of
from fusion.review.tokens import RoundTrip, round_trips
from fusion.slices import is_lent
from fusion.sources import open_checkpoint
from fusion.untied import Untied, side_by_side

__all__ = ["PROMPTS", "Answer", "Review", "RoundTrip", "answered", "ask_model", "review", "review_live"]


def review(merged: str | os.PathLike | MergeResult, parents: Sequence[str] = (), *, smoke: bool = True,
           rounding: bool = True) -> Work[Review]:
    """Review a merged folder, or the result of `merge`; yields Progress.

    `parents`: the models it was made of, the pivot first (default: those of the recipe in the folder). `smoke` also asks the
    model five prompts; `rounding` also runs the recipe again in float32, to see what storing the result lost. Raises
    CheckpointError for folders that cannot be read, RecipeError when the folder has no recipe and no parents are given.
    """
    folder = Path(merged.folder if isinstance(merged, MergeResult) else merged)
    result = open_checkpoint(folder)
    stages = () if parents else _stages(folder)
    plan = _plan(stages)
    models = _plain_parents(parents, stages) if plan is None else plan.models
    try:
        return (yield from _reviewed(folder, result, models, plan, smoke, rounding))
    finally:
        for model in (result, *models):
            model.close()


def review_live(result: LiveResult, name: str) -> Work[Review]:
    """Review a merge in memory under a name, all but the smoke test; yields Progress. Nothing is written."""
    plan = MergePlan.open(result.plan.recipe)
    try:
        with live_view(result, name) as merged:
            return (yield from _reviewed(merged.folder, merged, plan.models, plan, smoke=False, rounding=True))
    finally:
        plan.close()


def answered(report: Review, answers: Sequence[Answer]) -> Review:
    """A review with the answers of `ask_model`, and the findings that follow."""
    report = replace(report, answers=tuple(answers))
    return replace(report, findings=tuple(findings(report)))


def _reviewed(folder: Path, result: Checkpoint, parents: Sequence[Checkpoint], plan: MergePlan | None, smoke: bool,
              rounding: bool) -> Work[Review]:
    parents = side_by_side(result, parents)[1] if plan is None else parents
    names = [name for name in mergeable_names(result)
             if all(name in model.info and model.info[name].shape == result.info[name].shape for model in parents)
             and (plan is not None or not any(is_lent(model, name) for model in parents))]
    if not names:
        raise RecipeError("no matrix of the result has the name and shape of one in every parent", where=result.name,
                          todo="Give the models that it was made of.")
    parts = _parts(plan, names, len(parents))
    sums = yield from fold("Comparing with the parents", (*parents, result), names, lambda name: ReviewSums(len(parents)),
                           allow_nonfinite=True)
    loss = (yield from rounding_of(plan, result)) if rounding and plan is not None else None
    answers = (yield from ask(folder)) if smoke else None
    report = _report(folder, result, parents, plan, names, parts, sums, loss)
    report = replace(report, tokens=round_trips(result), donor_tokens=round_trips(plan.donor if plan else parents[0]),
                     answers=answers)
    return replace(report, findings=tuple(findings(report)))


def _report(folder: Path, result: Checkpoint, parents: Sequence[Checkpoint], plan: MergePlan | None, names: list[str],
            parts: np.ndarray, sums: Mapping[str, ReviewSums], loss: Mapping[str, Rounding] | None) -> Review:
    def table(field: str) -> np.ndarray:
        return np.array([getattr(sums[name], field) for name in names], np.float64)

    weights, outside = nearest_mix(table("gram"))
    spread = np.sqrt(np.einsum("tjj->tj", table("gram"))[:, :-1].max(axis=1, initial=0.0))
    lost = None
    if loss is not None:
        off, change = (np.sqrt([getattr(loss.get(name, Rounding()), field) for name in names]) for field in ("lost", "change"))
        lost, outside = share(off, change), np.maximum(outside - 1.001 * off, 0)  # the exact result is no farther than that
    numel = np.array([result.info[name].numel for name in names], np.int64)
    compared = set(names)
    pivot = parents[0] if plan is None else plan.sources["pivot"]  # as it is, without the result's layers and vocabulary
    pivot = pivot.model if isinstance(pivot, Untied) else pivot
    return Review(
        folder=folder, name=result.name, parents=tuple(model.name for model in parents), names=tuple(names),
        shapes=tuple(result.info[name].shape for name in names), numel=numel, parts=parts,
        square=table("distance"), parent_square=table("parent_square"), hull=share(outside, spread),
        mix=np.column_stack([1 - weights.sum(axis=1), weights]), beyond=share(table("beyond"), numel),
        lost=lost, lost_total=None if loss is None else _total(loss),
        parameters=(_parameters(pivot), _parameters(result)), tied=(pivot.tied, result.tied),
        dtype=dtypes.name(result.dtype), nonfinite={name: sums[name].bad for name in names if sums[name].bad},
        reshaped=plan is not None and bool(plan.recipe.slices or plan.recipe.vocabulary),
        averages=plan is None or plan.weights.kind == "shares",
        left_out=tuple(name for name in mergeable_names(result) if name not in compared))


def _total(loss: Mapping[str, Rounding]) -> float:
    lost, change = (sum(getattr(one, field) for one in loss.values()) for field in ("lost", "change"))
    return float(share(np.sqrt(lost), np.sqrt(change)))


def _parameters(model: Checkpoint) -> int:
    return sum(model.info[name].numel for name in mergeable_names(model))


def _parts(plan: MergePlan | None, names: Sequence[str], parents: int) -> np.ndarray:
    """Which parents take part in which tensor, [T, P] bool; the pivot always counts."""
    parts = np.ones((len(names), parents), bool)
    if plan is not None:
        for t, name in enumerate(names):
            if name in plan.number:
                parts[t, 1:] = plan.parts[plan.number[name]]
    return parts


def _stages(folder: Path) -> tuple[Recipe, ...]:
    if not (folder / RECIPE_FILE).is_file():
        raise RecipeError(f"there is no {RECIPE_FILE} that names its parents", where=str(folder),
                          todo="Name them with --parents, the pivot first.")
    return load_stages(folder / RECIPE_FILE)


def _plan(stages: Sequence[Recipe]) -> MergePlan | None:
    """The plan of a recipe of one stage; None when its parents can only be compared as they are."""
    if len(stages) != 1:
        return None
    try:
        return MergePlan.open(stages[0])
    except ResourceError:  # running it needs more than reading it
        return None


def _plain_parents(parents: Sequence[str], stages: Sequence[Recipe]) -> tuple[Checkpoint, ...]:
    """The parents that were given, or all models of all stages that are not stages themselves."""
    made = {recipe.name for recipe in stages}
    refs = list(parents) or list(dict.fromkeys(
        ref for recipe in stages for ref in (recipe.pivot, *recipe.targets) if ref not in made))
    try:
        return tuple(open_checkpoint(ref, name) for ref, name in zip(refs, short_names(refs), strict=True))
    except CheckpointError as error:
        raise CheckpointError(error.found, where=error.where,
                              todo="A parent is missing; say where they lie with --parents, the pivot first.") from error

"""What a run says of itself: a model card for every target, and for the run tables of data, alignment and training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from fusion.card import as_text, front_matter
from fusion.pairwise.recipe import FuseRecipe
from fusion.sources import hub_ids
from fusion.version import VERSION

_KINDS = ("1-1", "1-n", "n-1", "-")


def target_card(recipe: FuseRecipe, target: str, sources: Sequence[str], statistics: Mapping, curve: Sequence[Mapping]) -> str:
    """The README.md of a target: what it was fused from, how, how well the tokens aligned, and how the losses fell.

    `statistics` as `fused targets` leaves them, `curve` the training history. Names from elsewhere are written as text.
    """
    return "\n".join([
        *front_matter(hub_ids(recipe.pivot), "finetune", ("fusechat", "distillation")), "",
        f"# {as_text(target)}", "", *_making(recipe, sources), "",
        "## Alignment", "", *alignment_table({target: statistics}), "", *mass_table({target: statistics}), "",
        "## Training", "", *training_table({target: curve}), "",
        f"Made with FuseChat Studio {VERSION}; `fuse_recipe.yaml` of its run makes it again.", ""])


def run_card(recipe: FuseRecipe, report: Mapping, statistics: Mapping[str, Mapping], curves: Mapping[str, Sequence[Mapping]],
             merged: str = "", earlier: Sequence[str] = ()) -> str:
    """The README.md of a run: what was read and dropped, how tokens aligned, who was heard, how training went."""
    rest = [f"`{merged}/` is their merge; its own card says how it was weighed."] if merged else []
    rest += [f"Of other targets or settings, from before: {', '.join(f'`{name}/`' for name in earlier)}."] if earlier else []
    return "\n".join([
        "# A fusion run", "", f"Pivot {as_text(_name(recipe.pivot))}, made with FuseChat Studio {VERSION} from `fuse_recipe.yaml`. "
        "`targets/` holds the models, `work/` what can be made again.", *rest, "",
        "## Data", "", *_data_table(report), "", "## Alignment", "", *alignment_table(statistics), "", *mass_table(statistics), "",
        "## Training", "", *training_table(curves), ""])


def alignment_table(statistics: Mapping[str, Mapping]) -> Iterator[str]:
    """One row for each target and source, as Markdown: shares of the pivot's label positions."""
    yield "| target | source | labels | aligned | " + " | ".join(_KINDS[:3]) + " | none | chosen |"
    yield "|---|---|" + "---:|" * 7
    for target, found in statistics.items():
        for source, aligned in found["aligned"].items():
            kinds = " | ".join(f"{found['kinds'][source].get(kind, 0):.1%}" for kind in _KINDS)
            chosen = found["chosen"].get(source)
            yield (f"| {as_text(target)} | {as_text(source)} | {found['labels']:,} | {aligned:.1%} | {kinds} | "
                   f"{'–' if chosen is None else f'{chosen:.1%}'} |")


def mass_table(statistics: Mapping[str, Mapping]) -> Iterator[str]:
    """One row for each target and source, as Markdown: what came over of a source's words, where it is heard.

    Means of its chances out of 1. Nothing for targets that an earlier version fused, which did not count it.
    """
    rows = [(target, source, found) for target, found in statistics.items() for source in found.get("kept", ())]
    if rows:
        yield ("| target | source | heard at | mass read | kept | on tokens that the pivot never writes here | "
               "empty, less than half kept |")
        yield "|---|---|" + "---:|" * 5
    for target, source, found in rows:
        shares = " | ".join(f"{found[name][source]:.1%}" for name in ("heard", "read", "kept", "unwritten", "emptied"))
        yield f"| {as_text(target)} | {as_text(source)} | {shares} |"


def mass_note(statistics: Mapping) -> str:
    """The same of one target in a sentence for each source, as text; "" where it was not counted."""
    return "; ".join(f"{source}: {found:.0%} of its mass kept of {statistics['read'][source]:.0%} read, "
                     f"{statistics['unwritten'][source]:.1%} on tokens that the pivot never writes here, "
                     f"{statistics['emptied'][source]:.1%} of the places empty"
                     for source, found in statistics.get("kept", {}).items())


def training_table(curves: Mapping[str, Sequence[Mapping]]) -> Iterator[str]:
    """Steps, and the losses (nats a token) at the first and the last logged step, as Markdown."""
    yield "| target | steps | loss | language model | fusion |"
    yield "|---|---:|---:|---:|---:|"
    for target, curve in curves.items():
        if curve:
            first, last = curve[0], curve[-1]
            losses = " | ".join(f"{first[name]:.3f} → {last[name]:.3f}" for name in ("loss", "clm", "fusion"))
            yield f"| {as_text(target)} | {last['step']:,} | {losses} |"


def _making(recipe: FuseRecipe, sources: Sequence[str]) -> Iterator[str]:
    training, blend, pivot, data = recipe.training, recipe.blend, as_text(_name(recipe.pivot)), as_text(_name(recipe.data))
    weight = 1.0 if recipe.mode == "sft" else training.lm_weight
    if weight >= 1:
        yield f"The pivot {pivot}, fine-tuned on the dialogues of {data} alone (λ = 1)."
        return
    heard = {"mince": "whichever predicts the true reply best (MinCE)", "avgce": "all, weighed by how well they predict (AvgCE)"}
    yield (f"The pivot {pivot} after knowledge fusion with {' and '.join(map(as_text, sources))} on {data} "
           f"(FuseChat, arXiv 2402.16107): weight {weight:g} on the labels, {1 - weight:g} on the "
           f"distributions of {heard[blend.rule]}, by {blend.level}; learning rate {training.learning_rate:g}.")


def _data_table(report: Mapping) -> Iterator[str]:
    yield "| dialogues | |"
    yield "|---|---:|"
    yield f"| read | {report['read']:,} |"
    for reason in report["reasons"]:
        yield f"| {as_text(reason['reason'])} | {reason['count']:,} |"
    yield f"| used | {report['used']:,} |"


def _name(reference: str) -> str:
    """How others may know it: a Hub id as it is, a path without the folders of this machine."""
    return os.path.basename(os.path.normpath(reference)) if os.path.exists(reference) else reference

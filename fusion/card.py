"""The model card of a merge: what went in, how it was weighed, how to use it. Names from elsewhere are written as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np

from fusion.anatomy import place
from fusion.errors import printable
from fusion.plan import MergePlan
from fusion.recipe import Recipe
from fusion.settings import plain
from fusion.sources import hub_ids
from fusion.variation import Variation
from fusion.version import VERSION

_KINDS = ("embedding", "attention", "mlp", "norm", "head", "other")


def model_card(plan: MergePlan, recipe: Recipe, variation: Variation | None, weights: np.ndarray,
               stages: Sequence[Recipe] = ()) -> str:
    """Write the README.md of a merge as Hub-style Markdown with front matter.

    `recipe` with its digests, `variation` None where nothing was measured, `weights` [T, J], [T, 0] for methods without;
    `stages` are the merges before it whose results it merges.
    """
    method, count = plan.method, len(recipe.targets)
    return "\n".join([
        *front_matter(_made_of(plan, stages), "merge", ("merge", "fusechat")), "",
        f"# {method.title} merge of {' and '.join(map(as_text, recipe.names))}", "",
        f"{method.title} ({_how(recipe, method.weights)}) of {count} target{'s' * (count != 1)} with the pivot "
        f"{as_text(plan.pivot.name)}. {method.summary} Made with FuseChat Studio {VERSION}.", "",
        f"    {method.formula}", "", f"Source: {method.source}.", "",
        "## Models", "", *_models(plan, recipe, variation), "", *_settings(recipe), *_slices(recipe),
        *_weights(plan, weights), *_again(recipe, variation),
        "## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")', 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        'chat = [{"role": "user", "content": "Hello!"}]',
        'inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))", "```", ""])


def front_matter(base_models: Sequence[str], relation: str, tags: Sequence[str]) -> Iterator[str]:
    """The lines of a card's metadata. `base_models`: ids on the Hub and nothing else, which refuses a card that names a folder
    or shows it as a stranger's model of that name; `relation`: what was done with them, see the Hub's `base_model_relation`."""
    yield from ("---", "library_name: transformers", "pipeline_tag: text-generation")
    if base_models:
        yield from ("base_model:", *(f"- {name}" for name in base_models), f"base_model_relation: {relation}")
    yield from ("tags:", *(f"- {tag}" for tag in tags), "---")


def _made_of(plan: MergePlan, stages: Sequence[Recipe]) -> list[str]:
    """The models on the Hub that went into a merge and into the merges before it, each once."""
    between = {stage.name for stage in stages}
    refs = [*plan.refs, *(ref for stage in stages for ref in (stage.pivot, *stage.targets) if ref not in between)]
    return list(dict.fromkeys(name for ref in refs for name in hub_ids(ref)))


def as_text(name: object) -> str:
    """A name from elsewhere as Markdown that shows it and does nothing else."""
    readable = " ".join(printable(str(name).encode(errors="replace").decode()).split())  # a folder's name may be no valid text
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|&" else c for c in readable)


def _how(recipe: Recipe, weights: str) -> str:
    if recipe.measured:
        return f"granularity {recipe.granularity}, measure {recipe.measure}"
    return "weights given by hand" if weights else "without weights"


def _models(plan: MergePlan, recipe: Recipe, variation: Variation | None) -> list[str]:
    totals = variation.totals(recipe.measure) if variation is not None else {}
    moved = "| relative change | elements changed " if totals else ""
    rows = [f"| model | role {moved}| content digest |", f"|---|---|{'---|---|' if totals else ''}---|"]
    for label, name in (("pivot", plan.pivot.name), *((name, name) for name in recipe.names)):
        total = totals.get(label)
        change = f"| {total['relative']:.2%} | {total['changed']:.1%} " if total else "| | " if totals else ""
        role = "pivot" if label == "pivot" else "target"
        rows.append(f"| {as_text(name)} | {role} {change}| `{recipe.revisions[label][:16]}` |")
    return [*rows, "", f"Tokenizer, chat template and generation config come from the donor: {as_text(plan.donor.name)}."]


def _settings(recipe: Recipe) -> list[str]:
    options = recipe.explicit().options
    if not options and not recipe.vocabulary:
        return []
    rows = [f"- {as_text(name)}: {as_text(json.dumps(plain(value), ensure_ascii=False))}" for name, value in options.items()]
    rows += [f"- vocabulary: {recipe.vocabulary}"] if recipe.vocabulary else []
    return ["## Options", "", *rows, f"- seed: {recipe.seed}", ""]


def _slices(recipe: Recipe) -> list[str]:
    if not recipe.slices:
        return []
    rows, first = ["| layers of the result | come from |", "|---|---|"], 0
    for part in recipe.slices:
        start, stop = next(iter(part.ranges.values()))
        origin = ", ".join(f"{as_text(name)} {start} to {stop - 1}" for name, (start, stop) in part.ranges.items())
        rows.append(f"| {first} to {first + stop - start - 1} | {origin} |")
        first += stop - start
    return ["## Layers", "", *rows, ""]


def _weights(plan: MergePlan, weights: np.ndarray) -> list[str]:
    """The mean weight of every part of the model; nothing for a method without weights."""
    if not weights.size:
        return []
    names = plan.weights.names
    numel = np.array([max(plan.pivot.info[name].numel, 1) for name in names])
    kinds = np.array([place(name).kind for name in names])
    rows = ["| part | " + " | ".join(map(as_text, plan.recipe.names)) + " |", "|---" * (weights.shape[1] + 1) + "|"]
    for kind in _KINDS:
        inside = kinds == kind
        if inside.any():
            mean = np.average(weights[inside], axis=0, weights=numel[inside])
            rows.append(f"| {kind} | " + " | ".join(f"{value:.3f}" for value in mean) + " |")
    return ["## Merge weights", "", *rows, ""]


def _again(recipe: Recipe, variation: Variation | None) -> list[str]:
    report = "The weight of every tensor is in `fusechat_variation.json`; " if variation is not None else ""
    return [f"{report}`fusechat_recipe.yaml` runs this merge again, and `verify` compares the result's content digest "
            f"(`{recipe.result['digest']}`):", "",
            "    python -m fusion merge fusechat_recipe.yaml --out AGAIN", "    python -m fusion verify FOLDER", ""]

"""The model card of a merge: what went in, how it was weighed, how to use it. Names from elsewhere are written as text."""

from __future__ import annotations

import json

import numpy as np

from fusion.anatomy import place
from fusion.methods import METHODS
from fusion.plan import MergePlan
from fusion.recipe import Recipe
from fusion.variation import Variation

_KINDS = ("embedding", "attention", "mlp", "norm", "head", "other")


def model_card(plan: MergePlan, recipe: Recipe, variation: Variation, weights: np.ndarray) -> str:
    """Write the README.md of a merge as Hub-style Markdown with front matter."""
    method = METHODS[recipe.method]
    settings = f"granularity {recipe.granularity}, measure {recipe.measure}" if method.measured else "weights given by hand"
    return "\n".join([
        _front_matter(plan), f"# {method.title} merge of {' and '.join(map(_text, recipe.names))}", "",
        f"{method.title} ({settings}) of {len(recipe.targets)} targets, weighed against the pivot {_text(plan.pivot.name)}. "
        f"{method.summary} Made with FuseChat Studio.", "", f"    {method.formula}", "", f"Source: {method.source}.", "",
        "## Models", "", *_models(plan, recipe, variation), "",
        "## Merge weights", "", *_weights(variation, weights), "",
        "The weight of every tensor is in `fusechat_variation.json`; `fusechat_recipe.yaml` runs this merge again:", "",
        "    python -m fusion merge fusechat_recipe.yaml --out AGAIN", "",
        "## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")', 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        'chat = [{"role": "user", "content": "Hello!"}]',
        'inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))", "```", ""])


def _front_matter(plan: MergePlan) -> str:
    names = "\n".join(f"- {json.dumps(model.name)}" for model in plan.models)
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation\nbase_model:\n{names}\n" \
           "base_model_relation: merge\ntags:\n- merge\n- fusechat\n---\n"


def _text(name: str) -> str:
    readable = " ".join(name.encode(errors="replace").decode().split())  # a folder's name may be no valid text
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|&" else c for c in readable)


def _models(plan: MergePlan, recipe: Recipe, variation: Variation) -> list[str]:
    totals = variation.totals(recipe.measure)
    rows = ["| model | role | relative change | elements changed | fingerprint |", "|---|---|---|---|---|",
            f"| {_text(plan.pivot.name)} | pivot | | | `{recipe.revisions['pivot'][:12]}` |"]
    for name in recipe.names:
        total = totals[name]
        rows.append(f"| {_text(name)} | target | {total['relative']:.2%} | {total['changed']:.1%} "
                    f"| `{recipe.revisions[name][:12]}` |")
    return [*rows, "", f"Tokenizer, chat template and generation config come from the donor: {_text(plan.donor.name)}."]


def _weights(variation: Variation, weights: np.ndarray) -> list[str]:
    kinds = np.array([place(name).kind for name in variation.names])
    rows = ["| part | " + " | ".join(map(_text, variation.targets)) + " |", "|---" * (len(variation.targets) + 1) + "|"]
    for kind in _KINDS:
        inside = kinds == kind
        if inside.any():
            mean = np.average(weights[inside], axis=0, weights=np.maximum(variation.numel[inside], 1))
            rows.append(f"| {kind} | " + " | ".join(f"{value:.3f}" for value in mean) + " |")
    return rows

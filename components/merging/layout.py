"""What stands in the Merge tab: on the left what to do, on the right doing it and the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import gradio as gr

from components import reports
from components.form import form
from components.state import Selection
from components.studio import Studio
from fusion import GRANULARITIES, MEASURES, METHODS

FAMILIES = {
    "Averages": ("varm", "linear"),
    "On the sphere": ("slerp", "nuslerp", "multislerp", "karcher"),
    "Task vectors": tuple(name for name, method in METHODS.items() if method.stages),
    "Others": ("model_stock", "nearswap", "arcee_fusion", "passthrough"),
}
DTYPES = [("as the pivot", ""), *((name, name) for name in ("bfloat16", "float16", "float32"))]
RULES = [("ratio", "ratio"), ("softmax (not the paper's)", "softmax")]
VOCABULARIES = [("refuse different ones", ""), ("the pivot's", "pivot"), ("the pivot's, common rows merged", "common"),
                ("union of all", "union")]
PRECEDENCE = ("<p class='fs-hint'><b>Which value counts?</b> The last of: what the method does by itself → weights and options of "
              "the form (a table's last matching row) → weights given by hand in Variation → tensors kept from the pivot.</p>")


@dataclass(frozen=True)
class MergeTab:
    """The components of the tab."""

    family: gr.Radio
    method: gr.Radio
    formula: gr.HTML
    form: gr.HTML
    granularity: gr.Radio
    measure: gr.Radio
    rule: gr.Radio
    temperature: gr.Number
    glance: gr.HTML
    exclude: gr.Textbox
    stack: gr.Textbox
    stacked: gr.HTML
    seed: gr.Number
    vocabulary: gr.Dropdown
    dtype: gr.Dropdown
    donor: gr.Dropdown
    run: gr.Button
    name: gr.Textbox
    save: gr.Button
    stop: gr.Button
    status: gr.HTML
    report: reports.ReportBox
    recipe: gr.Code
    command: gr.Code
    paste: gr.Code
    load: gr.Button
    notes: gr.HTML
    export: gr.Button
    exported: gr.Code


def lay_out(studio: Studio, now: Selection) -> MergeTab:
    """Build the tab's components for the first selection."""
    with gr.Row(elem_id="merge-row"):
        with gr.Column(scale=5, min_width=300):
            left = {**_method(), **_advanced(studio, now)}
        with gr.Column(scale=6, min_width=300):
            return MergeTab(**left, **_actions(studio), report=reports.lay_out(studio, now), **_recipe_boxes())


def _method() -> dict:
    family = gr.Radio(list(FAMILIES), value="Averages", label="Method", elem_id="family")
    method = gr.Radio(method_choices("Averages"), value="varm", show_label=False, container=False, label="Method of this family",
                      elem_id="method")
    formula = gr.HTML(formula_card("varm"), elem_id="formula", padding=False)
    fields = form()
    granularity = gr.Radio(list(GRANULARITIES), value="matrix", label="Granularity", elem_id="merge-granularity",
                           info="The unit m that shares one weight. The paper's choice is the matrix.")
    measure = gr.Radio(list(MEASURES), value="square", label="Measure", elem_id="merge-measure",
                       info="Mean of Δ² or of |Δ| over a unit.")
    with gr.Row():
        rule = gr.Radio(RULES, value="ratio", label="Rule", elem_id="merge-rule", min_width=200,
                        info="Ratio: v ÷ Σv, the paper's. Softmax: of v ÷ (T · largest v).")
        temperature = gr.Number(1.0, minimum=0.001, label="T of the softmax", elem_id="temperature", min_width=110, visible=False)
    glance = gr.HTML("", elem_id="weights-glance", padding=False)
    return {"family": family, "method": method, "formula": formula, "form": fields, "granularity": granularity, "measure": measure,
            "rule": rule, "temperature": temperature, "glance": glance}


def _advanced(studio: Studio, now: Selection) -> dict:
    exclude = gr.Textbox(label="Keep from the pivot", lines=2, placeholder="*norm*\nmodel.embed_tokens.weight",
                         elem_id="exclude", info="Tensor names or patterns with *, one per line. Empty: merge everything.")
    with gr.Row():
        dtype = gr.Dropdown(DTYPES, value="", label="Stored dtype", elem_id="dtype", min_width=150,
                            info="float32 arithmetic, rounded once.")
        donor = gr.Dropdown(donors(studio, now), value="pivot", label="Donor", elem_id="donor", min_width=150,
                            info="Gives tokenizer, template, stop tokens.")
    with gr.Accordion("Stack layers, vocabulary, seed", open=False, elem_id="advanced"):
        stack = gr.Textbox(label="Stack layers", lines=3, max_lines=40, placeholder="A 0-2\nB 1-3", elem_id="stack",
                           info="One row for each run of layers, first to last; several models in a row are merged: A 0-2, B 0-2. "
                                "Models: pivot, A, B … Empty: layer by layer.")
        stacked = gr.HTML("", elem_id="stacked", padding=False)
        with gr.Row():
            vocabulary = gr.Dropdown(VOCABULARIES, value="", label="Vocabulary", elem_id="vocabulary", min_width=150,
                                     info="When models have different tokens.")
            seed = gr.Number(0, precision=0, minimum=0, label="Seed", elem_id="seed", min_width=110, info="Of what is random.")
    gr.HTML(PRECEDENCE, padding=False)
    return {"exclude": exclude, "dtype": dtype, "donor": donor, "stack": stack, "stacked": stacked, "vocabulary": vocabulary,
            "seed": seed}


def _actions(studio: Studio) -> dict:
    run = gr.Button("Merge and try", variant="primary", size="lg", elem_id="merge-try")
    gr.HTML("<p class='fs-hint'>In memory: nothing is written, the merge opens in Chat beside its sources.</p>", padding=False)
    with gr.Row(elem_id="save-row", visible=not studio.public):
        name = gr.Textbox("my-merge", label="Save as", max_lines=1, max_length=64, elem_id="save-name", scale=3, min_width=160,
                          info=f"A new folder in {studio.outputs.name}/")
        save = gr.Button("Save", elem_id="save", scale=1, min_width=90)
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="save-stop", scale=1, min_width=90)
    return {"run": run, "name": name, "save": save, "stop": stop, "status": gr.HTML("", elem_id="merge-status", padding=False)}


def _recipe_boxes() -> dict:
    recipe = gr.Code(language="yaml", label="Recipe", interactive=False, elem_id="recipe", max_lines=16,
                     buttons=["copy", "download"])
    command = gr.Code(language="shell", label="The same on the command line", interactive=False, elem_id="command", lines=2,
                      wrap_lines=True, buttons=["copy"])
    with gr.Accordion("Load a recipe", open=False, elem_id="load-recipe"):
        paste = gr.Code(language="yaml", label="Paste a recipe, or mergekit's YAML", interactive=True, elem_id="recipe-in", lines=6,
                        max_lines=16)
        load = gr.Button("Load", size="sm", elem_id="recipe-load")
        notes = gr.HTML("", elem_id="recipe-notes", padding=False)
    with gr.Accordion("Export for mergekit", open=False, elem_id="export-recipe"):
        gr.HTML("<p class='fs-hint'>The same merge as stock mergekit runs it. Measured weights are measured first and written as "
                "numbers, one for each tensor.</p>", padding=False)
        export = gr.Button("Write mergekit's YAML", size="sm", elem_id="mergekit-export")
        exported = gr.Code(language="yaml", label="mergekit", interactive=False, elem_id="mergekit", max_lines=16, visible=False,
                           buttons=["copy", "download"])
    return {"recipe": recipe, "command": command, "paste": paste, "load": load, "notes": notes, "export": export,
            "exported": exported}


def formula_card(method: str) -> str:
    """A method's formula, what it does, and where it comes from."""
    entry = METHODS[method]
    words = f"<p>{escape(entry.summary)}</p><small>{escape(entry.source)}</small>"
    return f"<div class='fs-formula'><code>{escape(entry.formula)}</code>{words}</div>"


def method_choices(family: str) -> list[tuple[str, str]]:
    """The methods of a family as a menu has them."""
    return [(METHODS[name].title, name) for name in FAMILIES.get(family, ())]


def family_of(method: str) -> str:
    """The family a method is listed in."""
    return next(family for family, names in FAMILIES.items() if method in names)


def donors(studio: Studio, now: Selection) -> list[tuple[str, str]]:
    """Who may give tokenizer and template."""
    return [("the pivot", "pivot"), *((studio.title(key), key) for key in now.targets)]

"""What stands in the Fuse tab: on the left what to fuse and how, on the right doing it; below, the alignment view."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from components.fusing.figure import figure
from components.fusing.setting import DEMO, OWN, examples
from components.studio import Studio
from fusion.align import MAPPINGS
from fusion.distill.fuse import LEVELS
from fusion.distill.losses import KINDS
from fusion.distill.targets import ALIGNMENTS

MODES = [("one target per source, then merged", "pairwise"), ("one target from all at once", "multi")]
RULES = [("MinCE: the surer model's", "mince"), ("AvgCE: a mixture", "avgce")]
INTRO = ("<p class='fs-hint'>Sources of any architecture are read off once, what they expect is carried over to the pivot's "
         "tokens, and a copy of the pivot is trained lightly on it. What comes out has the pivot's shape, so it can be "
         "merged.</p>")
PUBLIC = ("<p class='fs-note fs-warning'><span class='fs-light'></span><span>Nothing is trained on a public page. Copy the recipe "
          "and run it on your own machine; the alignment view below works here.</span></p>")


@dataclass(frozen=True)
class FuseTab:
    """The components of the tab; `controls` by the names that `setting.read` knows."""

    controls: dict[str, gr.components.Component]
    own: gr.Column
    demo: gr.Column
    plan_button: gr.Button
    run: gr.Button
    stop: gr.Button
    status: gr.HTML
    curves: gr.HTML
    plan: gr.HTML
    recipe: gr.Code
    command: gr.Code
    source: gr.Dropdown
    example: gr.Dropdown
    asked: gr.Textbox
    answer: gr.Textbox
    show: gr.Button
    figure: gr.HTML


def lay_out(studio: Studio) -> FuseTab:
    """Build the tab's components; the demo family's pivot and sources are picked first."""
    gr.HTML(INTRO, padding=False)
    with gr.Row(elem_id="fuse-row"):
        with gr.Column(scale=5, min_width=300):
            models = _models(studio)
            data, own, demo = _data(studio)
            training, more = _training(), _more()
        with gr.Column(scale=6, min_width=300):
            actions = _actions(studio)
            controls = {**models, **data, **training, **more, "name": actions.pop("name")}
    return FuseTab(controls, own, demo, **actions, **_alignment(studio))


def menu(studio: Studio) -> list[tuple[str, str]]:
    """Every model of the catalogue as a menu has it."""
    return [(entry.title, entry.key) for entry in studio.entries()]


def _models(studio: Studio) -> dict:
    first = studio.first_selection()
    pivot = gr.Dropdown(menu(studio), value=first.pivot or None, label="Pivot", elem_id="fuse-pivot",
                        info="Gives the targets their shape and tokenizer; training begins at it.")
    sources = gr.Dropdown(menu(studio), value=list(first.sources), multiselect=True, max_choices=8, label="Sources",
                          elem_id="fuse-sources", info="Who is listened to: any architecture, any tokenizer.")
    mode = gr.Radio(MODES, value="pairwise", label="Targets", elem_id="fuse-mode")
    return {"pivot": pivot, "sources": sources, "mode": mode}


def _data(studio: Studio) -> tuple[dict, gr.Column, gr.Column]:
    kind = gr.Radio([("demo dialogues", DEMO), ("my own", OWN)], value=DEMO, label="Dialogues", elem_id="fuse-data",
                    visible=not studio.public)
    with gr.Column() as demo:
        count = gr.Number(192, precision=0, minimum=8, maximum=5000, label="Number of demo dialogues", elem_id="fuse-count",
                          info="Generated questions and answers on eight domains, the same for the same seed.")
    with gr.Column(visible=False) as own:
        path = gr.Textbox(label="File, folder or Hub dataset", placeholder="/data/mixture.jsonl or org/name", max_lines=1,
                          elem_id="fuse-path", info="ShareGPT or OpenAI style: .json, .jsonl, .parquet.")
        limit = gr.Number(0, precision=0, minimum=0, label="At most", elem_id="fuse-limit", info="0: all of them.")
    return {"data": kind, "count": count, "path": path, "limit": limit}, own, demo


def _training() -> dict:
    lm_weight = gr.Slider(0, 1, 0.9, step=0.05, label="λ", elem_id="fuse-lambda",
                          info="loss = λ · language model + (1 − λ) · fusion. 1 is plain fine-tuning.")
    with gr.Row():
        learning_rate = gr.Number(5e-4, minimum=0, label="Learning rate", elem_id="fuse-rate", min_width=120, step=1e-5,
                                  info="7B models: 5e-6")
        epochs = gr.Number(2, minimum=0, label="Epochs", elem_id="fuse-epochs", min_width=120, info="passes over the data")
    rule = gr.Radio(RULES, value="mince", label="Whose distribution", elem_id="fuse-rule",
                    info="By cross-entropy (CE) of the true reply, in nats per token of the pivot.")
    return {"lm_weight": lm_weight, "learning_rate": learning_rate, "epochs": epochs, "rule": rule}


def _more() -> dict:
    with gr.Accordion("Loss, level, batch, LoRA, alignment, seed", open=False, elem_id="fuse-more"):
        with gr.Row():
            kind = gr.Dropdown(list(KINDS), value="ce", label="Fusion loss", min_width=130, elem_id="fuse-kind",
                               info="ce: −Σ p log q; kl: Σ p log (p/q). Same gradient.")
            level = gr.Dropdown(list(LEVELS), value="dialogue", label="Compared over a whole", min_width=130, elem_id="fuse-level",
                                info="Where CE is averaged before the choice.")
        with gr.Row():
            batch = gr.Number(8, precision=0, minimum=1, label="Batch", min_width=90, elem_id="fuse-batch", info="dialogues a step")
            accumulate = gr.Number(1, precision=0, minimum=1, label="Accumulate", min_width=90, elem_id="fuse-accumulate",
                                   info="batches an update")
            max_steps = gr.Number(0, precision=0, minimum=0, label="Steps", min_width=90, elem_id="fuse-steps", info="0: by epochs")
            lora = gr.Number(0, precision=0, minimum=0, label="LoRA rank r", min_width=90, elem_id="fuse-lora",
                             info="W + BA, B·A of rank r; 0: all of W")
        with gr.Row():
            alignment = gr.Dropdown(list(ALIGNMENTS), value="offsets", label="Alignment", min_width=130, elem_id="fuse-alignment",
                                    info="offsets: exact; warp: the papers' edit distance.")
            mapping = gr.Dropdown(list(MAPPINGS), value="spelling", label="Vocabulary", min_width=130, elem_id="fuse-mapping",
                                  info="Which pivot token stands for a source token.")
        with gr.Row():
            top_k = gr.Number(10, precision=0, minimum=1, maximum=200, label="Top k", min_width=90, elem_id="fuse-topk",
                              info="tokens kept per place")
            max_tokens = gr.Number(512, precision=0, minimum=8, label="Longest", min_width=90, elem_id="fuse-tokens",
                                   info="tokens a dialogue")
            seed = gr.Number(0, precision=0, minimum=0, label="Seed", min_width=90, elem_id="fuse-seed", info="of data and order")
    return {"kind": kind, "level": level, "batch": batch, "accumulate": accumulate, "max_steps": max_steps, "lora_rank": lora,
            "alignment": alignment, "mapping": mapping, "top_k": top_k, "max_tokens": max_tokens, "seed": seed}


def _actions(studio: Studio) -> dict:
    if studio.public:
        gr.HTML(PUBLIC, padding=False)
    with gr.Row(elem_id="fuse-run-row"):
        name = gr.Textbox("my-fusion", label="Save as", max_lines=1, max_length=64, elem_id="fuse-name", scale=3, min_width=160,
                          info=f"A folder in {studio.outputs.name}/; an unfinished one is gone on with")
        plan_button = gr.Button("Plan", elem_id="fuse-plan", scale=1, min_width=80)
        run = gr.Button("Fuse", variant="primary", elem_id="fuse-run", scale=1, min_width=90, visible=not studio.public)
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="fuse-stop", scale=1, min_width=90)
    status = gr.HTML("", elem_id="fuse-status", padding=False)
    curves = gr.HTML("", elem_id="fuse-curves", padding=False)
    plan = gr.HTML("", elem_id="fuse-stages", padding=False)
    with gr.Accordion("Recipe and command line", open=False, elem_id="fuse-recipe-box"):
        recipe = gr.Code(language="yaml", label="Recipe", interactive=False, elem_id="fuse-recipe", max_lines=24,
                         buttons=["copy", "download"])
        command = gr.Code(language="shell", label="The same on the command line", interactive=False, elem_id="fuse-command",
                          lines=2, wrap_lines=True, buttons=["copy"])
    return {"name": name, "plan_button": plan_button, "run": run, "stop": stop, "status": status, "curves": curves, "plan": plan,
            "recipe": recipe, "command": command}


def _alignment(studio: Studio) -> dict:
    first, picked = examples()[0], studio.first_selection().sources
    with gr.Column(elem_id="alignment-box"):
        gr.HTML("<div class='fs-section'><h2 class='fs-title'>Alignment view</h2><p class='fs-lead'>One dialogue as the pivot and "
                "a source read it: which tokens correspond, what each expects next, and whose word the pivot is taught.</p></div>",
                padding=False)
        with gr.Row():
            source = gr.Dropdown(menu(studio), value=picked[0] if picked else None, label="Source", elem_id="align-source",
                                 min_width=160)
            example = gr.Dropdown([(text[:80], i) for i, (text, _) in enumerate(examples())], value=0, label="Dialogue",
                                  elem_id="align-example", min_width=200, scale=2)
        with gr.Row(elem_id="align-texts"):
            asked = gr.Textbox(first[0], label="User", lines=2, max_lines=8, max_length=4000, elem_id="align-user", min_width=200,
                               scale=3)
            answer = gr.Textbox(first[1], label="Reply", lines=2, max_lines=8, max_length=4000, elem_id="align-reply",
                                min_width=200, scale=3)
            show = gr.Button("Show", elem_id="align-show", min_width=90, scale=1)
        drawn = figure()
    return {"source": source, "example": example, "asked": asked, "answer": answer, "show": show, "figure": drawn}

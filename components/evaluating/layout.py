"""What stands in the Evaluate tab: on the left which models and by what, on the right how; below what was found."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from components.evaluating import asking
from components.state import Selection
from components.studio import Studio
from fusion.evaluate import Endpoint
from fusion.evaluate.judge import MAX_NEW_TOKENS

_JUDGE_HINT = ("<p class='fs-hint'>Prompts, references and answers are sent to that address. A key is read from the environment "
               "variable OPENAI_API_KEY of this app, never typed here.</p>")
_EMPTY = "<p class='fs-hint'>The table, a chart, every answer and the files to keep appear here.</p>"


@dataclass(frozen=True)
class EvaluateTab:
    """The components of the tab; `asked` are those that say what is evaluated, in the order of `asking.Form`."""

    models: gr.Dropdown
    reference: gr.Dropdown
    kind: gr.Radio
    panels: dict[str, gr.Column]
    asked: list
    run: gr.Button
    stop: gr.Button
    status: gr.HTML
    results: gr.Column
    table: gr.HTML
    chart: gr.Plot
    command: gr.Code
    downloads: list[gr.DownloadButton]
    notes: gr.HTML
    answers: gr.HTML


def lay_out(studio: Studio, now: Selection) -> EvaluateTab:
    """Build the tab's components for the first selection."""
    with gr.Row(elem_id="evaluate-row"):
        with gr.Column(scale=5, min_width=300):
            models, reference, kind = _who(studio, now)
        with gr.Column(scale=6, min_width=300):
            panels, asked = _how(studio)
            with gr.Row(elem_id="evaluate-actions"):
                run = gr.Button("Evaluate", variant="primary", size="lg", elem_id="evaluate-run", scale=4, min_width=160)
                stop = gr.Button("Stop", variant="stop", visible=False, elem_id="evaluate-stop", scale=1, min_width=90)
            status = gr.HTML(_EMPTY, elem_id="evaluate-status", padding=False)
    return EvaluateTab(models, reference, kind, panels, [models, reference, kind, *asked], run, stop, status, **_results())


def _who(studio: Studio, now: Selection) -> tuple[gr.Dropdown, gr.Dropdown, gr.Radio]:
    first = asking.usual(now)
    models = gr.Dropdown(asking.choices(studio, now), value=list(first), multiselect=True, max_choices=asking.MAX_MODELS,
                         label="Models", elem_id="evaluate-models", info="Merges in memory stand first. All get the same prompts.")
    reference = gr.Dropdown(asking.references(studio, now, first), value=asking.usual_reference(now, first),
                            label="Compared with", elem_id="evaluate-reference",
                            info="The others' change from this one, with a paired test.")
    kind = gr.Radio([(title, name) for name, title in asking.kinds(studio).items()], value="domains", label="By what",
                    elem_id="evaluate-kind")
    return models, reference, kind


def _how(studio: Studio) -> tuple[dict[str, gr.Column], list]:
    panels, asked = {}, []
    for name, fill in (("domains", _domains), ("perplexity", _perplexity), ("judge", _judge), ("lm-eval", _lm_eval)):
        with gr.Column(visible=name == "domains", elem_id=f"evaluate-{name}") as panels[name]:
            asked += fill(studio)
    return panels, asked


def _domains(studio: Studio) -> list:
    domains = gr.CheckboxGroup(list(asking.DOMAINS), value=list(asking.DOMAINS), label="Domains", elem_id="evaluate-domains-which",
                               info="The demo's held-out prompts; a program says whether an answer is right.")
    with gr.Row():
        prompts = gr.Slider(5, asking.most_prompts(studio), value=10, step=5, label="Prompts per domain", min_width=200,
                            elem_id="evaluate-prompts", info="More prompts, narrower intervals.")
        longest = gr.Slider(8, 512, value=64, step=8, label="Longest answer", elem_id="evaluate-longest", min_width=200,
                            info="In tokens; what is longer is cut off, and flagged.")
    return [domains, prompts, longest]


def _perplexity(studio: Studio) -> list:
    text = gr.Textbox(label="Text", lines=7, max_lines=20, max_length=asking.MAX_TEXT, elem_id="evaluate-text",
                      placeholder="Paste what the models shall read.\n\nAn empty line begins a new piece.",
                      info="Pieces are what intervals are drawn from: ten or more make them mean something.")
    with gr.Row(visible=not studio.public):
        source = gr.Textbox(label="Or a file or data set", max_lines=1, max_length=1000, elem_id="evaluate-source", scale=3,
                            min_width=200, placeholder="dialogues.jsonl, text.txt, or owner/name on the Hub",
                            info="On this machine, or downloaded. Counts when no text is pasted.")
        pieces = gr.Number(200, precision=0, minimum=1, label="Pieces at most", elem_id="evaluate-pieces", scale=1, min_width=120,
                           info="From the start.")
    return [text, source, pieces]


def _judge(studio: Studio) -> list:
    questions = gr.Textbox(label="Prompts", lines=6, max_lines=20, max_length=asking.MAX_TEXT, elem_id="evaluate-questions",
                           placeholder="One prompt in every line, or MT-Bench's question.jsonl",
                           info="Every model answers all of them; the judge reads the answers.")
    with gr.Row():
        endpoint = gr.Textbox(label="Endpoint", max_lines=1, max_length=500, elem_id="evaluate-endpoint", scale=3, min_width=200,
                              placeholder="https://api.openai.com/v1", info="Any OpenAI-compatible address.")
        judge = gr.Textbox(label="Judge", max_lines=1, max_length=200, elem_id="evaluate-judge-model", scale=2, min_width=140,
                           info="The model's name there.")
    with gr.Row():
        mode = gr.Radio(asking.MODES, value="grades", label="Verdicts", elem_id="evaluate-mode", scale=3, min_width=200)
        name = gr.Textbox("my-evaluation", label="Save as", max_lines=1, max_length=64, elem_id="evaluate-name", scale=2,
                          min_width=140, info=f"A new folder in {studio.outputs.name}/")
    with gr.Row():
        answer = gr.Number(MAX_NEW_TOKENS, precision=0, minimum=1, label="Longest answer", scale=1, min_width=140,
                           elem_id="evaluate-answer-tokens", info="In tokens, of the models.")
        verdict = gr.Number(Endpoint.max_tokens, precision=0, minimum=1, label="Longest verdict", scale=1, min_width=140,
                            elem_id="evaluate-verdict-tokens", info="In tokens; a reasoning judge needs more.")
        references = gr.Textbox(label="References (optional)", lines=1, max_lines=8, max_length=asking.MAX_TEXT, scale=2,
                                min_width=200, elem_id="evaluate-references", placeholder="data/mt_bench/reference_answer",
                                info="A folder or file of reference answers, or its lines.")
    gr.HTML(_JUDGE_HINT, padding=False)
    return [questions, endpoint, judge, mode, name, answer, verdict, references]


def _lm_eval(studio: Studio) -> list:
    tasks = gr.Textbox(label="Tasks", max_lines=1, max_length=1000, elem_id="evaluate-tasks", placeholder="arc_easy, hellaswag",
                       info="Names of lm-eval, which downloads their data.")
    limit = gr.Number(50, precision=0, minimum=1, label="Questions per task at most", elem_id="evaluate-limit")
    return [tasks, limit]


def _results() -> dict:
    with gr.Column(visible=False, elem_id="evaluate-results") as results:
        table = gr.HTML("", elem_id="evaluate-table", padding=False)
        with gr.Row(elem_id="evaluate-below"):
            chart = gr.Plot(show_label=False, elem_id="evaluate-chart", min_width=320, scale=6)
            with gr.Column(scale=5, min_width=300):
                with gr.Row(elem_id="evaluate-files"):
                    downloads = [gr.DownloadButton(f"Download {kind}", size="sm", min_width=120,
                                                   elem_id=f"evaluate-{kind.lower()}") for kind in ("CSV", "Markdown", "JSON")]
                command = gr.Code(language="shell", label="The same on the command line", interactive=False, lines=2,
                                  elem_id="evaluate-command", wrap_lines=True, buttons=["copy"])
                notes = gr.HTML("", elem_id="evaluate-notes", padding=False)
        with gr.Accordion("Every prompt and every answer", open=False, elem_id="evaluate-answers-box"):
            answers = gr.HTML("", elem_id="evaluate-answers", padding=False)
    return {"results": results, "table": table, "chart": chart, "command": command, "downloads": downloads,
            "notes": notes, "answers": answers}

"""What the merge did: a finished merge beside its parents, in memory or saved, in lights, bars and five answers.

Price: one pass over the result and its parents, the merge once more in float32, and the model that answers, from the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

import gradio as gr
import numpy as np
from gradio.events import Dependency

from components.inspecting import AT_ONCE_BYTES, Stops, watched
from components.state import COLORS, Selection
from components.studio import Studio
from fusion import FusionError, RecipeError, place
from fusion.progress import Work
from fusion.review import Answer, Review, answered, ask_model, review, review_live

MAX_TEXT = 600  # characters of an answer that are shown
_QUIET = {"show_progress": "hidden", "api_visibility": "private"}
_WORDS = {"good": "Nothing looks wrong", "warning": "Worth a look before you use it", "bad": "Something is wrong"}
_ENDS = {"stop": "ended by itself", "length": "cut off", "error": "failed"}
_PIVOT = "var(--neutral-500)"


@dataclass(frozen=True)
class ReportBox:
    """The components of the panel."""

    which: gr.Dropdown
    check: gr.Button
    stop: gr.Button
    report: gr.HTML


def lay_out(studio: Studio, now: Selection) -> ReportBox:
    """Build the panel's components."""
    with gr.Accordion("What the merge did", open=True, elem_id="report-box"):
        with gr.Row(elem_id="report-row"):
            which = gr.Dropdown(merges(studio, now), value=None, label="Merge", elem_id="report-which", scale=3, min_width=160,
                                info="Made here or saved; its parents are read once more.")
            check = gr.Button("Check", elem_id="report-check", scale=1, min_width=90)
            stop = gr.Button("Stop", variant="stop", visible=False, elem_id="report-stop", scale=1, min_width=90)
        report = gr.HTML("", elem_id="report", padding=False)
    return ReportBox(which, check, stop, report)


def bind(studio: Studio, page: gr.Blocks, selection: gr.State, box: ReportBox, saved: Dependency, name: gr.Textbox) -> None:
    """Bind the panel; `saved` is the event that ends with a saved folder of this `name`."""
    outputs, stops = [box.report, box.check, box.stop], Stops()

    def check(key: str | None, now: Selection, request: gr.Request) -> Iterator[list]:
        """Check a merge, in memory or saved: distances to its parents, numbers, tokenizer, five prompts."""
        yield from _shown(stops.drive(reviewed(studio, key, now), request.session_hash))

    def check_saved(title: str, now: Selection, request: gr.Request) -> Iterator[list]:
        """Show what was just saved, if it is small and was saved indeed."""
        key = next((one.key for one in studio.entries() if one.key == f"outputs/{str(title).strip()}"), None)
        if key is None or studio.public or not small(studio, key):
            yield [gr.skip()] * 4
            return
        for shown in _shown(stops.drive(reviewed(studio, key, now), request.session_hash)):
            yield [*shown, gr.Dropdown(merges(studio, now), value=key)]

    box.check.click(check, [box.which, selection], outputs, api_name="check_merge", show_progress="hidden", concurrency_limit=2)
    saved.success(check_saved, [name, selection], [*outputs, box.which], concurrency_limit=2, **_QUIET)
    box.stop.click(stops.stop, None, None, queue=False, **_QUIET)
    gr.on([page.load, selection.change], lambda now: _menu(studio, now), selection, box.which, **_QUIET)


def merges(studio: Studio, now: Selection) -> list[tuple[str, str]]:
    """The merges that can be checked: this visitor's, newest first, then the saved ones."""
    return [(f"{merge.title} · in memory", merge.key) for merge in reversed(now.merges)] + [
        (entry.title, entry.key) for entry in studio.entries() if entry.key.startswith("outputs/")]


def _menu(studio: Studio, now: Selection) -> gr.Dropdown:
    choices = merges(studio, now)
    return gr.Dropdown(choices, value=choices[0][1] if choices else None)


def small(studio: Studio, key: str) -> bool:
    """Whether a saved merge is checked without being asked."""
    return studio.checkpoint(key).nbytes <= AT_ONCE_BYTES


def _shown(work: Work[tuple[Review, str]]) -> Iterator[list]:
    """Show a check while it runs and what it found; yields [report, check, stop]."""
    for html, running in watched(work, lambda found: report_html(*found)):
        yield [html, gr.Button(interactive=not running), gr.Button(visible=running)]


def reviewed(studio: Studio, key: str | None, now: Selection) -> Work[tuple[Review, str]]:
    """Review a merge by its key, with answers of the pool's model; returns it with its title. RecipeError for other keys."""
    if not isinstance(key, str) or key not in {known for _, known in merges(studio, now)}:
        raise RecipeError("no merge is picked", todo="Press Merge and try, or Save, and check the result here.")
    title = studio.title(key)
    if key.startswith("outputs/"):
        folder = studio.folder(key)
        try:
            report = yield from review(folder, smoke=False)
        except FusionError as error:  # a stranger learns the title, not the path
            raise RecipeError(str(error).replace(str(folder), title)) from error
    else:
        result = yield from studio.live(key)
        report = yield from review_live(result, title)
    with studio.chat_model(key, now) as model:
        return answered(report, (yield from ask_model(model))), title


# ── drawing ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def report_html(report: Review, title: str) -> str:
    """A review as one card; every text in it comes from files or a model and is escaped."""
    lights = "".join(f"<li class='fs-{one.level}'><span class='fs-light'></span><span>{escape(one.text)}</span></li>"
                     for one in report.findings)
    before, after = report.parameters
    facts = (("Parameters before", f"{before:,}"), ("Parameters after", f"{after:,}"), ("Stored as", report.dtype),
             ("Head", "tied" if report.tied[1] else "its own"),
             ("Rounding loses", "–" if report.lost_total is None else f"{report.lost_total:.2%}"))
    cost = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return (f"<section class='fs-card fs-report'><h3 class='fs-verdict fs-{report.level}'><span class='fs-light'></span>"
            f"{escape(title)}: {_WORDS[report.level]}</h3><ul class='fs-lights'>{lights}</ul><dl class='fs-cost'>{cost}</dl>"
            f"{_distances(report)}{_answers(report.answers or ())}</section>")


def _distances(report: Review) -> str:
    """How far the result lies from each parent, in all and per kind of matrix."""
    kinds = np.array([place(name).kind for name in report.names])
    rows = {"whole model": report.totals}
    for kind in dict.fromkeys(kinds):
        part = report.parts[kinds == kind]
        square, whole = ((values[kinds == kind] * part).sum(axis=0) for values in (report.square, report.parent_square))
        rows[kind] = np.sqrt(np.divide(square, whole, out=np.full(len(whole), np.nan), where=whole > 0))
    top = max((float(value) for values in rows.values() for value in values if np.isfinite(value)), default=0) or 1.0
    colors = [_PIVOT, *COLORS * len(report.parents)][:len(report.parents)]
    legend = "".join(f"<span><i style='background:{color}'></i>{escape(parent)}</span>"
                     for parent, color in zip(report.parents, colors, strict=True))
    groups = "".join(f"<div class='fs-group'><b>{escape(name)}</b><div>"
                     + "".join(_bar(value, top, color, f"{parent}, {name}") for value, color, parent in
                               zip(values, colors, report.parents, strict=True)) + "</div></div>" for name, values in rows.items())
    return ("<h4>Distance to its parents</h4><p class='fs-lead'>‖result − parent‖ ÷ ‖parent‖. The shorter the bar, the more the "
            f"result is like that parent.</p><div class='fs-legend'>{legend}</div>{groups}")


def _bar(value: float, top: float, color: str, said: str) -> str:
    if not np.isfinite(value):
        return f"<p><span></span><small aria-label='{escape(said, quote=True)}: no part'>no part</small></p>"
    return (f"<p role='img' aria-label='{escape(said, quote=True)}: {value:.1%}'><span><i style='width:{100 * value / top:.2f}%;"
            f"background:{color}'></i></span><small>{value:.1%}</small></p>")


def _answers(answers: tuple[Answer, ...]) -> str:
    """The five answers, each with its light."""
    if not answers:
        return ""
    lead = "<h4>Five prompts</h4><p class='fs-lead'>The likeliest words, 64 tokens at most.</p>"
    return f"{lead}<ol class='fs-answers'>{''.join(map(_answer, answers))}</ol>"


def _answer(one: Answer) -> str:
    level = "bad" if one.finish == "error" or one.perplexity is None else "good" if one.sound else "warning"
    text = one.error or one.text.strip()
    shown = f"{escape(text[:MAX_TEXT])}{'…' * (len(text) > MAX_TEXT)}" if text else "<i>empty</i>"
    facts = [f"{one.tokens} tokens", _ENDS.get(one.finish, one.finish), *([] if text else ["empty"])]
    return (f"<li><p class='fs-{level}'><span class='fs-light'></span><b>{escape(one.prompt)}</b></p>"
            f"<div>{shown}</div><small>{escape(' · '.join(facts))}</small></li>")

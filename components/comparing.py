"""Two merges or models beside each other: the settings in which their recipes differ, and how far their matrices lie apart.

Price: nothing is read for two recipes; two folders are read once, with their common pivot where it is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

import gradio as gr
import numpy as np

from components.inspecting import Stops, watched
from components.reports import merges
from components.state import Selection
from components.status import note
from components.studio import Studio
from fusion import FusionError, Recipe, RecipeError, place
from fusion.compare import Comparison, Difference, compare, compare_recipes, recipe_of
from fusion.progress import Work

MAX_ROWS = 40  # settings and matrices that are shown
MAX_CHARS = 200  # of a setting's value
_QUIET = {"show_progress": "hidden", "api_visibility": "private"}


def build(studio: Studio, page: gr.Blocks, selection: gr.State) -> None:
    """Lay out the panel and bind its events."""
    now = selection.value
    with gr.Accordion("Compare two merges or models", open=False, elem_id="compare-box"):
        with gr.Row(elem_id="compare-row"):
            first, second = (gr.Dropdown(choices(studio, now), value=None, label=label, elem_id=f"compare-{label.lower()}", scale=3,
                                         min_width=160) for label in ("First", "Second"))
            run = gr.Button("Compare", elem_id="compare-run", scale=1, min_width=100)
            stop = gr.Button("Stop", variant="stop", visible=False, elem_id="compare-stop", scale=1, min_width=90)
        gr.HTML("<p class='fs-hint'>Merges in memory are compared by their recipes, folders also matrix by matrix.</p>",
                padding=False)
        result = gr.HTML("", elem_id="comparison", padding=False)

    stops = Stops()

    def show(one: str | None, other: str | None, now: Selection, request: gr.Request) -> Iterator[list]:
        """Compare two merges or models: their recipes, and their matrices where both are folders."""
        for html, running in watched(stops.drive(compared(studio, one, other, now), request.session_hash), str):
            yield [html, gr.Button(interactive=not running), gr.Button(visible=running)]

    run.click(show, [first, second, selection], [result, run, stop], api_name="compare", show_progress="hidden",
              concurrency_limit=2)
    stop.click(stops.stop, None, None, queue=False, **_QUIET)
    gr.on([page.load, selection.change, first.focus, second.focus], lambda now: [gr.Dropdown(choices(studio, now))] * 2, selection,
          [first, second], **_QUIET)


def choices(studio: Studio, now: Selection) -> list[tuple[str, str]]:
    """This visitor's merges, then everything in the catalogue."""
    saved = merges(studio, now)
    known = {key for _, key in saved}
    return saved + [(entry.title, entry.key) for entry in studio.entries() if entry.key not in known]


def compared(studio: Studio, one: str | None, other: str | None, now: Selection) -> Work[str]:
    """Compare two keys of `choices`; returns HTML. RecipeError for other keys, for one twice, and where nothing can be compared."""
    known = [key for _, key in choices(studio, now)]
    if one not in known or other not in known or one == other:
        raise RecipeError("two different merges or models are needed", where="Compare", todo="Pick one in each menu.")
    try:
        return (yield from _compared(studio, one, other, now))
    except FusionError as error:  # a stranger learns the title, not the path
        raise RecipeError(_plain(studio, str(error))) from error


def _compared(studio: Studio, one: str, other: str, now: Selection) -> Work[str]:
    in_memory, titles = {merge.key for merge in now.merges}, (studio.title(one), studio.title(other))
    if in_memory.isdisjoint((one, other)):
        report = yield from compare(studio.ref(one), studio.ref(other))
        return comparison_html(report, titles, lambda value: _plain(studio, value))
    recipes = [(studio.merge_recipe(key),) if key in in_memory else recipe_of(Path(studio.ref(key))) for key in (one, other)]
    if not all(recipes):
        raise RecipeError(f"{titles[recipes.index(())]} has no recipe, and the other one is in memory", where="Compare",
                          todo="Save the merge to compare its matrices.")
    found = compare_recipes(*map(_without_results, recipes))
    hint = note("good", "These are the recipes. Save merges to compare their matrices.")
    return f"<section class='fs-card fs-report'>{_settings(found, titles, lambda value: _plain(studio, value))}{hint}</section>"


def _without_results(stages: tuple[Recipe, ...]) -> tuple[Recipe, ...]:
    """Recipes as they were before a run wrote its digests into them."""
    return tuple(recipe.with_(revisions={}, result={}) for recipe in stages)


def _plain(studio: Studio, text: str) -> str:
    """Folders by their titles; on a public page any other path by its last part."""
    text = studio.by_title(text)
    return Path(text).name if studio.public and text.startswith("/") else text


def comparison_html(report: Comparison, titles: tuple[str, str], plain=str) -> str:
    """A comparison of two folders as one card; every text in it is escaped."""
    total, lead = report.totals, "They hold the same numbers."
    if not report.same_weights:
        far = "" if total["distance"] is None else f"{titles[1]} lies {total['distance']:.2%} of the norm from {titles[0]}. "
        near = "" if total["cosine"] is None else f"Cosine of what both changed in {report.pivot}: {total['cosine']:.4f}."
        lead = far + near
    said = [f"<p class='fs-apart'>{escape(lead)}</p>"]
    said += [note("warning", plain(text)) for text in report.notes]
    said += [note("warning", f"{len(only)} matrices are only in {title}, first {only[0]}.")
             for title, only in zip(titles, report.only, strict=True) if only]
    said += [note("warning", text) for text in _tokenizers(report, titles)]
    return (f"<section class='fs-card fs-report'><div class='fs-flags'>{''.join(said)}</div>"
            f"{'' if report.recipe is None else _settings(report.recipe, titles, plain)}{_matrices(report)}</section>")


def _tokenizers(report: Comparison, titles: tuple[str, str]) -> Iterator[str]:
    kept = report.tokenizer
    if kept["same_vocabulary"] is False:
        yield (f"Tokenizers: {kept['only_first']:,} tokens are only in {titles[0]}, {kept['only_second']:,} only in {titles[1]}, "
               f"{kept['renumbered']:,} have another number.")
    if not kept["same_chat_template"]:
        yield "The chat templates differ."


def _settings(found: tuple[Difference, ...], titles: tuple[str, str], plain) -> str:
    """The settings that differ as a table."""
    shown = [one for one in found if not one.setting.startswith(("revisions", "result"))]
    if not shown:
        return "<h4>Recipes</h4><p class='fs-lead'>The two recipes say the same.</p>"
    rows = "".join(f"<tr><th scope='row'>{escape(one.setting)}</th><td>{_value(one.first, plain)}</td>"
                   f"<td>{_value(one.second, plain)}</td></tr>" for one in shown[:MAX_ROWS])
    more = f"<p class='fs-lead'>… and {len(shown) - MAX_ROWS} more.</p>" if len(shown) > MAX_ROWS else ""
    return f"<h4>Recipes</h4>{_table(('setting', *titles), rows)}{more}"


def _value(value: object, plain) -> str:
    text = "–" if value is None else plain(value if isinstance(value, str) else str(value))
    return escape(text[:MAX_CHARS]) + "…" * (len(text) > MAX_CHARS)


def _matrices(report: Comparison) -> str:
    """Distances per kind of matrix as bars, and the farthest matrices by name."""
    if report.same_weights or not report.square.any():
        return ""
    kinds, distance, cosine = np.array([place(name).kind for name in report.names]), np.nan_to_num(report.distance), report.cosine
    pooled = {kind: float(np.sqrt(report.square[kinds == kind].sum() / max(report.first_square[kinds == kind].sum(), 1e-300)))
              for kind in dict.fromkeys(kinds)}
    top = max(pooled.values()) or 1.0
    bars = "".join(f"<div class='fs-group'><b>{kind}</b><div><p role='img' aria-label='{kind}: {value:.1%}'><span>"
                   f"<i style='width:{100 * min(value / top, 1):.2f}%;background:var(--color-accent)'></i></span>"
                   f"<small>{value:.1%}</small></p></div></div>" for kind, value in pooled.items())
    order = np.argsort(-distance, kind="stable")[:MAX_ROWS]
    rows = "".join(f"<tr><th scope='row'>{escape(report.names[t])}</th><td>{distance[t]:.2%}</td>"
                   f"<td>{f'{cosine[t]:.4f}' if np.isfinite(cosine[t]) else '–'}</td></tr>" for t in order)
    return ("<h4>Matrices</h4><p class='fs-lead'>‖second − first‖ ÷ ‖first‖; the cosine is that of both changes from the common "
            f"pivot.</p>{bars}<details><summary>The {len(order)} that lie farthest apart</summary>"
            f"{_table(('matrix', 'distance', 'cosine'), rows, ' fs-numbers')}</details>")


def _table(head: tuple[str, ...], rows: str, kind: str = "") -> str:
    cells = "".join(f"<th scope='col'>{escape(text)}</th>" for text in head)
    return f"<div class='fs-table{kind}' tabindex='0'><table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>"

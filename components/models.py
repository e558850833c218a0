"""The Models tab: pick a pivot, targets, and sources to chat with; see at once whether they can be merged and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from html import escape

import gradio as gr
import numpy as np

from components.heatmap import Grid
from components.state import COLORS, INKS, LETTERS, MAX_TARGETS, Selection
from components.status import note
from components.studio import Studio
from fusion import FusionError, Preflight, demo, place
from fusion.preflight import Facts, Finding
from fusion.tables import bytes_text

_WORDS = {"good": "ready", "warning": "look", "bad": "cannot be merged"}
_ABOUT = {f"demo/{member.name}": member.strengths for member in demo.FAMILY}


@dataclass(frozen=True)
class ModelsTab:
    """The components of the tab."""

    pivot: gr.Dropdown
    targets: gr.Dropdown
    sources: gr.Dropdown
    table: gr.HTML
    glance: gr.HTML


def build(studio: Studio, selection: gr.State) -> ModelsTab:
    """Lay out the tab and bind its events; what is picked goes into `selection`."""
    first: Selection = selection.value
    with gr.Row(elem_id="models-row"):
        with gr.Column(scale=4, min_width=300):
            pivot = gr.Dropdown(_choices(studio), value=first.pivot, label="Pivot", elem_id="pivot",
                                info="Gives the result its shape and tokenizer; variation is measured from it.")
            targets = gr.Dropdown(_choices(studio), value=list(first.targets), multiselect=True, max_choices=MAX_TARGETS,
                                  label="Targets", elem_id="targets", info="One to four fine-tunes of the pivot, to be merged.")
            sources = gr.Dropdown(_choices(studio), value=list(first.sources), multiselect=True, max_choices=8, label="Sources",
                                  elem_id="sources", info="Models of any architecture to chat with beside the merge.")
            if studio.nothing:
                gr.HTML(note("warning", studio.nothing), elem_id="no-models", padding=False)
            add = None if studio.public else _folder_box()
        with gr.Column(scale=7, min_width=300):
            table = gr.HTML(verdict(studio, first), elem_id="preflight", padding=False)
            glance = gr.HTML("", elem_id="glance", padding=False)
    tab = ModelsTab(pivot, targets, sources, table, glance)
    _bind(studio, selection, tab, add)
    return tab


def _folder_box() -> tuple[gr.Textbox, gr.Button]:
    with gr.Accordion("Open a folder on this machine", open=False, elem_id="open-folder"):
        path = gr.Textbox(label="Checkpoint folder", placeholder="/models/my-fine-tune", elem_id="folder-path",
                          info="A model, an adapter, or BASE+ADAPTER.")
        return path, gr.Button("Add to the menus", size="sm", elem_id="folder-add")


def _bind(studio: Studio, selection: gr.State, tab: ModelsTab, add: tuple[gr.Textbox, gr.Button] | None) -> None:
    menus = [tab.pivot, tab.targets, tab.sources]

    def choose(pivot: str | None, targets: list[str], sources: list[str], now: Selection):
        """Check a pivot, targets and sources (keys of the catalogue) and select them."""
        targets, sources = targets or (), sources or ()
        try:
            for key in filter(None, (pivot, *targets, *sources)):
                studio.entry(key)
            if len(targets) > MAX_TARGETS:
                raise gr.Error(f"Pick at most {MAX_TARGETS} targets.")
        except FusionError as error:
            raise gr.Error(str(error)) from error
        chosen = replace(now, pivot=pivot or "", targets=tuple(targets), sources=tuple(sources))
        return chosen, verdict(studio, chosen)

    def emptied(pivot: str | None, targets: list[str], sources: list[str], now: Selection):
        if (targets or not now.targets) and (sources or not now.sources):
            return gr.skip(), gr.skip()
        return choose(pivot, targets, sources, now)

    gr.on([menu.input for menu in menus], choose, [*menus, selection], [selection, tab.table], api_name="choose",
          show_progress="hidden", trigger_mode="always_last")
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    # The × of a menu is no input but a change, which also comes when a recipe fills the menus.
    gr.on([tab.targets.change, tab.sources.change], emptied, [*menus, selection], [selection, tab.table],
          trigger_mode="always_last", **quiet)
    # The menus themselves are never written here: a slow answer would take back what was picked meanwhile.
    selection.change(lambda now: verdict(studio, now), selection, tab.table, **quiet)
    if add is not None:
        path, button = add

        def open_folder(text: str):
            try:
                entry = studio.add_folder(text)
            except FusionError as error:
                raise gr.Error(str(error)) from error
            gr.Info(f"{entry.title} is in the menus now.")
            return [gr.Dropdown(choices=_choices(studio)) for _ in menus] + [""]

        gr.on([button.click, path.submit], open_folder, path, [*menus, path], api_visibility="private", show_progress="hidden")


def follow(studio: Studio, now: Selection) -> list:
    """Menus and verdict that show a selection, e.g. one that came with a recipe or after a merge was saved."""
    choices = _choices(studio)
    return [gr.Dropdown(choices, value=now.pivot or None), gr.Dropdown(choices, value=list(now.targets)),
            gr.Dropdown(choices, value=list(now.sources)), verdict(studio, now)]


def _choices(studio: Studio) -> list[tuple[str, str]]:
    return [(entry.title, entry.key) for entry in studio.entries()]


def verdict(studio: Studio, selection: Selection) -> str:
    """The preflight of a selection as HTML; everything that comes from files is escaped."""
    if not selection.pivot or not selection.targets:
        missing = "a pivot" if not selection.pivot else "at least one target"
        return note("warning", f"Pick {missing} to see whether the models fit together.")
    try:
        report = studio.preflight(selection)
    except FusionError as error:
        return note("bad", str(error))
    return _report(report, selection)


def _report(report: Preflight, selection: Selection) -> str:
    head = {"good": "These models can be merged", "warning": "These models can be merged; read the notes",
            "bad": "These models cannot be merged"}[report.level]
    rows = "".join(_row(facts, report.of(facts.name), key, i) for i, (facts, key) in
                   enumerate(zip(report.models, (selection.pivot, *selection.targets), strict=True)))
    general = "".join(note(found.level, found.text) for found in report.findings if not found.model)
    cost = (("Reads", bytes_text(report.bytes_read)), ("Writes", bytes_text(report.bytes_written)),
            ("Memory", bytes_text(report.peak_memory_bytes)), ("Free disk", bytes_text(report.free_disk_bytes)),
            ("Tensors", f"{report.tensors:,}"))
    facts = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in cost)
    return (f"<section class='fs-card'><h2 class='fs-verdict fs-{report.level}'><span class='fs-light'></span>{head}</h2>"
            f"<ul class='fs-models'>{rows}</ul>{general}<dl class='fs-cost'>{facts}</dl></section>")


def _row(facts: Facts, findings: list[Finding], key: str, i: int) -> str:
    level = max((found.level for found in findings), key=("good", "warning", "bad").index, default="good")
    mark = "<span class='fs-mark fs-pivot'>P</span>" if i == 0 else \
        f"<span class='fs-mark' style='background:{COLORS[i - 1]};color:{INKS[i - 1]}'>{LETTERS[i - 1]}</span>"
    tokens = facts.vocabulary if facts.vocabulary is not None else facts.vocab_size
    shape = [escape(facts.architecture), f"{_count(facts.parameters)} parameters", f"{facts.layers} layers", facts.dtype,
             f"{tokens:,} tokens" if tokens else "no vocabulary", "tied head" if facts.tied else "own head",
             "chat template" if facts.chat_template else "no chat template"]
    about = f"<p>{escape(_ABOUT[key])}</p>" if key in _ABOUT else ""
    notes = "".join(f"<p class='fs-finding fs-{found.level}'>{escape(found.text)}</p>"
                    for found in findings if found.level != "good")
    state = "" if i == 0 else f"<span class='fs-state fs-{level}'><span class='fs-light'></span>{_WORDS[level]}</span>"
    chips = "".join(f"<span>{text}</span>" for text in shape)
    return (f"<li>{mark}<div class='fs-model'><h3>{escape(facts.name)}<small>{facts.role}</small>{state}</h3>{about}"
            f"<div class='fs-chips'>{chips}</div>{notes}</div></li>")


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)



def at_a_glance(grid: Grid | None) -> str:
    """Who moved which part of the model, as one stacked bar per kind of tensor; empty while nothing is measured."""
    if grid is None:
        return ""
    sizes = np.array([np.prod(shape, dtype=np.float64) for shape in grid.shapes])
    kinds = np.array([place(name).kind for name in grid.tensors])
    rows = []
    for kind in dict.fromkeys(kinds):
        share = np.average(grid.ratio[kinds == kind], axis=0, weights=np.maximum(sizes[kinds == kind], 1))
        parts = "".join(f"<i style='width:{100 * part:.2f}%;background:{COLORS[j]};color:{INKS[j]}'>{_percent(part, j)}</i>"
                        for j, part in enumerate(share))
        said = ", ".join(f"{LETTERS[j]} {part:.0%}" for j, part in enumerate(share))
        rows.append(f"<div class='fs-share'><b>{kind}</b><span role='img' aria-label='{said}'>{parts}</span></div>")
    return ("<section class='fs-card'><h2 class='fs-title'>Who moved which part</h2><p class='fs-lead'>Share of the targets in the "
            f"change from the pivot: with VARM, their merge weights. Variation shows every matrix.</p>{''.join(rows)}</section>")


def weights_at_a_glance(grid: Grid | None, kind: str) -> str:
    """The effective weights per kind of tensor before merging: bars for shares, numbers for factors; empty when unknown."""
    if grid is None or not kind or not np.isfinite(grid.weight).any():
        return ""
    sizes = np.array([np.prod(shape, dtype=np.float64) for shape in grid.shapes])
    kinds = np.array([place(name).kind for name in grid.tensors])
    rows = []
    for its in dict.fromkeys(kinds):
        weights = np.average(grid.weight[kinds == its], axis=0, weights=np.maximum(sizes[kinds == its], 1))
        total = np.abs(weights).sum() or 1.0
        parts = "".join(f"<i style='width:{100 * abs(weight) / total:.2f}%;background:{COLORS[j]};color:{INKS[j]}'>"
                        f"{LETTERS[j]} {f'{weight:.0%}' if kind == 'shares' else f'{weight:.3g}'}</i>"
                        for j, weight in enumerate(weights) if weight)
        said = ", ".join(f"{LETTERS[j]} {weight:.3g}" for j, weight in enumerate(weights))
        bar = parts or "<i style='width:100%;background:var(--neutral-500)'>the pivot's</i>"
        rows.append(f"<div class='fs-share'><b>{its}</b><span role='img' aria-label='{said}'>{bar}</span></div>")
    lead = "What this recipe merges with, per kind of tensor. Variation shows every matrix."
    head = f"<h2 class='fs-title'>Effective weights</h2><p class='fs-lead'>{lead}</p>"
    return f"<section class='fs-card'>{head}{''.join(rows)}</section>"


def _percent(part: float, j: int) -> str:
    return f"{LETTERS[j]} {part:.0%}" if part >= 0.16 else ""

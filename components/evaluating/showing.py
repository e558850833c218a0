"""An evaluation as HTML: the table, and every answer beside its prompt. All text in it is foreign and is escaped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

from components.state import COLORS, INKS, LETTERS
from components.status import note
from fusion.evaluate import Cell, Evaluation, Row, Table, radar

MAX_PROMPTS = 400  # that are listed; the JSON file has them all
MAX_TEXT = 2000  # characters of one answer
_COUNTED = {"perplexity": "pieces read"}
_ENDS = {"length": "cut off by its length", "unread": "the prompt is too long for it"}


@dataclass(frozen=True)
class Said:
    """What one model made of a prompt: `level` good, bad or "" with its mark, the text, and a small remark."""

    model: int
    level: str
    mark: str
    text: str
    remark: str = ""


def color(number: int) -> str:
    """The colour of the model in this row."""
    return COLORS[number % len(COLORS)]


def summary(done: Evaluation) -> str:
    """One sentence about how it went, with a warning where answers were cut off."""
    rows = done.table.rows
    cut, total = sum(row.truncated or 0 for row in rows), sum(row.answers for row in rows)
    who = f"{len(rows)} {'pair' if done.kind == 'pairs' else 'model'}{'s' * (len(rows) > 1)}"
    said = [note("good", f"{done.table.title}: {who}" + (f", {total:,} {_COUNTED.get(done.kind, 'answers')}." if total else "."))]
    if cut:
        todo = " A longer Longest answer lets them end." if done.kind == "domains" else ""
        said.append(note("warning", f"{cut:,} of {total:,} {_COUNTED.get(done.kind, 'answers')} were cut off by their length and "
                                    f"count as they stand.{todo}"))
    return f"<div class='fs-flags'>{''.join(said)}</div>"


# ── table ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def table_html(table: Table) -> str:
    """The table: models in rows, the best of a column in bold, intervals below the values, the change from the reference."""
    compared, tested = (any(getattr(row, field) is not None for row in table.rows) for field in ("versus", "p"))
    missing = any(row.missing for row in table.rows)
    head = [("Model", ""), *((name, "ev-sum" * (name == table.summary)) for name in table.columns)]
    head += [(f"vs {table.baseline}", "")] * compared + [("p", "")] * tested + [("cut off", "")] + [("missing", "")] * missing
    titles = "".join(f"<th scope='col' class='{kind}'>{escape(name)}</th>" for name, kind in head)
    best = {name: table.best(name) for name in table.columns}
    rows = "".join(_row(table, number, row, best, compared, tested, missing) for number, row in enumerate(table.rows))
    unit = f" <small>{escape(table.unit)}</small>" if table.unit else ""
    title = escape(table.title, quote=True)
    return (f"<section class='fs-card ev-card'><h3 class='fs-title'>{title}{unit}</h3>"
            f"<div class='fs-table fs-numbers ev-table' tabindex='0' role='region' aria-label='{title}'>"
            f"<table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table></div></section>")


def notes_html(table: Table) -> str:
    """How the table is to be read: where intervals and p come from."""
    notes = "".join(f"<li>{escape(text)}</li>" for text in table.notes)
    return f"<section class='fs-card ev-notes'><h3>How to read it</h3><ul>{notes}</ul></section>"


def _row(table: Table, number: int, row: Row, best: dict, compared: bool, tested: bool, missing: bool) -> str:
    cells = [_cell(table, name, cell, row.model in best[name]) for name, cell in zip(table.columns, row.cells, strict=True)]
    is_reference = row.model == table.baseline
    if compared:
        cells.append("<td class='ev-quiet'>reference</td>" if is_reference else _change(row.versus))
    if tested:
        cells.append(f"<td>{_p(row.p)}</td>")
    cut = "–" if row.truncated is None else f"{row.truncated}/{row.answers}"
    cells.append(f"<td class='{'ev-cut' if row.truncated else 'ev-quiet'}'>{'⚠ ' if row.truncated else ''}{cut}</td>")
    cells += [f"<td>{row.missing}</td>"] if missing else []
    return f"<tr><th scope='row'>{_letter(number)}<span>{escape(row.model)}</span></th>{''.join(cells)}</tr>"


def _cell(table: Table, column: str, cell: Cell, best: bool) -> str:
    if math.isnan(cell.value):
        return "<td class='ev-quiet'>–</td>"
    value = f"{cell.value:.{table.digits}f}"
    shown = f"<b title='the best of this column'>{value}</b>" if best else f"<span>{value}</span>"
    interval = "" if math.isnan(cell.low) else f"<small>[{cell.low:.{table.digits}f}, {cell.high:.{table.digits}f}]</small>"
    summed = column == table.summary
    return f"<td class='{'ev-sum' if summed else ''}'>{shown}{interval}{_whisker(table, cell) if summed else ''}</td>"


def _whisker(table: Table, cell: Cell) -> str:
    """The summary's value and interval as a line from nothing to the best there is."""
    low, high = radar(table)["range"]
    if math.isnan(cell.low) or high <= low:
        return ""
    left, right, at = (100 * min(1.0, max(0.0, (value - low) / (high - low))) for value in (cell.low, cell.high, cell.value))
    return (f"<span class='ev-range' aria-hidden='true'><i style='left:{left:.1f}%;width:{right - left:.1f}%'></i>"
            f"<u style='left:{at:.1f}%'></u></span>")


def _change(cell: Cell | None) -> str:
    if cell is None or math.isnan(cell.value):
        return "<td class='ev-quiet'>–</td>"
    interval = "" if math.isnan(cell.low) else f"<small>[{cell.low:+.1f}, {cell.high:+.1f}]</small>"
    return f"<td><span>{cell.value:+.1f} %</span>{interval}</td>"


def _p(p: float | None) -> str:
    return "" if p is None else "&lt;0.001" if p < 0.001 else f"{p:.3f}"


def _letter(number: int) -> str:
    at = number % len(COLORS)
    return f"<i class='ev-letter' style='background:{COLORS[at]};color:{INKS[at]}'>{LETTERS[number]}</i>"


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def answers_html(done: Evaluation) -> str:
    """Every prompt with every model's answer and what it was worth, by domain."""
    models = [row.model for row in done.table.rows] if done.kind != "pairs" else list(done.settings["models"])
    read = {"domains": _right_or_wrong, "perplexity": _read, "grades": _judged, "pairs": _judged}.get(done.kind)
    groups = read(done, {name: number for number, name in enumerate(models)}) if read else {}
    if not groups:
        return "<p class='fs-hint'>This evaluation keeps no answers.</p>"
    parts, left, total = [], MAX_PROMPTS, sum(map(len, groups.values()))
    for name, prompts in groups.items():
        if left > 0:
            parts.append(_group(name, dict(list(prompts.items())[:left]), models))
        left -= len(prompts)
    legend = "".join(f"<span>{_letter(i)}{escape(name)}</span>" for i, name in enumerate(models))
    more = "" if total <= MAX_PROMPTS else (
        f"<p class='fs-hint'>{MAX_PROMPTS} of {total:,} prompts are shown; the JSON file has all.</p>")
    only = ("<label class='ev-only'><input type='checkbox' class='ev-differ'> Only where the models differ</label>"
            if len(models) > 1 and done.kind == "domains" else "")
    return f"<div class='ev-answers'><div class='fs-legend ev-legend'>{legend}{only}</div>{''.join(parts)}{more}</div>"


def _group(name: str, prompts: dict[str, list[Said]], models: list[str]) -> str:
    right = [sum(said.level == "good" for its in prompts.values() for said in its if said.model == i) for i in range(len(models))]
    known = any(said.level for its in prompts.values() for said in its)
    counts = " ".join(f"<span>{LETTERS[i]} {count}/{len(prompts)}</span>" for i, count in enumerate(right)) if known else ""
    return (f"<details><summary><b>{escape(name)}</b>{counts}</summary>"
            f"<ol class='fs-answers'>{''.join(_prompt(prompt, its) for prompt, its in prompts.items())}</ol></details>")


def _prompt(prompt: str, its: list[Said]) -> str:
    agree = len({said.level for said in its}) < 2
    return f"<li class='{'ev-same' if agree else ''}'><p><b>{escape(_short(prompt))}</b></p>{''.join(map(_said, its))}</li>"


def _said(said: Said) -> str:
    mark = f"<em class='fs-{said.level}'>{escape(said.mark)}</em>" if said.level else f"<em>{escape(said.mark)}</em>"
    text = escape(_short(said.text)) or "<i>empty</i>"
    remark = f"<small>{escape(_short(said.remark))}</small>" if said.remark else ""
    return f"<div class='ev-said'>{_letter(said.model)}{mark}<span>{text}{remark}</span></div>"


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"


def _right_or_wrong(done: Evaluation, models: dict[str, int]) -> dict[str, dict[str, list[Said]]]:
    groups: dict[str, dict[str, list[Said]]] = {}
    for its in done.records:
        level, mark = ("good", "✓ right") if its["right"] else ("bad", "✗ wrong")
        said = Said(models[its["model"]], level, mark, its["reply"], _ENDS.get(its["finish"], ""))
        groups.setdefault(its["domain"], {}).setdefault(its["prompt"], []).append(said)
    return groups


def _read(done: Evaluation, models: dict[str, int]) -> dict[str, dict[str, list[Said]]]:
    pieces: dict[str, list[Said]] = {}
    for its in done.records:
        known = its.get("characters")
        mark = f"{its['nats'] / its['characters']:.3f}" if known else "–"
        text = f"{its['nats']:,.1f} nats over {its['tokens']:,} tokens, {known:,} characters" if known else its["unread"]
        remark = "cut off by its context" if its.get("truncated") else ""
        pieces.setdefault(its["origin"], []).append(Said(models[its["model"]], "", mark, text, remark))
    return {"nats per character, piece by piece": pieces}


def _judged(done: Evaluation, models: dict[str, int]) -> dict[str, dict[str, list[Said]]]:
    """Answers with their grades; verdicts about pairs stand below the answers."""
    grades = {(its["model"], its["question_id"], its["turn"]): its for its in done.records if "verdict" in its and "model" in its}
    questions: dict[str, list[Said]] = {}
    for its in done.records:
        where = f"question {its['question_id']}, turn {its['turn']}"
        if "text" in its:
            grade = grades.get((its["model"], its["question_id"], its["turn"]), {})
            mark = "" if not grade else "no grade" if grade["verdict"] is None else f"{grade['verdict']:g} of 10"
            remark = " · ".join(filter(None, (_ENDS.get(its["finish"], ""), f"Judge: {grade['reply']}" if grade else "")))
            questions.setdefault(where, []).append(Said(models[its["model"]], "", mark, its["text"], remark))
        elif "first" in its:
            winner = {"A": its["first"], "B": its["second"], "tie": "neither"}.get(its["verdict"], "no verdict")
            said = Said(models[its["first"]], "", f"better: {winner}", f"shown before {its['second']}", f"Judge: {its['reply']}")
            questions.setdefault(where, []).append(said)
    return {"questions": questions}

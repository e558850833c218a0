"""The loss curves of a run as small drawings in the page's own colours, one for each target; cheap to redraw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from components.state import COLORS

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 170, 40, 10, 12, 22
_LINES = (("loss", "loss", "", 2.2), ("clm", "language model", "6 4", 1.4), ("fusion", "fusion", "2 3", 1.4))
_MAX_POINTS = 240


def drawn(curves: Mapping[str, Sequence[Mapping[str, float]]], lm_weight: float) -> str:
    """Loss, language-model part and fusion part by step for every target that has begun; "" when none has."""
    begun = {name: points for name, points in curves.items() if points}
    if not begun:
        return ""
    cards = "".join(_panel(name, points, COLORS[list(curves).index(name) % len(COLORS)]) for name, points in begun.items())
    keys = "".join(f"<span><svg width='26' height='8' aria-hidden='true'><line x1='0' x2='26' y1='4' y2='4' stroke='currentColor' "
                   f"stroke-width='{width}' stroke-dasharray='{dash}'/></svg>{label}</span>" for _, label, dash, width in _LINES)
    formula = f"loss = {lm_weight:g} · language model + {1 - lm_weight:.2g} · fusion, nats a token"
    return (f"<section class='fs-card'><h2 class='fs-title'>Loss</h2><p class='fs-lead'>{formula}</p>"
            f"<div class='fs-losses'>{cards}</div><div class='fs-legend fs-keys'>{keys}</div></section>")


def _panel(name: str, points: Sequence[Mapping[str, float]], color: str) -> str:
    points = [its for its in points if all(math.isfinite(its[key]) for key, *_ in _LINES)]
    if not points:
        return ""
    shown = points[::max(1, math.ceil(len(points) / _MAX_POINTS))]
    if shown[-1] is not points[-1]:
        shown = [*shown, points[-1]]
    low, high = _range([its[key] for its in shown for key, *_ in _LINES])
    first, last = points[0]["step"], max(points[-1]["step"], points[0]["step"] + 1)

    def at(step: float, value: float) -> tuple[float, float]:
        return (_LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT),
                _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM))

    lines = "".join(_line([at(its["step"], its[key]) for its in shown], color, dash, width) for key, _, dash, width in _LINES)
    said = f"loss {points[0]['loss']:.2f} at step {first}, {points[-1]['loss']:.2f} at step {points[-1]['step']}"
    return (f"<figure><figcaption><i style='background:{color}'></i><b>{escape(name)}</b><small>{points[0]['loss']:.2f} → "
            f"{points[-1]['loss']:.2f}</small></figcaption><svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' "
            f"aria-label='{escape(name)}: {said}'>{_axes(low, high, first, last)}{lines}</svg></figure>")


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.05 or 0.1
    return low - room, high + room


def _line(places: list[tuple[float, float]], color: str, dash: str, width: float) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    end = f"<circle cx='{places[-1][0]:.1f}' cy='{places[-1][1]:.1f}' r='2.6' fill='{color}'/>" if not dash else ""
    return (f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='{width}' stroke-dasharray='{dash}' "
            f"stroke-linejoin='round'/>{end}")


def _axes(low: float, high: float, first: int, last: int) -> str:
    bottom, marks = _HEIGHT - _BOTTOM, []
    for part in (0.0, 0.5, 1.0):
        value, y = low + (high - low) * (1 - part), _TOP + part * (bottom - _TOP)
        marks.append(f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}' class='fs-grid'/>"
                     f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{value:.2g}</text>")
    return (f"{''.join(marks)}<text x='{_LEFT}' y='{_HEIGHT - 6}'>step {first}</text>"
            f"<text x='{_WIDTH - _RIGHT}' y='{_HEIGHT - 6}' text-anchor='end'>{last}</text>")

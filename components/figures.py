"""Summary charts of a Grid in Plotly: the variation ratio by depth, and each target's share of every module.

Figures are drawn for light and dark at once: no background, mid-grey ink, the page's own target colours. Only attributes
that the page's plotly.js 3.3 knows are used, which is older than the Python package.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from components.heatmap import Grid
from components.state import COLORS, INKS, LETTERS
from fusion.anatomy import place

INK = "#7c8698"  # the one grey that keeps 3:1 on white and on slate 900; CSS below makes it exact where the page allows
LINE = "rgba(128, 138, 155, 0.28)"
# Plotly cannot read CSS variables; the page adds this so that axes and legends follow its theme.
_TEXTS = (".xtick text", ".ytick text", ".angularaxistick text", ".legendtext", ".legend2text", ".xtitle", ".ytitle",
          ".annotation-text")
CSS = f"{', '.join(f'.js-plotly-plot {text}' for text in _TEXTS)} {{ fill: var(--body-text-color) !important; }}"

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
_KIND_ORDER = ("attention", "mlp", "norm", "embedding", "head", "other")


def ratio_by_depth(grid: Grid) -> go.Figure:
    """Draw the variation ratio by layer: one line per target (colour) and kind of module (dash and symbol)."""
    units: dict[str, dict[int, list[int]]] = {}
    stacks = {place(name).stack for name in grid.tensors if place(name).layer is not None}
    for index, name in enumerate(grid.tensors):
        where = place(name)
        if where.layer is not None:
            kind = where.kind if len(stacks) == 1 else f"{where.kind} · {where.stack}"
            units.setdefault(kind, {}).setdefault(where.layer, []).append(index)
    if not units:
        return _sentence("This model has no numbered layers, so there is no depth to draw.")
    figure = go.Figure()
    kinds = sorted(units, key=_kind_rank)
    for j in range(len(grid.targets)):
        for k, kind in enumerate(kinds):
            figure.add_trace(_depth_line(grid, j, k, kind, units[kind]))
    for k, kind in enumerate(kinds):
        figure.add_trace(_kind_key(k, kind))
    _style(figure, height=430)
    figure.update_layout(legend2={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0,
                                  "itemclick": False, "itemdoubleclick": False, "font": {"size": 12}})
    figure.update_xaxes(title_text="layer", tickformat="d", showgrid=False, **_tick_step(units))
    figure.update_yaxes(title_text="variation ratio", rangemode="tozero")
    return figure


def _depth_line(grid: Grid, j: int, k: int, kind: str, layers: dict[int, list[int]]) -> go.Scatter:
    xs = sorted(layers)
    ys = [pooled(grid, layers[x], j) for x in xs]
    name, letter = grid.targets[j], LETTERS[j % len(LETTERS)]
    color = COLORS[j % len(COLORS)]
    # Only a target's first line stands in the legend, and a click there hides all of its lines.
    return go.Scatter(
        x=xs, y=ys, mode="lines+markers" if len(xs) <= 24 else "lines", name=f"{letter} · {plain(name, 36)}",
        legendgroup=letter, showlegend=k == 0, connectgaps=False, **_stroke(k, color),
        hovertemplate=f"{letter} · {plain(name)}<br>layer %{{x}}, {plain(kind)}<br>ratio %{{y:.5~g}}<extra></extra>")


def _kind_key(k: int, kind: str) -> go.Scatter:
    """An empty line that explains dash and symbol in a legend of its own."""
    return go.Scatter(x=[None], y=[None], mode="lines+markers", name=plain(kind, 36), legend="legend2", hoverinfo="skip",
                      **_stroke(k, INK))


def _stroke(k: int, color: str) -> dict:
    return {"line": {"color": color, "width": 2, "dash": _DASHES[k % len(_DASHES)]},
            "marker": {"color": color, "size": 7, "symbol": _SYMBOLS[k % len(_SYMBOLS)]}}


def _tick_step(units: dict[str, dict[int, list[int]]]) -> dict:
    layers = {layer for by_layer in units.values() for layer in by_layer}
    return {"dtick": 1} if max(layers) - min(layers) < 20 else {}


def share_per_module(grid: Grid) -> go.Figure:
    """Draw how the targets share the change of every module, one stacked bar each, first module on top."""
    units: dict[str, list[int]] = {}
    for index, name in enumerate(grid.tensors):
        units.setdefault(_module(name), []).append(index)
    if not units:
        return _sentence("There is nothing measured yet.")
    modules = list(units)
    figure = go.Figure()
    for j, name in enumerate(grid.targets):
        letter, shares = LETTERS[j % len(LETTERS)], [pooled(grid, units[module], j) for module in modules]
        figure.add_trace(go.Bar(
            x=shares, y=list(range(len(modules))), orientation="h", name=f"{letter} · {plain(name, 36)}",
            marker={"color": COLORS[j % len(COLORS)], "line": {"width": 0}},
            text=["" if share is None else f"{letter} {share:.0%}" for share in shares], textposition="inside",
            insidetextanchor="middle", textangle=0,
            insidetextfont={"color": INKS[j % len(INKS)]},
            customdata=[[plain(module), _count(grid, units[module])] for module in modules],
            hovertemplate=f"{letter} · {plain(name)}<br>%{{customdata[0]}}: share %{{x:.5~g}}<br>%{{customdata[1]}}"
                          "<extra></extra>"))
    _style(figure, height=110 + 34 * len(modules))
    figure.update_layout(barmode="stack", bargap=0.28, uniformtext={"minsize": 10, "mode": "hide"},
                         legend_traceorder="normal")
    figure.update_xaxes(title_text="share of the variation", tickformat=".0%", range=[0, 1], dtick=0.25)
    # Positions, not names, so that two modules whose shortened names agree keep a bar each.
    figure.update_yaxes(autorange="reversed", showgrid=False, ticksuffix="  ", tickvals=list(range(len(modules))),
                        ticktext=[plain(module, 24) for module in modules])
    return figure


def _module(name: str) -> str:
    """The module a tensor is counted in: norms that stand alone together, parts outside the layers by their own name."""
    where = place(name)
    alone = where.matrix.removesuffix(".bias") == where.module
    if where.layer is not None and alone:
        return "norms" if where.kind == "norm" else where.kind
    return where.module


def _count(grid: Grid, indices: list[int]) -> str:
    parameters = int(grid.sizes()[indices].sum())
    return f"{parameters:,} parameters in {len(indices)} {'matrix' if len(indices) == 1 else 'matrices'}"


def pooled(grid: Grid, indices: list[int], target: int) -> float | None:
    """Mean ratio per parameter of these tensors for one target; None where none of them is there."""
    ratio, sizes = grid.ratio[indices, target], grid.sizes()[indices]
    there = np.isfinite(ratio) & (sizes > 0)
    return float(np.average(ratio[there], weights=sizes[there])) if there.any() else None


def plain(text: str, limit: int = 60) -> str:
    """Make a name safe for Plotly, which reads tags and %{…} in every text, and cut it to `limit` characters."""
    text = text if len(text) <= limit else text[:limit - 1] + "…"
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "% {")


def _kind_rank(kind: str) -> tuple[int, str]:
    return _KIND_ORDER.index(kind.split(" · ")[0]), kind


def _style(figure: go.Figure, height: int) -> None:
    """Dress a figure for light and dark."""
    figure.update_layout(
        template="none", height=height, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 12, "r": 28, "t": 16, "b": 12}, hovermode="closest",
        font={"color": INK, "size": 13, "family": "IBM Plex Sans, ui-sans-serif, system-ui, sans-serif"},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "font": {"size": 12},
                "groupclick": "togglegroup"})
    axis = {"gridcolor": LINE, "linecolor": LINE, "zeroline": False, "automargin": True,
            "title": {"standoff": 10, "font": {"size": 13}}}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)


def _sentence(text: str) -> go.Figure:
    figure = go.Figure()
    _style(figure, height=200)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.add_annotation(text=text, showarrow=False, xref="paper", yref="paper", x=0.5, y=0.5, font={"size": 14})
    return figure

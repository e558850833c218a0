"""The radar chart of an evaluation, drawn for light and dark at once; the colours are those of the table's letters."""

from __future__ import annotations

import plotly.graph_objects as go

from components import figures
from components.evaluating.showing import color
from components.state import LETTERS
from fusion.evaluate import Table, figure, radar

_DASHES, _SYMBOLS = ("solid", "dash"), ("circle", "square", "diamond", "triangle-up")


def chart(table: Table) -> go.Figure | None:
    """The radar chart of a table's domains; None when there are fewer than three."""
    data = radar(table)
    if not data["axes"]:
        return None
    data["axes"] = [figures.plain(name, 24) for name in data["axes"]]
    data["series"] = [{**its, "model": f"{LETTERS[i]} · {figures.plain(its['model'], 36)}"} for i, its in enumerate(data["series"])]
    drawn = figure(data)
    for number, trace in enumerate(drawn.data):
        under = max(0, len(drawn.data) - number - 1) % 4  # lines that lie on one another: the lower are wider
        trace.update(line={"color": color(number), "width": 2 + under, "dash": _DASHES[number // 4 % 2]},
                     marker={"color": color(number), "size": 6 + under, "symbol": _SYMBOLS[number % 4]}, cliponaxis=False)
    between = 90 - 180 / len(data["axes"])  # numbers stand between the first two axes, where no line is
    axis = {"gridcolor": figures.LINE, "linecolor": figures.LINE, "tickfont": {"size": 12}}
    drawn.update_polars(bgcolor="rgba(0,0,0,0)", angularaxis=axis, radialaxis={
        **axis, "tickfont": {"size": 11}, "nticks": 5, "angle": between, "tickangle": between})
    drawn.update_layout(
        template="none", title=None, height=430, plot_bgcolor="rgba(0,0,0,0)", margin={"l": 70, "r": 70, "t": 34, "b": 20},
        font={"color": figures.INK, "size": 13, "family": "IBM Plex Sans, ui-sans-serif, system-ui, sans-serif"},
        legend={"orientation": "h", "yanchor": "top", "y": -0.08, "x": 0.5, "xanchor": "center", "font": {"size": 12}})
    return drawn

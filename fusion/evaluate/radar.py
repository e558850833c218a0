"""The radar chart of a table: plain data first, a plotly figure from it when somebody wants to look."""

from __future__ import annotations

import math
from typing import Any

from fusion.errors import FusionError
from fusion.evaluate.scores import AVERAGE
from fusion.evaluate.tables import Table

_COLORS = ("#2563eb", "#d97706", "#059669", "#c026d3", "#dc2626", "#0891b2", "#65a30d", "#7c3aed")
_FULL = {"%": 100.0, "1 to 10": 10.0}


def radar(table: Table) -> dict:
    """Axes (the domains), and for each model its values on them; empty axes when there are fewer than three.

    {"title", "unit", "axes": [name], "range": [low, high], "series": [{"model", "values", "low", "high"}]}, None where there
    is no value.
    """
    axes = [name for name in table.columns if name != AVERAGE and not name.startswith("turn ")]
    axes = axes if len(axes) >= 3 else []
    places = [table.columns.index(name) for name in axes]
    series = [{"model": row.model, **{key: [row.cells[i].to_dict()[field] for i in places]
                                      for key, field in (("values", "value"), ("low", "low"), ("high", "high"))}}
              for row in table.rows]
    known = [value for its in series for value in its["values"] if value is not None]
    top = _FULL.get(table.unit) or math.ceil(max(known, default=1.0))
    return {"title": table.title, "unit": table.unit, "axes": axes, "range": [0.0, float(top)], "series": series}


def figure(data: dict) -> Any:
    """The plotly figure of `radar`'s data; FusionError when plotly is not installed."""
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise FusionError("drawing a radar chart needs plotly", todo="Run pip install plotly.") from error
    drawn = go.Figure()
    for number, its in enumerate(data["series"]):
        color = _COLORS[number % len(_COLORS)]
        values, axes = its["values"], data["axes"]  # the first again at the end closes the line
        drawn.add_trace(go.Scatterpolar(
            r=[*values, *values[:1]], theta=[*axes, *axes[:1]], name=its["model"], mode="lines+markers", marker={"size": 5},
            line={"color": color, "width": 2}, hovertemplate="%{theta}: %{r:.2f}<extra>%{fullData.name}</extra>"))
    radial = {"range": data["range"], "ticksuffix": "%" if data["unit"] == "%" else "", "angle": 90, "tickangle": 90}
    angular = {"rotation": 90, "direction": "clockwise"}  # the first domain stands at the top
    drawn.update_layout(title=data["title"], polar={"radialaxis": radial, "angularaxis": angular}, paper_bgcolor="rgba(0,0,0,0)",
                        legend={"orientation": "h"}, margin={"t": 60, "b": 40})
    return drawn

"""Merge methods: pure functions on blocks of numbers. They know no file, name or page.

`METHODS` is the one table that recipe, CLI and page read.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusion.methods.weighted import elementwise, weighted

__all__ = ["METHODS", "Method", "elementwise", "weighted"]


@dataclass(frozen=True)
class Method:
    """What people read of a method: its title, formula and source; `measured` says that variation gives its weights."""

    name: str
    title: str
    formula: str
    summary: str
    source: str
    measured: bool


METHODS = {
    method.name: method
    for method in (
        Method("varm", "VARM", "θₘ = θ₀ₘ + Σⱼ Wⱼₘ·Δⱼₘ    Wⱼₘ = E[Δⱼₘ²] / Σᵢ E[Δᵢₘ²]",
               "Every unit is weighted by how far its target moved from the pivot: what was learnt most counts most.",
               "FuseChat, arXiv 2402.16107, eq. 7", True),
        Method("linear", "Linear", "θ = θ₀ + Σⱼ wⱼ·Δⱼ    Σⱼ wⱼ = 1",
               "A weighted average of the targets with the same weights everywhere.",
               "Model soups, arXiv 2203.05482", False),
    )
}

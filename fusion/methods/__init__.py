"""Merge methods: pure functions on blocks of numbers. They know no file, name or page.

`METHODS` is the one table that recipe, CLI and page read; `apply` runs a method on arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusion.methods.average import linear, passthrough, varm
from fusion.methods.method import Method, Option
from fusion.methods.presets import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    task_arithmetic,
    ties,
)
from fusion.methods.sce import sce
from fusion.methods.spherical import karcher, multislerp, nuslerp, slerp
from fusion.methods.stack import BLOCK, Arrays, Block, Stack
from fusion.methods.stock import model_stock
from fusion.methods.swap import arcee_fusion, nearswap
from fusion.methods.weighted import elementwise, weighted

__all__ = ["BLOCK", "METHODS", "Arrays", "Block", "Method", "Option", "Stack", "apply", "elementwise", "weighted"]

METHODS = {
    method.name: method
    for method in (
        Method("varm", "VARM", "θₘ = θ₀ₘ + Σⱼ Wⱼₘ·Δⱼₘ    Wⱼₘ = E[Δⱼₘ²] / Σᵢ E[Δᵢₘ²]",
               "Every unit is weighted by how far its target moved from the pivot: what was learnt most counts most.",
               "FuseChat, arXiv 2402.16107, eq. 7", varm, "shares", measured=True, from_pivot=False),
        Method("linear", "Linear", "θ = θ₀ + Σⱼ wⱼ·Δⱼ    Σⱼ wⱼ = 1",
               "A weighted average of the targets with the same weights everywhere.",
               "Model soups, arXiv 2203.05482", linear, "shares", from_pivot=False),
        Method("slerp", "SLERP", "θ = sin((1−t)Ω)/sin Ω·a + sin(tΩ)/sin Ω·b    Ω = angle(a, b)",
               "From the pivot to the target, or from one target to another, along an arc instead of a straight line.",
               "Shoemake 1985, Animating rotation with quaternion curves", slerp, max_targets=2),
        Method("nuslerp", "NuSLERP", "θ = slerp(t; θ₁, θ₂) or θ₀ + slerp(t; Δ₁, Δ₂)    t = w₂/(w₁ + w₂)",
               "SLERP between two targets by their weights: of whole tensors or of single vectors, of weights or of changes.",
               "mergekit, nuslerp", nuslerp, "shares", min_targets=2, max_targets=2),
        Method("multislerp", "Multi-SLERP", "θ = Σⱼ wⱼ‖θⱼ‖ · m/‖m‖    m = Σⱼ wⱼ·θⱼ/‖θⱼ‖",
               "The mean direction of any number of targets at their mean length.",
               "C. Goddard 2025, goddard.blog/posts/multislerp-wow-what-a-cool-idea", multislerp, "shares"),
        Method("karcher", "Karcher mean", "θ = Σⱼ wⱼ‖θⱼ‖ · argminₓ Σⱼ wⱼ·angle(x, θⱼ)²    ‖x‖ = 1",
               "The point on the sphere that is nearest to all targets, at their mean length.",
               "arXiv 2603.04972", karcher, "shares", from_pivot=False),
        Method("task_arithmetic", "Task arithmetic", "θ = θ₀ + λ·Σⱼ wⱼ·Δⱼ",
               "Add the targets' changes to the pivot, each with a factor.",
               "Task arithmetic, arXiv 2212.04089", task_arithmetic, "factors", stages=("weigh", "normalise", "scale by λ")),
        Method("ties", "TIES", "θ = θ₀ + λ·Σⱼ∈A wⱼ·topₖ(Δⱼ) / Σⱼ∈A wⱼ    A = those of the elected sign",
               "Keep each target's largest changes, elect a sign for every number, average the changes that agree.",
               "TIES-Merging, arXiv 2306.01708", ties, "factors",
               stages=("keep the largest", "rescale", "weigh", "elect sign", "normalise", "scale by λ")),
        Method("dare_linear", "DARE", "θ = θ₀ + λ·Σⱼ wⱼ·cⱼ·(mⱼ ⊙ Δⱼ)    mⱼ ~ Bernoulli(density), cⱼ = ‖Δⱼ‖₁/‖mⱼ ⊙ Δⱼ‖₁",
               "Drop most changes at random, make up for them by rescaling, add.",
               "DARE, arXiv 2311.03099", dare_linear, "factors", random=True,
               stages=("drop at random", "rescale", "weigh", "normalise", "scale by λ")),
        Method("dare_ties", "DARE-TIES", "θ = θ₀ + λ·Σⱼ∈A wⱼ·cⱼ·(mⱼ ⊙ Δⱼ)    A = those of the elected sign",
               "Drop changes at random, rescale, then add only those of the elected sign.",
               "DARE, arXiv 2311.03099, and TIES-Merging, arXiv 2306.01708", dare_ties, "factors", random=True,
               stages=("drop at random", "rescale", "weigh", "elect sign", "normalise", "scale by λ")),
        Method("della_linear", "DELLA linear", "θ = θ₀ + λ·Σⱼ wⱼ·cⱼ·(mⱼ ⊙ Δⱼ)    mⱼ ~ Bernoulli(density ± ε by rank in the row)",
               "Drop changes at random, small ones of a row more often than large ones, rescale, add.",
               "DELLA-Merging, arXiv 2406.11617", della_linear, "factors", random=True,
               stages=("drop by rank", "rescale", "weigh", "normalise", "scale by λ")),
        Method("della", "DELLA", "θ = θ₀ + λ·Σⱼ∈A wⱼ·cⱼ·(mⱼ ⊙ Δⱼ) / Σⱼ∈A wⱼ    mⱼ ~ Bernoulli(density ± ε by rank in the row)",
               "Drop small changes more often than large ones, then average those of the elected sign.",
               "DELLA-Merging, arXiv 2406.11617", della, "factors", random=True,
               stages=("drop by rank", "rescale", "weigh", "elect sign", "normalise", "scale by λ")),
        Method("breadcrumbs", "Model breadcrumbs", "θ = θ₀ + λ·Σⱼ wⱼ·(mⱼ ⊙ Δⱼ)    mⱼ = neither the γ largest nor the small",
               "Drop each target's very largest and its small changes, add the rest.",
               "Model Breadcrumbs, arXiv 2312.06795", breadcrumbs, "factors",
               stages=("drop outliers", "keep the largest", "rescale", "weigh", "normalise", "scale by λ")),
        Method("breadcrumbs_ties", "Breadcrumbs-TIES", "θ = θ₀ + λ·Σⱼ∈A wⱼ·(mⱼ ⊙ Δⱼ)    A = those of the elected sign",
               "Drop each target's very largest and its small changes, then add only those of the elected sign.",
               "Model Breadcrumbs, arXiv 2312.06795, and TIES-Merging, arXiv 2306.01708", breadcrumbs_ties, "factors",
               stages=("drop outliers", "keep the largest", "rescale", "weigh", "elect sign", "normalise", "scale by λ")),
        Method("sce", "SCE", "θ = θ₀ + Σⱼ ηⱼ·δ′ⱼ    ηⱼ = Σδ̂ⱼ² / ΣᵢΣδ̂ᵢ², δ̂ = the changes that differ most between targets",
               "Select where the targets differ most, calculate weights from the changes there, erase minority signs.",
               "FuseChat 2.0, arXiv 2408.07990", sce,
               stages=("select by variance", "calculate weights", "elect sign", "weigh")),
        Method("model_stock", "Model stock", "θ = t·mean(θⱼ) + (1−t)·θ₀    t = N·cos/(1 + (N−1)·cos)",
               "Between pivot and average, nearer to the average the more the targets' changes agree.",
               "Model Stock, arXiv 2403.19522, eq. 7", model_stock, min_targets=2),
        Method("nearswap", "NearSwap", "θ = θ₀ + clip(Δ, −t, t)",
               "Move every number towards the target's by at most t: near ones are swapped, far ones hardly touched.",
               "QuartetAnemoi-70B-t0.0001, model card", nearswap, max_targets=1),
        Method("arcee_fusion", "Arcee fusion", "θ = θ₀ + m ⊙ Δ    m = |Δ|·KL(row) ≥ median + 1.5·IQR",
               "Take over the changes that matter most, by their size and by how much they change their row's distribution.",
               "mergekit, arcee_fusion", arcee_fusion, max_targets=1),
        Method("passthrough", "Passthrough", "θ = scale·θ₁",
               "A copy of one model's tensors, to stack layers of several models.",
               "mergekit, passthrough", passthrough, max_targets=1, from_pivot=False),
    )
}


def apply(name: str, pivot: np.ndarray, models: np.ndarray | Sequence[np.ndarray], weights: Sequence[float] | None = None,
          keys: Sequence[int] = (), **options: object) -> np.ndarray:
    """Merge whole arrays: `pivot` [...], `models` [J, ...] → float32 [...]; for scripts and tests.

    `weights` [J]: equal shares, or factors of 1, unless given. `keys` [J] seed what is random. KeyError for an unknown name.
    """
    method = METHODS[name]
    tensor = Arrays(pivot, np.asarray(models), tuple(keys))
    given = np.ones(tensor.count) if weights is None else np.asarray(weights, np.float64)
    if weights is None and method.weights == "shares":
        given /= tensor.count
    merged, start = np.empty(tensor.pivot.size, np.float32), 0
    for block in method.run(tensor, given, **options):
        merged[start:start + block.size] = block
        start += block.size
    return merged.reshape(tensor.shape)

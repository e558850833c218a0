"""The training loss: λ · language-model loss + (1 − λ) · fusion loss, with sparse targets; pure functions on torch tensors.

A dense target over the whole vocabulary would take gigabytes. A sparse one gives the same number: H(P, Q) = log Σ exp z −
Σₖ pₖ·z[idₖ] where the pₖ sum to 1. What they lack of 1, the tail, is one further outcome, "any other token": H(P, Q) of this
coarser partition has the term −p_tail·log(1 − Σₖ qₖ), which is exact whatever the tail's tokens are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

KINDS = ("ce", "kl")
_NO_TAIL = 1e-5  # a tail below this is rounding


def sparse_divergence(logits: torch.Tensor, ids: torch.Tensor, chances: torch.Tensor, kind: str = "ce") -> torch.Tensor:
    """Cross-entropy H(P, Q) or KL(P ‖ Q) in nats at every position, [N] float32.

    `logits` [N, V] of the student, `ids` [N, K] (−1 = empty), `chances` [N, K] out of 1: the rest is the chance of all other
    tokens together (a row of zeros gives 0). The gradient of both kinds is the same; they differ by the teacher's entropy.
    Memory: one more copy of the logits where there is a tail. Source: FuseChat, arXiv 2402.16107, eq. 4.
    """
    import torch

    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    logits, chances = logits.float(), chances.float()
    picked = logits.gather(1, ids.clamp_min(0))
    mass = chances.sum(dim=1)
    tail = torch.where((mass > 0) & (1 - mass > _NO_TAIL), 1 - mass, 0)
    others = _others(logits, ids) if bool((tail > 0).any()) else mass
    tail = torch.where(others.isfinite(), tail, 0)  # a target that names every token has no tail
    loss = (mass + tail) * torch.logsumexp(logits, dim=1) - (chances * picked).sum(dim=1) - torch.where(tail > 0, tail * others, 0)
    if kind == "kl":
        loss = loss + torch.special.xlogy(chances, chances).sum(dim=1) + torch.special.xlogy(tail, tail)
    return loss


def _others(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log Σ exp z over the tokens that are not in `ids`, [N]: log(1 − Σ q) without the loss of digits near 1."""
    import torch

    known = torch.where(ids < 0, ids.max(dim=1, keepdim=True).values.clamp_min(0), ids)  # an empty place hides no token
    return torch.logsumexp(logits.scatter(1, known, float("-inf")), dim=1)


def fusion_loss(logits: torch.Tensor, gold: torch.Tensor, ids: torch.Tensor, chances: torch.Tensor, lm_weight: float = 0.9,
                kind: str = "ce", count: int | float | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """λ · L_CLM + (1 − λ) · L_Fusion with its two parts, as means over `count` labels (default: those given).

    `logits` [N, V] at the N positions that predict labels, `gold` [N] the labels, `ids`, `chances` [N, K] the fused targets. A
    position whose target is empty (zeros) is taught by its gold label alone. Give `count` = labels of the whole batch when
    gradients are accumulated. λ = 1 is plain fine-tuning. Source: FuseChat, arXiv 2402.16107, eq. 5.
    """
    import torch

    count = max(len(gold) if count is None else count, 1)
    if not len(gold):
        nothing = logits.sum() * 0
        return nothing, nothing, nothing
    clm = torch.nn.functional.cross_entropy(logits.float(), gold, reduction="none")
    if lm_weight >= 1:
        plain = clm.sum() / count
        return plain, plain, plain.detach() * 0
    fused = torch.where(chances.sum(dim=1) == 0, clm, sparse_divergence(logits, ids, chances, kind))
    clm, fused = clm.sum() / count, fused.sum() / count
    return lm_weight * clm + (1 - lm_weight) * fused, clm, fused

"""The training loss: λ · language-model loss + (1 − λ) · fusion loss, with sparse targets; pure functions on torch tensors.

A dense target over the whole vocabulary would take gigabytes. A sparse one gives the same number: H(P, Q) = log Σ exp z −
Σₖ pₖ·z[idₖ], since the pₖ sum to 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

KINDS = ("ce", "kl")


def sparse_divergence(logits: torch.Tensor, ids: torch.Tensor, chances: torch.Tensor, kind: str = "ce") -> torch.Tensor:
    """Cross-entropy H(P, Q) or KL(P ‖ Q) in nats at every position, [N] float32.

    `logits` [N, V] of the student, `ids` [N, K] (−1 = empty), `chances` [N, K] that sum to 1 (a row of zeros gives 0). The
    gradient of both kinds is the same; they differ by the teacher's entropy. Source: FuseChat, arXiv 2402.16107, eq. 4.
    """
    import torch

    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    logits, chances = logits.float(), chances.float()
    picked = logits.gather(1, ids.clamp_min(0))
    mass = chances.sum(dim=1)
    loss = mass * torch.logsumexp(logits, dim=1) - (chances * picked).sum(dim=1)
    if kind == "kl":
        loss = loss + torch.special.xlogy(chances, chances).sum(dim=1)
    return loss


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

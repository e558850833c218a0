"""Pairwise fusion training: the pivot, lightly fine-tuned towards fused targets; the same function does plain fine-tuning.

    from fusion.train.trainer import train          # loads torch
    result = finish(train("pivot", examples, "target-qwen", Training(lm_weight=0.9)))
"""

from fusion.train.history import history
from fusion.train.settings import PROGRAM_BYTES, Estimate, Training, activation_width, estimate

__all__ = ["PROGRAM_BYTES", "Estimate", "Training", "activation_width", "estimate", "history"]

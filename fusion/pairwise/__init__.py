"""Pairwise knowledge fusion from end to end: any source models, one recipe, targets of the pivot's shape and their merge.

    finish(run(FuseRecipe.load("fuse.yaml"), "fused"))
"""

from fusion.pairwise.recipe import FuseRecipe, Served
from fusion.pairwise.stages import FuseResult, Stage, plan, run

__all__ = ["FuseRecipe", "FuseResult", "Served", "Stage", "plan", "run"]

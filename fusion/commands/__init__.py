"""The commands of `python -m fusion`, one module per group; each has `add(command)`."""

from fusion.commands import demo, evaluating, fusing, inspecting, mergekit, merging, methods, models, recipes

GROUPS = (models, inspecting, methods, merging, recipes, mergekit, fusing, evaluating, demo)

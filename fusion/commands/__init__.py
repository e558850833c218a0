"""The commands of `python -m fusion`, one module per group; each has `add(command)`."""

from fusion.commands import demo, fusing, inspecting, mergekit, merging, methods, models, recipes

GROUPS = (models, inspecting, methods, merging, recipes, mergekit, fusing, demo)

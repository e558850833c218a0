"""methods: what a recipe can ask for, with formulas, steps, options, their ranges and defaults."""

from __future__ import annotations

import argparse

from fusion.commands.console import print_json
from fusion.methods import METHODS, Method, Option

WEIGHTS = {"shares": "weights: one per target, shares that sum to 1 (equal unless given)",
           "factors": "weights: one per target, plain factors (1 unless given)"}


def add(command) -> None:
    """Add these commands with `command(name, run, text)`, which returns the parser."""
    command("methods", _methods, "List the merge methods with their formulas and options.")


def _methods(options: argparse.Namespace) -> None:
    if options.json:
        print_json({name: method.to_dict() for name, method in METHODS.items()})
        return
    print("\n\n".join(_described(method) for method in METHODS.values()))


def _described(method: Method) -> str:
    lines = [method.summary, method.formula]
    if method.stages:
        lines.append("steps: " + " → ".join(method.stages))
    if method.measured:
        lines.append("weights: measured by variation, unless given")
    elif method.weights:
        lines.append(WEIGHTS[method.weights])
    lines += [*map(_option, method.options), method.source]
    return f"{method.name}: {method.title}, {_targets(method)}\n" + "\n".join(f"  {line}" for line in lines)


def _targets(method: Method) -> str:
    low, high = method.min_targets, method.max_targets
    if high is None:
        return f"{low} or more targets"
    return f"{low} or {high} targets" if low < high else "1 target" if low == 1 else f"{low} targets"


def _option(option: Option) -> str:
    default = str(option.default).lower() if option.kind == "flag" else f"{option.default}"
    each = ", one for all or one per target" if option.per_target else ""
    return f"{option.name} = {default}: {option.text} ({option.range}{each})"

"""preflight and variation: what headers say of models, and how far every matrix moved."""

from __future__ import annotations

import argparse

from fusion.commands.console import models, open_models, print_json, show_progress, weighing
from fusion.errors import printable
from fusion.preflight import Preflight, preflight
from fusion.progress import finish
from fusion.recipe import Recipe
from fusion.sources import open_checkpoint, peek
from fusion.tables import bytes_text, table
from fusion.untied import side_by_side
from fusion.variation import measure
from fusion.vocabulary import unify


def add(command) -> None:
    """Add these commands with `command(name, run, text)`, which returns the parser."""
    check = command("preflight", _preflight, "Say from headers alone whether models can be merged, and what it costs.")
    models(check)
    check.add_argument("--out", metavar="DIR", help="also check that this folder can be written")
    check.add_argument("--vocabulary", metavar="V", default="", help="as for merge: pivot, common or union")
    report = command("variation", _variation, "Measure how far every matrix of every target moved from the pivot.")
    models(report)
    weighing(report)


def _preflight(options: argparse.Namespace) -> None:
    pivot, targets = open_models(options, peek)
    if options.vocabulary:
        pivot, targets, _ = unify(*side_by_side(pivot, targets), options.vocabulary)
    report = preflight(pivot, targets, out=options.out)
    if options.json:
        print_json(report.to_dict())
    else:
        print(printable(_preflight_text(report)))
    report.raise_if_bad()


def _preflight_text(report: Preflight) -> str:
    head = ("model", "role", "architecture", "layers", "parameters", "dtype", "on disk", "vocabulary", "head")
    rows = [(m.name, m.role, m.architecture, m.layers, f"{m.parameters:,}", m.dtype, bytes_text(m.nbytes),
             m.vocabulary if m.vocabulary is not None else m.vocab_size, "tied" if m.tied else "own") for m in report.models]
    found = [f"{f.level:8}{f.model}: {f.text}" for f in report.findings]
    cost = (f"reads {bytes_text(report.bytes_read)}, writes {bytes_text(report.bytes_written)}, peak memory about "
            f"{bytes_text(report.peak_memory_bytes)}, free disk {bytes_text(report.free_disk_bytes)}")
    return "\n".join([table(head, rows), "", *found, cost])


def _variation(options: argparse.Namespace) -> None:
    pivot, targets = open_models(options, open_checkpoint)
    granularity, measured_by = options.granularity or "matrix", options.measure or "square"
    _check_names(granularity, measured_by)
    variation = finish(measure(pivot, targets, elements=granularity == "parameter", allow_nonfinite=options.allow_nonfinite),
                       show_progress(options.json))
    if options.json:
        print_json(variation.to_dict(granularity, measured_by))
        return
    means, ratios = variation.means(granularity, measured_by), variation.ratios(granularity, measured_by)
    head = (granularity if granularity != "parameter" else "tensor (mean over elements)",
            *(f"{kind} {name}" for kind in ("variation", "ratio") for name in variation.targets))
    units = variation.units(granularity)
    first = {unit: t for t, unit in reversed(list(enumerate(units)))}
    rows = [(unit, *(f"{value:.3e}" for value in means[t]), *(f"{value:.4f}" for value in ratios[t]))
            for unit, t in sorted(first.items(), key=lambda item: item[1])]
    print(table(head, rows))


def _check_names(granularity: str, measured_by: str) -> None:
    """Refuse unknown names before gigabytes are read."""
    Recipe("pivot", ("target",), granularity=granularity, measure=measured_by).check()

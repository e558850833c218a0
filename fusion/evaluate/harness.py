"""Public benchmarks through EleutherAI's lm-eval, when that package is installed. Its tasks are downloaded by itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from statistics import NormalDist
from typing import Any

from fusion.errors import FusionError, RecipeError
from fusion.evaluate.models import Models, fingerprints, lend
from fusion.evaluate.tables import Cell, Row, Table
from fusion.progress import Meter, Work

_NOTE = ("Brackets: value ± 1.96 standard errors as lm-eval gives them; models are not compared in pairs. Whether answers were "
         "cut off is not known here.")


def installed() -> bool:
    """Whether lm-eval is there."""
    try:
        return find_spec("lm_eval") is not None
    except ValueError:  # somebody put a module without a spec there
        return False


def measure(models: Models, tasks: Sequence[str], limit: int | None = None,
            baseline: str | None = None) -> Work[tuple[Table, dict]]:
    """Run lm-eval's `tasks` on every model, at most `limit` questions per task; yields Progress between models.

    Returns the table and lm-eval's own results by model. FusionError without the package or for what it refuses.
    """
    evaluate, wrap = _package()
    if not tasks:
        raise RecipeError("no lm-eval task was named")
    fingerprints(models)
    meter, found = Meter("lm-eval", len(models), "models"), {}
    for name, ref in models.items():
        yield meter.step(note=name)
        with lend(ref, name) as model:
            try:
                wrapped = wrap(pretrained=model.model, tokenizer=copy.deepcopy(model.tokenizer))  # it changes the tokenizer
                result = evaluate(model=wrapped, tasks=list(tasks), limit=limit, log_samples=False)
            except Exception as error:  # the border to a package of many authors
                raise FusionError(f"lm-eval stops ({type(error).__name__}: {str(error)[:300]})", where=name,
                                  todo="See lm-eval's list of tasks.") from error
        found[name] = {task: dict(values) for task, values in result["results"].items()}
        counts = result.get("n-samples", {})
        found[name] |= {task: {**found[name][task], "answers": counts[task]["effective"]} for task in found[name] if task in counts}
        yield meter.step(1, note=name)
    return _table(found, baseline), found


def _package() -> tuple[Any, Any]:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise FusionError("the package lm-eval is not installed", todo="Run pip install lm-eval.") from error
    return simple_evaluate, HFLM


def _table(found: Mapping[str, Mapping[str, Mapping]], baseline: str | None) -> Table:
    cells = {name: {label: cell for task, values in tasks.items() for label, cell in _cells(task, values).items()}
             for name, tasks in found.items()}
    columns = tuple(dict.fromkeys(label for its in cells.values() for label in its))
    missing = Cell(float("nan"))
    rows = tuple(Row(name, tuple(its.get(label, missing) for label in columns), None, None,
                     sum(values.get("answers", 0) for values in found[name].values()), None) for name, its in cells.items())
    return Table("lm-eval", "", columns, rows, 4, (_NOTE,), baseline)


def _cells(task: str, values: Mapping[str, Any]) -> dict[str, Cell]:
    """Column → cell: lm-eval names a metric "acc,none" (with its filter) and its error "acc_stderr,none"."""
    z, cells = NormalDist().inv_cdf(0.975), {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        known = isinstance(error, int | float) and not isinstance(error, bool)
        label = f"{task} {metric}" + (f" ({kind})" if kind != "none" else "")
        cells[label] = Cell(value, value - z * error, value + z * error) if known else Cell(value)
    return cells

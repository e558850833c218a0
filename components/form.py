"""The form of a method: its stages, its weights and its options, each a number, a curve over the layers, or a table of patterns.

Python says what there is (from the method's own signature) and checks what comes back; assets/form.js draws. One component
for all methods, because a method's options are data. Price: a change travels to Python and back before the page shows it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gradio as gr

from components.state import COLORS, LETTERS, Settings, starting_value
from fusion import METHODS, Recipe, RecipeError
from fusion.errors import nearest
from fusion.methods import Option
from fusion.settings import VARIATION, plain

_ASSETS = Path(__file__).parents[1] / "assets"
_MAX_TEXT = 20_000
_MAX_POINTS = 33
_MOUNT = """
const view = fuseForm(element.querySelector('.fm'), (change) => trigger('edit', change));
view.update(props.value);
watch('value', () => view.update(props.value));
"""
# where in a pipeline an option takes effect; the others stand below the strip
_STAGE_OF = {"density": ("keep the largest", "drop at random", "drop by rank"), "epsilon": ("drop by rank",),
             "gamma": ("drop outliers",), "rescale": ("rescale",), "normalize": ("normalise",), "lambda": ("scale by λ",),
             "select_topk": ("select by variance",)}


def payload(wish: Settings, titles: tuple[str, ...], layers: int, problem: str = "") -> dict:
    """The component's value: everything the form shows, as plain data.

    `titles` of the targets, `layers` of the pivot, `problem`: why these settings cannot be run, "" when they can.
    """
    method, given = METHODS[wish.method], dict(wish.options)
    fields = [_field(option, given.get(option.name, starting_value(option))) for option in method.options]
    stages = [{"title": stage, "fields": [name for name, where in _STAGE_OF.items() if stage in where and method.option(name)]}
              for stage in method.stages]
    return {"method": wish.method, "stages": stages, "fields": fields, "weights": _weights(wish, len(titles)), "layers": layers,
            "problem": problem, "targets": [{"name": title, "letter": LETTERS[j], "color": COLORS[j % len(COLORS)]}
                                            for j, title in enumerate(titles)]}


def _field(option: Option, value: object) -> dict:
    return {"name": option.name, "label": _SPELT.get(option.name, option.name.replace("_", " ")), "text": option.text,
            "kind": option.kind, "low": option.low, "high": option.high, "choices": list(option.choices),
            "default": option.default, "perTarget": option.per_target, "value": plain(value)}


_SPELT = {"lambda": "λ (lambda)", "t": "t", "select_topk": "select top τ", "gamma": "γ (gamma)", "epsilon": "ε (epsilon)"}


def _weights(wish: Settings, count: int) -> dict | None:
    method = METHODS[wish.method]
    if not method.weights:
        return None
    own = VARIATION if method.measured else 1.0
    values = [plain(value) for value in (*wish.weights[:count], *[wish.weights[-1] if wish.weights else own] * count)][:count]
    return {"kind": method.weights, "measured": method.measured, "values": values, "changed": bool(wish.weights)}


def form(value: dict | None = None, elem_id: str = "method-form") -> gr.HTML:
    """The component: give it a `payload`, listen to `.edit(fn)`, and read the request with `parse_change(evt._data, …)`."""
    scripts = "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in ("form_curve.js", "form.js"))
    return gr.HTML(value=value, elem_id=elem_id, html_template="<div class='fm'></div>", apply_default_css=False, padding=False,
                   css_template=(_ASSETS / "form.css").read_text(encoding="utf-8"), js_on_load=scripts + _MOUNT)


def parse_change(data: object, wish: Settings, count: int) -> Settings:
    """The settings after a request of the page, where nothing can be trusted; RecipeError says what is wrong with it.

    `data`: {"field": "weights" or the name of an option, "value": what a recipe would have there, or null for the default}.
    A value may also be {"patterns": text} with a line `pattern = number` for each row of a table. `count` of targets.
    """
    if not isinstance(data, dict) or not isinstance(data.get("field"), str):
        raise RecipeError("the change is not an object with a field", todo="Change a value of the form.")
    name, value, method = data["field"], data.get("value"), METHODS[wish.method]
    if name != "weights" and method.option(name) is None:
        raise RecipeError(f"{wish.method} has no option {name[:40]!r}", todo=nearest(name[:40], [o.name for o in method.options]))
    if name == "weights" and not method.weights:
        raise RecipeError(f"{wish.method} has no weights", todo="Choose another method.")
    given = _read(value)
    draft = {"fusechat": 1, "pivot": "pivot", "targets": [{"name": f"t{j}", "path": f"t{j}"} for j in range(count)],
             "method": wish.method, "options": {key: plain(its) for key, its in wish.options if key != name},
             "weights": plain(wish.weights) if wish.weights else []}
    if name == "weights":
        draft["weights"] = [] if given is None else given
    elif given is not None:
        draft["options"][name] = given
    for option in method.options:  # what must be given is given, so that one change is judged by itself
        if option.default is None:
            draft["options"].setdefault(option.name, starting_value(option))
    recipe = Recipe.from_dict({key: its for key, its in draft.items() if its not in ([], {})})
    return replace(wish, weights=recipe.weights, options=tuple(recipe.options.items()),
                   edits=wish.edits if METHODS[wish.method].weights else ())


def _read(value: object) -> object:
    if isinstance(value, list):
        if len(value) > len(LETTERS):
            raise RecipeError(f"{len(value)} values", todo="Give one for each target.")
        return [_read(item) for item in value]
    if isinstance(value, dict) and set(value) == {"patterns"} and isinstance(value["patterns"], str):
        return {"table": _table(value["patterns"])}
    if isinstance(value, dict):
        points = value.get("curve", [])
        if not isinstance(points, list) or len(points) > _MAX_POINTS:
            raise RecipeError("a curve is a list of at most 33 numbers", todo="Draw it again.")
    return value


def _table(text: str) -> list[dict]:
    """The rows of a table from lines like `*.mlp.* = 0.5` or `* = 0, 0.5, 1` (a curve)."""
    if len(text) > _MAX_TEXT:
        raise RecipeError("the table is too long", todo="Use patterns with * instead of single names.")
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        pattern, equals, right = line.rpartition("=")
        try:
            numbers = [float(part) for part in right.split(",")]
        except ValueError:
            numbers = []
        if right.strip() == VARIATION:
            value: object = VARIATION
        elif right.strip() in ("true", "false"):
            value = right.strip() == "true"
        else:
            value = numbers[0] if len(numbers) == 1 else {"curve": numbers}
        if not equals or not pattern.strip() or (isinstance(value, dict) and not numbers):
            raise RecipeError(f"line {number}: {line.strip()[:60]!r} is no row", where="patterns",
                              todo="Write it like *.mlp.* = 0.5, or * = 0, 0.5, 1 for a curve.")
        rows.append({"tensors": pattern.strip(), "value": value})
    if not rows:
        raise RecipeError("the table has no row", where="patterns", todo="Write a row like * = 0.5.")
    return rows

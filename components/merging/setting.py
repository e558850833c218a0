"""Controls → settings → recipe and back: what a person chooses, what it means, and recipes that come from elsewhere."""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from functools import partial
from html import escape

import gradio as gr
from gradio.events import Dependency

from components.form import parse_change, payload
from components.merging.layout import FAMILIES, MergeTab, donors, family_of, formula_card, method_choices
from components.merging.stacking import parse_stack, picture, write_stack
from components.models import weights_at_a_glance
from components.state import Selection, Settings
from components.status import as_comment, error_note, note
from components.studio import Studio
from components.variation import grid_of
from fusion import METHODS, FusionError, Recipe, RecipeError, dtypes
from fusion.mergekit import Note, export_text, import_text, is_mergekit
from fusion.plan import MergePlan
from fusion.preflight import mergeable_names
from fusion.progress import finish
from fusion.recipe import short_names, stages_from_yaml
from fusion.settings import Curve, Table
from fusion.weights import OptionPlan, WeightPlan, effective_weights

MAX_RECIPE_CHARS = 1_000_000
_MAX_NOTES = 60
_QUIET = {"show_progress": "hidden", "api_visibility": "private"}


def bind(studio: Studio, page: gr.Blocks, selection: gr.State, settings: gr.State, tab: MergeTab) -> Dependency:
    """Bind everything that changes or shows the settings; returns the event that loads a recipe."""
    _bind_controls(selection, settings, tab)
    _bind_form(studio, selection, settings, tab)

    def show(now: Selection, wish: Settings):
        return _shown(studio, now, wish)

    shown = [tab.family, tab.method, tab.formula, tab.form, tab.granularity, tab.measure, tab.rule, tab.temperature,
             tab.glance, tab.exclude, tab.stack, tab.stacked, tab.seed, tab.vocabulary, tab.dtype, tab.donor, tab.recipe,
             tab.command, tab.exported]
    gr.on([page.load, selection.change, settings.change], show, [selection, settings], shown, trigger_mode="always_last", **_QUIET)
    _bind_export(studio, selection, settings, tab)
    return _bind_loading(studio, selection, settings, tab)


def _bind_controls(selection: gr.State, settings: gr.State, tab: MergeTab) -> None:
    def pick_family(family: str, wish: Settings):
        if family not in FAMILIES:
            raise gr.Error(f"Unknown family {str(family)[:40]!r}.")
        return wish if wish.method in FAMILIES[family] else wish.with_method(FAMILIES[family][0])

    typed = {"temperature": tab.temperature, "exclude": tab.exclude, "slices": tab.stack, "seed": tab.seed}
    picked = {"method": tab.method, "granularity": tab.granularity, "measure": tab.measure, "rule": tab.rule,
              "vocabulary": tab.vocabulary, "dtype": tab.dtype, "donor": tab.donor}
    # Never `change`: it also comes when a recipe sets a control, while the others still show what was before.
    events = {name: [control.blur, control.submit] if name == "seed" else [control.blur] for name, control in typed.items()} \
        | {name: [control.input] for name, control in picked.items()}
    for name, control in {**typed, **picked}.items():
        gr.on(events[name], partial(_change, name), [control, selection, settings], settings, trigger_mode="always_last", **_QUIET)
    tab.family.input(pick_family, [tab.family, settings], settings, **_QUIET)


def _change(name: str, value: object, now: Selection, wish: Settings) -> Settings:
    try:
        return read(name, value, now, wish)
    except FusionError as error:
        raise gr.Error(str(error)) from error


def read(name: str, value: object, now: Selection, wish: Settings) -> Settings:
    """Settings with another value of one control, called by the field that it sets and by no means another; the value comes from
    outside, and the recipe checks what it means."""
    if name == "method":
        if value not in METHODS:
            raise RecipeError(f"unknown method {str(value)[:40]!r}", todo="Pick one of the list.")
        return wish.with_method(value)
    changed = replace(wish, **{name: _READ.get(name, _words)(value, now)})
    Recipe("pivot", ("target",), granularity=changed.granularity, measure=changed.measure, rule=changed.rule,
           dtype=changed.dtype, vocabulary=changed.vocabulary).check()
    return changed


def _words(value: object, now: Selection) -> str:
    return str(value or "")


def _patterns(value: object, now: Selection) -> tuple[str, ...]:
    return tuple(dict.fromkeys(line.strip() for line in str(value or "").splitlines()[:200] if line.strip()))


def _warmth(value: object, now: Selection) -> float:
    return float(value) if isinstance(value, (int, float)) and 0 < value < 1e6 else 1.0


def _seed(value: object, now: Selection) -> int:
    return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2**53 else 0


_READ = {"exclude": _patterns, "temperature": _warmth, "seed": _seed,
         "slices": lambda value, now: parse_stack(str(value or ""), now.targets)}


def _bind_form(studio: Studio, selection: gr.State, settings: gr.State, tab: MergeTab) -> None:
    def change(event: gr.EventData, now: Selection, wish: Settings):
        try:
            return parse_change(event._data, wish, len(now.targets)), gr.skip()
        except FusionError as error:
            gr.Warning(str(error).replace("recipe: ", "", 1))
            return gr.skip(), {**_form(studio, now, wish), "again": time.monotonic_ns()}  # so that it is drawn again

    tab.form.edit(change, [selection, settings], [settings, tab.form], trigger_mode="always_last", **_QUIET)


def _shown(studio: Studio, now: Selection, wish: Settings) -> list:
    recipe, command = recipe_and_command(studio, now, wish)
    family = family_of(wish.method)
    titles = tuple(studio.title(key) for key in now.targets)
    return [family, gr.Radio(method_choices(family), value=wish.method), formula_card(wish.method), _form(studio, now, wish),
            gr.Radio(value=wish.granularity, visible=wish.measured), gr.Radio(value=wish.measure, visible=wish.measured),
            gr.Radio(value=wish.rule, visible=wish.measured),
            gr.Number(value=wish.temperature, visible=wish.measured and wish.rule == "softmax"),
            _glance(studio, now, wish), "\n".join(wish.exclude), write_stack(wish.slices, now.targets),
            picture(wish.slices, now.targets, titles), wish.seed, wish.vocabulary, wish.dtype,
            gr.Dropdown(donors(studio, now), value=wish.donor if wish.donor in now.targets else "pivot"), recipe, command,
            gr.Code(visible=False)]


def _form(studio: Studio, now: Selection, wish: Settings) -> dict:
    titles, problem, layers = tuple(studio.title(key) for key in now.targets), "", 0
    try:
        if now.pivot:
            layers = studio.checkpoint(now.pivot).layers
        studio.recipe(now, wish)
    except FusionError as error:
        problem = str(error)
    return payload(wish, titles, layers, problem)


def _glance(studio: Studio, now: Selection, wish: Settings) -> str:
    try:
        return weights_at_a_glance(grid_of(studio, now, wish), METHODS[wish.method].weights)
    except FusionError:
        return ""  # the form says what is wrong


def recipe_and_command(studio: Studio, now: Selection, wish: Settings) -> tuple[str, str]:
    """The recipe as YAML and the command line for it; the reason instead while there is none."""
    try:
        recipe = studio.recipe(now, wish)
        names = tensors_of(studio, now, recipe)
        WeightPlan.of(recipe, names)
        OptionPlan.of(recipe, names)
        return recipe.to_yaml(), command_line(recipe)
    except FusionError as error:
        return as_comment(error), ""


def tensors_of(studio: Studio, now: Selection, recipe: Recipe) -> list[str]:
    """The tensors that the merge of a recipe computes; FusionError when stacked layers do not fit together."""
    if recipe.slices:
        plan = MergePlan.open(recipe, studio.outputs / "stacked")
        plan.close()
        return list(plan.weights.names)
    return mergeable_names(studio.checkpoint(now.pivot))


def command_line(recipe: Recipe, out: str = "my-merge") -> str:
    """The CLI command that does what a recipe says; by file when it says more than fits into a line."""
    values = [value if isinstance(value, tuple) else (value,) for value in (recipe.weights, *recipe.options.values())]
    tables = any(isinstance(value, Table) for its in values for value in its)
    if tables or len(recipe.overrides) > 6 or recipe.slices or recipe.rule != "ratio" \
            or recipe.names != tuple(short_names((recipe.pivot, *recipe.targets))[1:]):
        return f"python -m fusion merge recipe.yaml --out {out}   # with the recipe above saved as recipe.yaml"
    words = ["python", "-m", "fusion", "merge", recipe.pivot, *recipe.targets, "--method", recipe.method]
    if recipe.measured:
        words += ["--granularity", recipe.granularity] + (["--measure", recipe.measure] if recipe.measure != "square" else [])
    words += ["--weights", _setting(recipe.weights)] if recipe.weights else []
    for name, value in recipe.options.items():
        words += ["--option", f"{name}={_setting(value if isinstance(value, tuple) else (value,))}"]
    for override in recipe.overrides:
        pairs = ",".join(f"{name}={weight:.6g}" for name, weight in override.weights.items())
        words += ["--override", f"{override.tensors}:{pairs}"]
    for pattern in recipe.exclude:
        words += ["--exclude", pattern]
    for flag, value in (("--seed", recipe.seed), ("--vocabulary", recipe.vocabulary), ("--dtype", recipe.dtype),
                        ("--donor", recipe.donor if recipe.donor != "pivot" else "")):
        words += [flag, str(value)] if value else []
    return shlex.join([*words, "--out", out])


def _setting(values: tuple) -> str:
    """Settings as the command line takes them."""
    def one(value: object) -> str:
        if isinstance(value, Curve):
            return f"curve:{','.join(f'{point:g}' for point in value.points)}"
        return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, (int, float)) else str(value)

    return (";" if any(isinstance(value, Curve) for value in values) else ",").join(map(one, values))


def _bind_loading(studio: Studio, selection: gr.State, settings: gr.State, tab: MergeTab) -> Dependency:
    def load(text: str, before: Selection):
        """Take over a recipe, or mergekit's YAML with its notes."""
        try:
            recipe, said = _loaded(studio, text or "")
            now, wish = studio.adopt(recipe)
            for name in (key for key in ("name", "result") if getattr(recipe, key)):
                said += note("good", f"The recipe's `{name}` is not needed here and was left out.")
        except FusionError as error:
            return gr.skip(), gr.skip(), error_note(str(error))
        return replace(now, merges=before.merges), wish, note("good", "The recipe is loaded.") + said

    return tab.load.click(load, [tab.paste, selection], [selection, settings, tab.notes], show_progress="hidden",
                          api_name="load_recipe")


def _loaded(studio: Studio, text: str) -> tuple[Recipe, str]:
    """The one recipe of a text and what is to be said of it, as HTML."""
    if len(text) > MAX_RECIPE_CHARS:
        raise RecipeError("the recipe is too long", todo="Run it on the command line.")
    said = ""
    if is_mergekit(text):
        stages, notes = import_text(text, opener=studio.tensor_names)
        rows = "".join(map(_note_row, notes[:_MAX_NOTES]))
        said = f"<p class='fs-hint'>What mergekit's lines mean:</p><ul class='fs-lint'>{rows}</ul>"
    else:
        stages = stages_from_yaml(text)
    if len(stages) != 1:
        raise RecipeError(f"{len(stages)} merges one after another", where="recipe",
                          todo="The page runs one at a time; run the file with python -m fusion merge, or load its parts.")
    return stages[0], said


def _note_row(its: Note) -> str:
    where = f"line {its.line}" if its.line else ""
    return f"<li class='fs-{its.level}'><b>{where}</b><span>{escape(its.text)}</span></li>"


def _bind_export(studio: Studio, selection: gr.State, settings: gr.State, tab: MergeTab) -> None:
    def export(now: Selection, wish: Settings):
        """The selected merge as stock mergekit runs it."""
        try:
            recipe = studio.recipe(now, wish)
            pivot, names, weights = studio.checkpoint(now.pivot), tensors_of(studio, now, recipe), None
            if recipe.measured or (recipe.overrides and METHODS[recipe.method].weights):
                weights = effective_weights(recipe, finish(studio.measure(now)))[1]
            text = export_text(recipe, weights, names, recipe.dtype or dtypes.name(pivot.dtype))
        except FusionError as error:
            raise gr.Error(str(error)) from error
        return gr.Code(text, visible=True)

    tab.export.click(export, [selection, settings], tab.exported, api_name="export_mergekit")

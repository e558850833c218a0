"""A recipe as a mergekit file that stock mergekit runs to the same weights; what it cannot say is refused in words.

A VARM merge is a weighted average tensor by tensor, so it becomes `linear` with one filter for every tensor. Filters are pieces
of names and the first hit counts: the longest names stand first, so that each tensor meets its own name before any piece of it.
Price: about 90 characters per tensor and target.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from fusion.errors import RecipeError
from fusion.mergekit.catalogue import FORMS, Parameter
from fusion.methods import METHODS
from fusion.recipe import Recipe
from fusion.settings import Curve, Setting, Table, resolve

_RENAMED = {"nuslerp_flatten": "flatten", "nuslerp_row_wise": "row_wise"}
_YAML_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
_TASK_VECTORS = {name for name, form in FORMS.items() if form.base == "required" and "weight" in form.parameters}


def export_text(recipe: Recipe, weights: np.ndarray | None = None, names: Sequence[str] | None = None, dtype: str = "") -> str:
    """Write a recipe as one mergekit document.

    `weights` [T, J]: the effective weights (needed for measured ones and for overrides), `names` [T]: the result's tensors
    (needed where a value differs between tensors), `dtype`: what the result is stored as when the recipe leaves it open.
    RecipeError for what mergekit cannot say.
    """
    recipe.check()
    _refuse_what_is_ours(recipe, weights)
    lines = [*_head(recipe), f"merge_method: {'linear' if recipe.method == 'varm' else recipe.method}"]
    base = _base(recipe)
    lines += [f"base_model: {_word(base)}"] if base else []
    lines += _Body(recipe, weights, names).lines()
    lines += {"pivot": ["tokenizer: {source: base}"], "union": ["tokenizer: {source: union}"]}.get(recipe.vocabulary, [])
    stored = recipe.dtype or dtype
    lines += ["dtype: float32", *([f"out_dtype: {stored}"] if stored else [])]
    return "\n".join([f"name: {_word(recipe.name)}"] * bool(recipe.name) + lines) + "\n"


def _refuse_what_is_ours(recipe: Recipe, weights: np.ndarray | None) -> None:
    if recipe.method not in FORMS and recipe.method != "varm":
        raise RecipeError(f"mergekit has no method like {recipe.method}", where="export")
    if recipe.measured and weights is None:
        raise RecipeError("the measured weights are missing", where="export", todo="Measure the variation first.")
    if recipe.measured and recipe.granularity == "parameter":
        raise RecipeError("mergekit cannot weigh single elements", where="granularity", todo="Choose matrix or coarser.")
    if recipe.method == "sce" and recipe.options.get("compat", "paper") != "mergekit":
        raise RecipeError("mergekit's sce is another formula than the paper's", where="method",
                          todo="Set the option compat: mergekit to merge as mergekit does.")
    if recipe.exclude and recipe.method not in {"varm", "linear"} | _TASK_VECTORS:
        raise RecipeError(f"mergekit's {recipe.method} has no weight that could keep tensors from the base", where="exclude")
    if recipe.vocabulary == "common":
        raise RecipeError("mergekit cannot keep the common tokens alone", where="vocabulary", todo="Choose pivot or union.")
    for path in (recipe.pivot, *recipe.targets):
        if path.count("+") > 1 or any(part.count("@") > 1 for part in path.split("+")):
            raise RecipeError("mergekit reads @ and + in a path as revision and adapter", where=path, todo="Rename the folder.")


def _head(recipe: Recipe) -> Iterator[str]:
    """Provenance as comments, which mergekit ignores."""
    yield "# Made by FuseChat Studio for stock mergekit from this recipe:"
    for line in recipe.to_yaml().splitlines():
        yield f"#   {line}"
    if recipe.donor != "pivot":
        yield f"# Tokenizer, chat template and generation config: copy them from {recipe.donor} afterwards."
    if METHODS[recipe.method].random:
        yield "# mergekit draws other random numbers: run it with --random-seed, and expect another merge of the same kind."
    if not _base(recipe):
        yield "# Without a base_model mergekit takes config and tokenizer from one of the models at random; check them afterwards."
    yield "#"


def _base(recipe: Recipe) -> str:
    """What mergekit must be told to measure from and to take the tokenizer from; "" where a base would change the merge."""
    if recipe.method == "slerp" and len(recipe.targets) == 2:
        return recipe.targets[0]
    if recipe.method in ("nuslerp", "multislerp"):
        return recipe.pivot if recipe.options.get("space") == "deltas" else ""
    if recipe.method in ("karcher", "passthrough"):
        return recipe.pivot if recipe.pivot in recipe.targets else ""
    return recipe.pivot


class _Body:
    """The models or slices of a recipe with their parameters."""

    def __init__(self, recipe: Recipe, weights: np.ndarray | None, names: Sequence[str] | None):
        self.recipe, self.weights, self.names = recipe, weights, names
        self.form = FORMS["linear" if recipe.method == "varm" else recipe.method]
        self.pivot_joins = _base(recipe) == recipe.pivot and recipe.pivot not in recipe.targets \
            and (recipe.method in ("varm", "linear") or self.form.base == "required" or bool(recipe.slices))

    def lines(self) -> Iterator[str]:
        """models or slices, then what holds for all."""
        if self.recipe.slices:
            yield "slices:"
            for number, part in enumerate(self.recipe.slices):
                yield "- sources:"
                for model, layers in self._ordered(part.ranges).items():
                    yield f"  - model: {_word(self._path(model))}"
                    yield f"    layer_range: [{layers[0]}, {layers[1]}]"
                    yield from _block(dict(self._own(model, self._inside(number, layers[0]))), "    ")
        else:
            yield "models:"
            for model in (*(["pivot"] if self.pivot_joins else []), *self.recipe.names):
                yield f"- model: {_word(self._path(model))}"
                yield from _block(dict(self._own(model, None)), "  ")
        yield from _block(dict(self._shared()), "")

    def _ordered(self, ranges: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        first = next(iter(ranges.values()))
        joined = {"pivot": first, **ranges} if self.pivot_joins else ranges
        return {model: joined[model] for model in ("pivot", *self.recipe.names) if model in joined}

    def _path(self, model: str) -> str:
        return self.recipe.pivot if model == "pivot" else self.recipe.targets[self.recipe.names.index(model)]

    def _inside(self, number: int, start: int) -> Callable[[str], str | None]:
        """What a tensor of slice `number` is called in a source whose layers begin at `start`; None = in another slice."""
        lengths = [next(iter(part.ranges.values())) for part in self.recipe.slices]
        first = sum(end - begin for begin, end in lengths[:number])
        count, last = lengths[number][1] - lengths[number][0], number == len(lengths) - 1

        def source(name: str) -> str | None:
            found = re.match(r"(.*?\.)(\d+)(\..*)", name)
            if not found:
                embedding = resolve(Curve((0.0, 1.0)), [name])[0] == 0
                return name if (number == 0 if embedding else last) else None
            layer = int(found[2]) - first
            return f"{found[1]}{layer + start}{found[3]}" if 0 <= layer < count else None
        return source

    def _own(self, model: str, inside: Callable[[str], str | None] | None) -> Iterator[tuple[str, object]]:
        """The parameters of one model."""
        for name, known in self.form.parameters.items():
            if known.scope == "shared" or (model == "pivot" and known.scope == "target"):
                continue
            if name == "weight":
                yield name, self._weight(model, inside)
            elif model != "pivot":
                value = self.recipe.options.get(name, known.default)
                if isinstance(value, tuple):
                    value = value[self.recipe.names.index(model)]
                if value is not None and value != known.default:
                    yield name, self._setting(value, inside, f"options: {name}")

    def _weight(self, model: str, inside: Callable[[str], str | None] | None) -> object:
        j = self.recipe.names.index(model) if model != "pivot" else None
        if self.weights is None:
            if self.recipe.overrides or self.recipe.exclude:
                raise RecipeError("overrides and exclusions need the tensors' names", where="export")
            return 0.0 if j is None else self._setting(self.recipe.weights[j] if self.recipe.weights else 1.0, inside, "weights")
        kept = ~np.any(self.weights, axis=1) & np.array([bool(self.recipe.exclude)])
        column = kept.astype(float) if j is None else self.weights[:, j]
        if j is not None and np.ptp(column[~kept] if not kept.all() else column) == 0 and not kept.any():
            return float(column[0])
        own = self.recipe.weights[j] if j is not None and self.recipe.weights else None
        return self._values(dict(zip(self.names, map(float, column), strict=True)), inside, own)

    def _shared(self) -> Iterator[tuple[str, object]]:
        for name, known in self.form.parameters.items():
            value = self.recipe.options.get(_RENAMED.get(name, name))
            if known.scope == "shared" and value is None and known.required:
                value = METHODS[self.recipe.method].option(name).default
            if known.scope == "shared" and value is not None and (known.required or value != known.default):
                yield name, self._setting(value, None, f"options: {name}")

    def _setting(self, value: Setting, inside: Callable[[str], str | None] | None, where: str) -> object:
        if not isinstance(value, (Curve, Table)):
            return value
        if self.names is None:
            raise RecipeError("a curve or table can only be exported with the tensors' names", where=where)
        return self._values(dict(zip(self.names, resolve(value, self.names, where), strict=True)), inside, value)

    def _values(self, values: Mapping[str, float], inside: Callable[[str], str | None] | None, own: Setting | None) -> object:
        """Values by tensor as a plain value, as the setting's own filters and gradients, or as one filter for every tensor."""
        if inside is not None:
            values = {there: value for name, value in values.items() if (there := inside(name)) is not None}
        if len(set(values.values())) == 1:
            return next(iter(values.values()))
        if inside is None and own is not None:
            rows = as_filters(own, list(values))
            if rows is not None and says(rows, values):
                return rows[0]["value"] if len(rows) == 1 and "filter" not in rows[0] else rows
        return [{"filter": name, "value": values[name]} for name in sorted(values, key=len, reverse=True)]


def as_filters(own: Setting, names: Sequence[str]) -> list[dict] | None:
    """A curve's or table's rows as mergekit has them, first match first; None when a pattern is no piece of a name."""
    from fusion.mergekit.outline import largest_stack

    stack = largest_stack(names)
    rows = []
    for pattern, value in reversed(own.rows if isinstance(own, Table) else (("*", own),)):
        piece = pattern.removeprefix(f"{stack}.") if pattern != f"{stack}.*" else f"{stack}."
        piece = piece.strip("*") if piece.startswith("*") and piece.endswith("*") else piece
        if "*" in piece or "?" in piece:
            return None
        plain = [float(point) for point in value.points] if isinstance(value, Curve) else value
        rows.append({"filter": piece, "value": plain} if piece else {"value": plain})
    return rows


def says(rows: Sequence[Mapping], values: Mapping[str, float]) -> bool:
    """Whether mergekit, reading these rows, gives every tensor this value."""
    from fusion.mergekit.document import Row
    from fusion.mergekit.outline import whole_model
    from fusion.mergekit.patterns import value_at

    known = Parameter("flag" if isinstance(next(iter(values.values())), bool) else "number", "shared")
    chain = tuple(Row(0, row.get("filter"), tuple(value) if isinstance(value := row["value"], list) else (value,),
                      isinstance(value, list)) for row in rows)
    got = {spot.name: value_at(chain, spot.name, spot.t, known) for spot in whole_model(list(values)).spots}
    return all(got[name] is not None and abs(got[name] - value) <= 1e-9 * max(1, abs(value)) for name, value in values.items())


def _block(parameters: Mapping[str, object], indent: str) -> Iterator[str]:
    if not parameters:
        return
    yield f"{indent}parameters:"
    for name, value in parameters.items():
        if not isinstance(value, list) or not isinstance(value[0], dict):
            yield f"{indent}  {name}: {_plain(value)}"
            continue
        yield f"{indent}  {name}:"
        for row in value:
            wanted = f"filter: {_word(row['filter'])}, " if "filter" in row else ""
            yield f"{indent}  - {{{wanted}value: {_plain(row['value'])}}}"


def _plain(value: object) -> str:
    """A value as YAML 1.1 reads it: exponents need a dot."""
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, bool) or not isinstance(value, float):
        return json.dumps(value)
    text = f"{value:.9g}"
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def _word(text: str) -> str:
    """A path or name as YAML, quoted where it needs to be."""
    plain = re.fullmatch(r"[A-Za-z./][\w./+@-]*", text) and text.lower() not in _YAML_WORDS
    return text if plain else json.dumps(text, ensure_ascii=False)

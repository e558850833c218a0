"""A recipe is everything that determines a merge: plain frozen data, checked before any weight is read, YAML both ways.

    recipe = Recipe("pivot", ("target-a", "target-b"), granularity="layer")
    Recipe.from_yaml(recipe.to_yaml()) == recipe

A file may hold several, the stages of one merge: see `stages_from_yaml`.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from fusion import documents
from fusion.errors import RecipeError
from fusion.methods import METHODS
from fusion.recipe_rules import faults
from fusion.recipe_yaml import VERSION, read_fields
from fusion.settings import VARIATION, Curve, Override, Setting, Slice, Table, plain

__all__ = ["Curve", "Override", "Recipe", "Setting", "Slice", "Table", "load_stages", "short_names", "stages_from_yaml"]


@dataclass(frozen=True)
class Recipe:
    """What to merge and how; see `problems` for what makes a recipe valid.

    `pivot`, `targets`: folders, or names of earlier stages. `names`: what the targets are called (default: their folders'
    names). `weights`: one setting per target, or the word "variation" for the measured weight (empty = what the method does
    by itself); variation is taken at `granularity` by `measure` and becomes a weight by `rule`: the "ratio" to the sum over
    the targets, or the "softmax" of v / (`temperature`·max v). `options`: of the method, by name; a tuple holds one per
    target. `overrides`: later ones win. `exclude`: patterns of tensors kept from the pivot. `slices`: layers of the result,
    in order. `seed`: of what is random. `vocabulary`: "pivot", "common" or "union" for models whose tokens differ ("" =
    refuse). `dtype`: of the stored result ("" = as the pivot). `donor`: "pivot" or a target's name. `name`: for later stages
    to refer to. `revisions`: model name → content digest, and `result`: engine version and output digest, are filled in when
    it is run.
    """

    pivot: str
    targets: tuple[str, ...]
    names: tuple[str, ...] = ()
    method: str = "varm"
    granularity: str = "matrix"
    measure: str = "square"
    rule: str = "ratio"
    temperature: float = 1.0
    weights: tuple[Setting, ...] = ()
    options: Mapping[str, Setting | tuple[Setting, ...]] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    exclude: tuple[str, ...] = ()
    slices: tuple[Slice, ...] = ()
    seed: int = 0
    vocabulary: str = ""
    dtype: str = ""
    donor: str = "pivot"
    allow_nonfinite: bool = False
    name: str = ""
    revisions: Mapping[str, str] = field(default_factory=dict)
    result: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(str(target) for target in self.targets))
        object.__setattr__(self, "pivot", str(self.pivot))
        if not self.names:
            object.__setattr__(self, "names", tuple(short_names((self.pivot, *self.targets))[1:]))
        given = (VARIATION,) * len(self.targets) if self.weights == VARIATION else self.weights
        object.__setattr__(self, "weights", tuple(given))
        object.__setattr__(self, "options", {name: tuple(value) if isinstance(value, list) else value
                                             for name, value in self.options.items()})

    @property
    def pivot_name(self) -> str:
        """What the pivot is called: the shortest end of its path that no target is called by."""
        tails = (tail for tail in _tails(self.pivot) if tail not in self.names)
        return next(tails, "the pivot")

    @property
    def measured(self) -> bool:
        """Whether variation gives some of the weights, so that `granularity` and `measure` matter."""
        if not self.weights:
            return self.method in METHODS and METHODS[self.method].measured
        return any(weight == VARIATION or (isinstance(weight, Table) and VARIATION in (value for _, value in weight.rows))
                   for weight in self.weights)

    def problems(self) -> list[str]:
        """Everything that is wrong with this recipe, in words; empty when it is valid."""
        return [text for _, text in faults(self)]

    def check(self) -> Recipe:
        """Return self, or raise RecipeError with every problem."""
        _refuse(self.problems(), "recipe")
        return self

    def explicit(self) -> Recipe:
        """The same recipe with every default written out, so that it still means this when a default has changed."""
        method = METHODS[self.method]
        own = VARIATION if method.measured else 1.0
        weights = self.weights or ((own,) * len(self.targets) if method.weights else ())
        defaults = {option.name: option.default for option in method.options if option.default is not None}
        return self.with_(weights=weights, options={**defaults, **self.options})

    def to_dict(self) -> dict:
        """Plain data as the YAML file has it; settings at their default are left out, the method's own are not."""
        data: dict = {"fusechat": VERSION, "pivot": self.pivot,
                      "targets": [{"name": name, "path": path} for name, path in zip(self.names, self.targets, strict=True)],
                      "method": self.method}
        if self.name:
            data = {"fusechat": VERSION, "name": self.name, **data}
        same = bool(self.weights) and set(map(str, self.weights)) == {VARIATION}
        parts = {
            "weights": VARIATION if same else plain(self.weights),
            "options": {name: plain(value) for name, value in self.options.items()},
            "overrides": [{"tensors": one.tensors, "weights": {name: plain(weight) for name, weight in one.weights.items()}}
                          for one in self.overrides],
            "exclude": list(self.exclude),
            "slices": [{name: list(layers) for name, layers in one.ranges.items()} for one in self.slices],
            "revisions": dict(self.revisions), "result": dict(self.result)}
        kept = {"donor"} | ({"granularity", "measure"} if self.measured else set())
        for item in fields(self)[_OWN:]:
            value = parts.get(item.name, getattr(self, item.name))
            if item.name in kept or (value if item.name in parts else value != item.default):
                data[item.name] = value
        return data

    def to_yaml(self) -> str:
        """The recipe as a YAML document."""
        return documents.write([self.to_dict()])

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> Recipe:
        """Read a recipe; RecipeError lists everything that is wrong with it, with its lines. `where`: what to call it."""
        stages = stages_from_yaml(text, where)
        if len(stages) > 1:
            raise RecipeError(f"it holds {len(stages)} stages, not one recipe", where=where)
        return stages[0]

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file."""
        return cls.from_yaml(read_text(path), str(path))

    @classmethod
    def from_dict(cls, data: object) -> Recipe:
        """Make a recipe of plain data; RecipeError lists everything that is wrong with it."""
        recipe, found = _read(documents.Document(data))
        _refuse([text for _, text in found], "recipe")
        return recipe

    def with_(self, **changes) -> Recipe:
        """A copy with some settings changed."""
        return replace(self, **changes)


_SHOWN = 50  # problems of one file
_OWN = 4  # fields before this one stand at the head of a recipe
_ON_TARGETS = {"targets", "donor", "weights", "overrides", "options", "slices"}  # rules that need to know the targets
_ON_METHOD = {"targets", "weights", "overrides", "options", "slices"}


def stages_from_yaml(text: str, where: str = "recipe") -> tuple[Recipe, ...]:
    """Read a file of one recipe, or of several stages between lines of `---`.

    A stage may have the name of an earlier one where the path of a model stands; the last stage is the result, and every
    other one must be used. RecipeError lists everything that is wrong, each with its line.
    """
    parts, problems = documents.read(text)
    stages = []
    for part in parts or ([] if problems else [documents.Document(None, {(): 1})]):
        recipe, found = _read(part)
        problems += [(part.line(path), said) for path, said in found]
        stages.append((part, recipe))
    problems += _references(stages)
    _refuse([f"line {line}: {said}" for line, said in sorted(problems, key=lambda problem: problem[0])], where)
    return tuple(recipe for _, recipe in stages)


def load_stages(path: str | Path) -> tuple[Recipe, ...]:
    """Read a file of one recipe or of several stages, see `stages_from_yaml`."""
    return stages_from_yaml(read_text(path), str(path))


def _read(document: documents.Document) -> tuple[Recipe, list[tuple[tuple, str]]]:
    """The recipe of a document and everything wrong with it; what could not be read is at its default."""
    found = read_fields(document.data)
    if "" in found.broken:
        return Recipe("", ()), found.faults
    own = found.values.pop("names")
    recipe = Recipe(**{"pivot": "", **found.values})
    recipe = recipe.with_(names=tuple(name or short for name, short in zip(own, recipe.names, strict=True)))
    blind = found.broken | (_ON_TARGETS if "targets" in found.broken else set()) \
        | (_ON_METHOD if "method" in found.broken else set())
    return recipe, found.faults + [(path, said) for path, said in faults(recipe) if path[0] not in blind]


def _references(stages: list[tuple[documents.Document, Recipe]]) -> Iterator[documents.Problem]:
    """What is wrong between the stages of one file."""
    if len(stages) < 2:
        return
    number: dict[str, int] = {}
    for n, (part, recipe) in enumerate(stages):
        if not recipe.name and n < len(stages) - 1:
            yield part.line(()), f"stage {n + 1} has no name. Give it one, so that a later stage can refer to it."
        elif recipe.name in number:
            yield part.line(("name",)), f"name: stage {number[recipe.name] + 1} is called {recipe.name!r} too."
        elif recipe.name:
            number[recipe.name] = n
    used = set()
    for n, (part, recipe) in enumerate(stages):
        for path, model in ((("pivot",), recipe.pivot), *((("targets", j), its) for j, its in enumerate(recipe.targets))):
            used |= {model} if number.get(model, n) < n else set()
            if number.get(model, -1) >= n:
                yield part.line(path), f"{path[0]}: {model!r} is stage {number[model] + 1}; only an earlier stage can be used."
    for name, n in number.items():
        if n < len(stages) - 1 and name not in used:
            yield stages[n][0].line(("name",)), f"name: no later stage uses {name!r}. Use it where a path stands, or take it out."


def _refuse(problems: Sequence[str], where: str) -> None:
    if problems:
        more = [f"… and {len(problems) - _SHOWN} more."] if len(problems) > _SHOWN else []
        raise RecipeError("\n".join([*problems[:_SHOWN], *more]),
                          where=where if len(problems) == 1 else f"{where}, {len(problems)} problems")


def read_text(path: str | Path) -> str:
    """The text of a recipe file, as far as one may be long, whatever byte order mark an editor or PowerShell put before it;
    RecipeError when it cannot be read."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe or a device need never end
            raise RecipeError("cannot be read (it is a folder, pipe or device)", where=str(path))
        with open(path, "rb") as file:
            wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        with open(path, encoding="utf-16" if wide else "utf-8-sig") as file:
            return file.read(documents.MAX_CHARACTERS + 1)
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot be read ({error})", where=str(path)) from error


def short_names(paths: Sequence[str]) -> list[str]:
    """Call every path by its shortest end that no other path shares: run-1/last and run-2/last keep their parents."""
    tails = [list(_tails(path)) for path in paths]
    names = []
    for i, own in enumerate(tails):
        others = {tail for j, theirs in enumerate(tails) if j != i for tail in theirs}
        names.append(next((tail for tail in own if tail not in others), own[0]))
    return names


def _tails(path: str) -> Iterator[str]:
    parts = [part for part in Path(path).parts if part not in ("/", ".", "..")] or [path]
    return ("/".join(parts[-n:]) for n in range(1, len(parts) + 1))

"""A recipe is everything that determines a merge: plain frozen data, checked before any weight is read, YAML both ways.

    recipe = Recipe("pivot", ("target-a", "target-b"), granularity="layer")
    Recipe.from_yaml(recipe.to_yaml()) == recipe
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from fusion import dtypes
from fusion.anatomy import GRANULARITIES
from fusion.errors import RecipeError, nearest
from fusion.methods import METHODS
from fusion.variation import MEASURES

VERSION = 1
MAX_TARGETS = 16
MAX_NUMBER = 1e30  # of a weight; their sum stays finite


@dataclass(frozen=True)
class Override:
    """Weights given by hand: for the tensors that match `tensors` (a name or a pattern with `*`), target name → weight.

    Targets not named share the rest in proportion to the weights they would have had.
    """

    tensors: str
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Recipe:
    """What to merge and how; see `problems` for what makes a recipe valid.

    `pivot`, `targets`: folders. `names`: what the targets are called (default: their folders' names). `weights`: one number
    per target for methods with given weights (empty = equal). `overrides`: later ones win. `exclude`: patterns of tensors
    kept from the pivot. `dtype`: of the stored result ("" = as the pivot). `donor`: "pivot" or a target's name. `revisions`:
    model name → fingerprint, filled in when the recipe is run.
    """

    pivot: str
    targets: tuple[str, ...]
    names: tuple[str, ...] = ()
    method: str = "varm"
    granularity: str = "matrix"
    measure: str = "square"
    weights: tuple[float, ...] = ()
    overrides: tuple[Override, ...] = ()
    exclude: tuple[str, ...] = ()
    dtype: str = ""
    donor: str = "pivot"
    allow_nonfinite: bool = False
    revisions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(str(target) for target in self.targets))
        object.__setattr__(self, "pivot", str(self.pivot))
        if not self.names:
            object.__setattr__(self, "names", tuple(short_names((self.pivot, *self.targets))[1:]))

    @property
    def pivot_name(self) -> str:
        """What the pivot is called: the shortest end of its path that no target is called by."""
        tails = (tail for tail in _tails(self.pivot) if tail not in self.names)
        return next(tails, "the pivot")

    def problems(self) -> list[str]:
        """Everything that is wrong with this recipe, in words; empty when it is valid."""
        found = []
        if not self.pivot:
            found.append("pivot: there is none. Give the checkpoint that variation is measured from.")
        if not self.targets:
            found.append("targets: there is none. Give at least one.")
        if len(self.targets) > MAX_TARGETS:
            found.append(f"targets: {len(self.targets)} are too many. Give at most {MAX_TARGETS}.")
        twice = next((path for path, count in Counter((self.pivot, *self.targets)).items() if count > 1), None)
        if twice:
            found.append(f"targets: {twice} is given twice. Leave one out.")
        elif len(set(self.names)) != len(self.names) or len(self.names) != len(self.targets) or "pivot" in self.names:
            found.append(f"targets: every target needs a name of its own, and none may be `pivot`: {', '.join(self.names)}.")
        for label, value, known in (("method", self.method, METHODS), ("granularity", self.granularity, GRANULARITIES),
                                    ("measure", self.measure, MEASURES), ("donor", self.donor, ("pivot", *self.names)),
                                    ("dtype", self.dtype or "float32", dtypes.NAMES)):
            if value not in known:
                found.append(f"{label}: unknown {value!r}. {nearest(str(value), known)}")
        return found + self._weight_problems()

    def check(self) -> Recipe:
        """Return self, or raise RecipeError with every problem."""
        found = self.problems()
        if found:
            raise RecipeError("\n".join(found), where="recipe" if len(found) == 1 else f"recipe, {len(found)} problems")
        return self

    def _weight_problems(self) -> list[str]:
        found = []
        if self.weights and METHODS.get(self.method) and METHODS[self.method].measured:
            found.append(f"weights: {self.method} measures its weights. Use overrides, or method linear.")
        elif self.weights and len(self.weights) != len(self.targets):
            found.append(f"weights: {len(self.weights)} numbers for {len(self.targets)} targets. Give one for each.")
        elif self.weights and not (all(map(_number, self.weights)) and sum(self.weights) > 1e-9):
            found.append("weights: these must be finite numbers with a sum above 0.")
        for override in self.overrides:
            values = override.weights.values()
            strange = [name for name in override.weights if name not in self.names]
            if strange:
                found.append(f"overrides: {override.tensors}: unknown target {strange[0]!r}. {nearest(strange[0], self.names)}")
            elif not values or not all(_number(value) and 0 <= value <= 1 for value in values):
                found.append(f"overrides: {override.tensors}: every weight must be a number from 0 to 1.")
            elif sum(values) > 1 + 1e-6 or (len(values) == len(self.names) and sum(values) < 1 - 1e-6):
                found.append(f"overrides: {override.tensors}: the weights sum to {sum(values):.6g}, not to 1.")
        return found

    def to_dict(self) -> dict:
        """Plain data as the YAML file has it; settings at their default are left out, the method's own are not."""
        measured = self.method in METHODS and METHODS[self.method].measured
        data: dict = {"fusechat": VERSION, "pivot": self.pivot,
                      "targets": [{"name": name, "path": path} for name, path in zip(self.names, self.targets, strict=True)],
                      "method": self.method}
        if measured:
            data |= {"granularity": self.granularity, "measure": self.measure}
        else:
            data |= {"weights": [float(weight) for weight in self.weights or (1.0,) * len(self.targets)]}
        if self.overrides:
            data["overrides"] = [{"tensors": o.tensors, "weights": {name: float(weight) for name, weight in o.weights.items()}}
                                 for o in self.overrides]
        if self.exclude:
            data["exclude"] = list(self.exclude)
        if self.dtype:
            data["dtype"] = self.dtype
        data["donor"] = self.donor
        if self.allow_nonfinite:
            data["allow_nonfinite"] = True
        if self.revisions:
            data["revisions"] = dict(self.revisions)
        return data

    def to_yaml(self) -> str:
        """The recipe as a YAML document."""
        import yaml

        def dump(readable: bool) -> str:
            return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=readable, width=120)

        text = dump(readable=True)
        return dump(readable=False) if {"\x85", "\u2028", "\u2029"} & set(text) else text  # PyYAML folds these like line ends

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Read a recipe; RecipeError lists everything that is wrong with it."""
        import yaml

        if len(text) > 4_000_000:
            raise RecipeError("the recipe is longer than 4 MB", where="recipe")
        try:
            data = yaml.load(text, Loader=_StrictLoader())
        except Exception as error:  # the border to PyYAML, which raises a dozen kinds
            raise RecipeError(f"not valid YAML: {' '.join(str(error).split())[:400]}", where="recipe") from error
        return cls.from_dict(data)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file."""
        try:
            return cls.from_yaml(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot be read ({error})", where=str(path)) from error

    @classmethod
    def from_dict(cls, data: object) -> Recipe:
        """Make a recipe of plain data; RecipeError lists everything that is wrong with it."""
        found: list[str] = []
        if not isinstance(data, dict):
            raise RecipeError("a recipe is a table of settings", where="recipe", todo="Begin with `fusechat: 1`.")
        if data.get("fusechat") != VERSION:
            found.append(f"fusechat: the version is {data.get('fusechat')!r}, this program reads {VERSION}.")
        known = {item.name for item in fields(cls)} - {"names"} | {"fusechat"}
        found += [f"{key}: unknown setting. {nearest(str(key), known)}" for key in data if key not in known]
        values = {key: _field(key, value, found) for key, value in data.items() if key in known - {"fusechat", "targets"}}
        names, targets = _targets(data.get("targets", ()), found)
        if found:
            raise RecipeError("\n".join(found), where="recipe" if len(found) == 1 else f"recipe, {len(found)} problems")
        recipe = cls(targets=targets, **{"pivot": "", **values})
        return recipe.with_(names=tuple(own or short for own, short in zip(names, recipe.names, strict=True))).check()

    def with_(self, **changes) -> Recipe:
        """A copy with some settings changed."""
        return replace(self, **changes)


_TYPES = {"pivot": str, "method": str, "granularity": str, "measure": str, "dtype": str, "donor": str, "allow_nonfinite": bool}


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


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -MAX_NUMBER < value < MAX_NUMBER


def _field(key: str, value: object, found: list[str]) -> object:
    if key in _TYPES:
        if not isinstance(value, _TYPES[key]):
            found.append(f"{key}: {value!r} should be {'true or false' if _TYPES[key] is bool else 'text'}.")
        return value
    if key == "overrides":
        return _overrides(value, found)
    if key == "revisions":
        if not isinstance(value, dict) or not all(isinstance(item, str) for pair in value.items() for item in pair):
            found.append("revisions: should map model names to fingerprints.")
        return value
    wanted, fits = ("numbers", _number) if key == "weights" else ("patterns", lambda item: isinstance(item, str))
    if not isinstance(value, list) or not all(map(fits, value)):
        found.append(f"{key}: should be a list of {wanted}.")
        return ()
    return tuple(value)


def _overrides(value: object, found: list[str]) -> tuple[Override, ...]:
    overrides = []
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, dict) or set(entry) != {"tensors", "weights"} or not isinstance(entry["tensors"], str) \
                or not isinstance(entry["weights"], dict):
            found.append("overrides: every entry needs `tensors` (a pattern) and `weights` (target: number).")
        else:
            overrides.append(Override(entry["tensors"], {str(name): weight for name, weight in entry["weights"].items()}))
    return tuple(overrides)


def _targets(value: object, found: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    names, paths = [], []
    for entry in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(entry, str):
            entry = {"path": entry}
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not set(entry) <= {"path", "name"} \
                or not isinstance(entry.get("name", ""), str):
            found.append(f"targets: {entry!r} should be a path, or a table with `path` and `name`.")
            continue
        names.append(entry.get("name", ""))
        paths.append(entry["path"])
    return tuple(names), tuple(paths)


def _StrictLoader():
    """A safe YAML loader that refuses aliases (bombs) and repeated keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_scalar(self, node):
            if node.tag.endswith(":int") and len(node.value) > 20:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: a number of {len(node.value)} digits")
            return super().construct_scalar(node)

        def compose_node(self, parent, index):
            if self.check_event(yaml.events.AliasEvent):
                raise yaml.YAMLError("aliases are not allowed in a recipe")
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            keys = [str(self.construct_object(key, deep=True)) for key, _ in node.value]
            twice = next((key for key, count in Counter(keys).items() if count > 1), None)
            if twice is not None:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {twice!r} is given twice")
            return super().construct_mapping(node, deep)

    return Loader

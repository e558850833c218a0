"""The plain data of a YAML recipe as the fields of a Recipe: shapes and types only, whether they make sense is `recipe_rules`.

Every field is read by itself, so that one broken entry hides no other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fusion.documents import Path
from fusion.errors import nearest
from fusion.settings import VARIATION, Curve, Override, Slice, Table

VERSION = 1
Fault = tuple[Path, str]  # where, what is wrong
_WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


@dataclass
class Fields:
    """What was read of a document: `values` for Recipe, `faults`, and the `broken` keys whose value could not be used."""

    values: dict = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)

    def fault(self, path: Path, text: str) -> None:
        """Note that the entry at `path` cannot be used."""
        self.faults.append((path, text))
        self.broken.add(path[0] if path else "")


def read_fields(data: object) -> Fields:
    """Read a recipe's plain data; never raises."""
    found = Fields()
    if not isinstance(data, dict):
        found.fault((), "a recipe is a table of settings. Begin with `fusechat: 1`.")
        return found
    version = data.get("fusechat")
    if version != VERSION or isinstance(version, bool):
        found.fault(("fusechat",), f"fusechat: the version is {version!r}, this program reads {VERSION}.")
    for key, value in data.items():
        if key in _READERS:
            found.values[key] = _READERS[key](found, key, value)
        elif key != "fusechat":
            found.faults.append(((key,), f"{key}: unknown setting. {nearest(str(key), {*_READERS, 'fusechat'})}"))
    for key in found.broken & found.values.keys():
        del found.values[key]
    found.values["targets"], found.values["names"] = found.values.get("targets", ((), ()))
    return found


def _typed(wanted: type) -> Callable:
    def read(found: Fields, key: str, value: object) -> object:
        if not isinstance(value, (int, float) if wanted is float else wanted) or (wanted is not bool and isinstance(value, bool)):
            found.fault((key,), f"{key}: {value!r} should be {_WORDS[wanted]}.")
        return value
    return read


def _patterns(found: Fields, key: str, value: object) -> tuple:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        found.fault((key,), f"{key}: should be a list of patterns.")
        return ()
    return tuple(value)


def _texts(found: Fields, key: str, value: object) -> dict:
    if not isinstance(value, dict) or not all(isinstance(item, str) for pair in value.items() for item in pair):
        found.fault((key,), f"{key}: should be a table of names and texts.")
        return {}
    return value


def _targets(found: Fields, key: str, value: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
    names, paths = [], []
    for i, entry in enumerate(value if isinstance(value, (list, tuple)) else [value]):
        if isinstance(entry, str):
            entry = {"path": entry}
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not set(entry) <= {"path", "name"} \
                or not isinstance(entry.get("name", ""), str):
            found.fault((key, i), f"targets: {entry!r} should be a path, or a table with `path` and `name`.")
            continue
        names.append(entry.get("name", ""))
        paths.append(entry["path"])
    return tuple(paths), tuple(names)


def _weights(found: Fields, key: str, value: object) -> tuple | str:
    if value == VARIATION:
        return VARIATION  # for all targets
    if not isinstance(value, list):
        found.fault((key,), "weights: should be a list with one number, curve, table or `variation` for each target, "
                            "or the one word `variation`.")
        return ()
    return tuple(_setting(found, (key, i), item, "weights") for i, item in enumerate(value))


def _options(found: Fields, key: str, value: object) -> dict:
    if not isinstance(value, dict):
        found.fault((key,), "options: should be a table of the method's options.")
        return {}
    return {str(name): tuple(_setting(found, (key, name, i), item, f"options: {name}") for i, item in enumerate(given))
            if isinstance(given, list) else _setting(found, (key, name), given, f"options: {name}")
            for name, given in value.items()}


def _setting(found: Fields, path: Path, value: object, label: str, table_too: bool = True) -> object:
    if isinstance(value, (int, float, str)):
        return value
    keys = set(value) if isinstance(value, dict) else set()
    if keys in ({"curve"}, {"curve", "outside"}) and isinstance(value["curve"], list) \
            and all(isinstance(point, (int, float, str)) for point in (*value["curve"], value.get("outside", 0))):
        return Curve(tuple(value["curve"]), value.get("outside"))
    if keys == {"table"} and table_too and isinstance(value["table"], list):
        return Table(tuple(_row(found, (*path, "table", i), row, label) for i, row in enumerate(value["table"])))
    known = ("curve", "outside", "table") if table_too else ("curve", "outside")
    for key in sorted(map(str, keys - set(known))):
        found.fault((*path, key), f"{label}: unknown setting {key!r}. {nearest(key, known)}")
    if keys <= set(known):
        kinds = "a value, {curve: [numbers]} or {table: [rows]}" if table_too else "a value or {curve: [numbers]}"
        found.fault(path, f"{label}: {value!r} should be {kinds}.")
    return 0


def _row(found: Fields, path: Path, row: object, label: str) -> tuple:
    if not isinstance(row, dict) or set(row) != {"tensors", "value"} or not isinstance(row["tensors"], str):
        found.fault(path, f"{label}: every row of a table needs `tensors` (a pattern) and `value`.")
        return "", 0
    return row["tensors"], _setting(found, (*path, "value"), row["value"], label, table_too=False)


def _overrides(found: Fields, key: str, value: object) -> tuple[Override, ...]:
    overrides = []
    for i, entry in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(entry, dict) or set(entry) != {"tensors", "weights"} or not isinstance(entry["tensors"], str) \
                or not isinstance(entry["weights"], dict):
            found.fault((key, i), "overrides: every entry needs `tensors` (a pattern) and `weights` (target: number).")
        else:
            overrides.append(Override(entry["tensors"], {str(name): weight for name, weight in entry["weights"].items()}))
    return tuple(overrides)


def _slices(found: Fields, key: str, value: object) -> tuple[Slice, ...]:
    slices = []
    for i, entry in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(entry, dict) or not all(isinstance(layers, list) and len(layers) == 2 for layers in entry.values()):
            found.fault((key, i), "slices: every entry names models and their layers, like `{target-a: [0, 12]}`; "
                                  "the last layer is not included.")
        else:
            slices.append(Slice({str(name): layers for name, layers in entry.items()}))
    return tuple(slices)


_READERS: dict[str, Callable] = {
    **dict.fromkeys(("name", "pivot", "method", "granularity", "measure", "rule", "vocabulary", "dtype", "donor"), _typed(str)),
    "targets": _targets, "temperature": _typed(float), "weights": _weights, "options": _options, "overrides": _overrides,
    "exclude": _patterns, "slices": _slices, "seed": _typed(int), "allow_nonfinite": _typed(bool), "revisions": _texts,
    "result": _texts,
}

"""mergekit's filters and gradients as a recipe's settings: first match wins there, the last matching row wins here.

Rows are turned round, a filter becomes the pattern `*filter*`, a gradient a curve over the layers with its first point as the
value outside them. Where the names are known the result is compared with mergekit's own rule, tensor by tensor, and written out by
name if no pattern says the same. Price: such a table can be long.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence

from fusion.errors import RecipeError
from fusion.mergekit.catalogue import Parameter, as_kind
from fusion.mergekit.document import Row
from fusion.mergekit.linting import row_value
from fusion.mergekit.outline import Outline, Spot
from fusion.settings import Curve, Setting, Table, resolve

Rows = tuple[Row, ...]
Pair = tuple[str, "float | bool | Curve"]


def value_at(rows: Rows, name: str, t: float, known: Parameter) -> float | bool | None:
    """mergekit's rule: the first row whose filter is part of `name` gives the value at depth t; the default if none does."""
    row = next((row for row in rows if row.filter is None or row.filter in name), None)
    return known.default if row is None else row_value(row, t, known.kind)


def setting(found: Outline, chains: Sequence[Rows | None], sources: Sequence[int | None], known: Parameter, label: str) -> Setting:
    """One parameter as a Setting.

    `chains` [parts] are the rows of every slice, the first that matches wins (None = of no matter there); `sources` [parts]
    the number of the source whose tensor names the filters see (None = the result's); `label` names it in a RecipeError.
    """
    wanted = {spot.name: value_at(chains[spot.part], spot.source_name(sources[spot.part], found.stack), spot.t, known)
              for spot in found.spots if chains[spot.part] is not None}
    if found.known and None in wanted.values():
        lost = next(name for name, value in wanted.items() if value is None)
        raise RecipeError(f"{label}: no value for {lost}; mergekit stops there", todo="Add a last entry without a filter.")
    given = [rows for rows in chains if rows is not None]
    first = given[0]
    if all(rows == first for rows in given) and (not first or (first[0].filter is None and len(set(first[0].values)) == 1)):
        return as_kind(first[0].values[0], known.kind) if first else known.default
    layers = {spot.layer for spot in found.spots} - {None}
    flat = len(chains) == 1 and len(layers) > 1 and (known.kind != "flag" or not any(row.gradient for row in first)) \
        and all(spot.layer is None or spot.source_name(sources[0], found.stack) == spot.name for spot in found.spots)
    rest = known.default if known.default is not None or None not in chains else 0.0
    pairs = [] if rest is None else [("*", rest)]
    pairs += _flat(first, known) if flat else _layered(found, chains, sources, known)
    if found.known:
        pairs = _fitting(pairs, found.names)
        if not _says(pairs, wanted, found.names):
            pairs = list(_by_name(wanted))
    return _plain(_last_word(pairs))


def _plain(pairs: list[Pair]) -> Setting:
    if len(pairs) == 1 and pairs[0][0] == "*":
        return pairs[0][1]
    return Table(tuple(pairs))


def _flat(rows: Rows, known: Parameter) -> Iterator[Pair]:
    """Rows of a merge of whole models: gradients stay curves."""
    for row in reversed(_reachable(rows)):
        points = tuple(float(as_kind(value, known.kind)) for value in row.values) if row.gradient else ()
        value = Curve(points, outside=points[0]) if len(points) > 1 else row_value(row, 0, known.kind)
        yield "*" if row.filter is None else f"*{row.filter}*", value


def _layered(found: Outline, chains: Sequence[Rows], sources: Sequence[int | None], known: Parameter) -> Iterator[Pair]:
    """Rows of a merge of slices: the outside of the last slice, that of the first one's embeddings, then layer by layer."""
    last = max(number for number, rows in enumerate(chains) if rows is not None)
    common = [(row.filter, row_value(row, 0, known.kind)) for row in reversed(_reachable(chains[last]))]
    yield from (("*" if wanted is None else f"*{wanted}*", value) for wanted, value in common)
    for spot in found.spots:
        if spot.layer is None and spot.part == 0 < last and chains[0] is not None:
            value = value_at(chains[0], spot.name, 0, known)
            if value is not None and value != value_at(chains[last], spot.name, 0, known):
                yield spot.name, value
    seen = set()
    for spot in found.spots:
        if spot.layer is not None and spot.layer not in seen and chains[spot.part] is not None:
            seen.add(spot.layer)
            rows = _reachable(chains[spot.part])
            if [(row.filter, row_value(row, spot.t, known.kind)) for row in reversed(rows)] != common or _numbered(rows):
                yield from _layer(spot, rows, sources[spot.part], found.stack, known)


def _layer(spot: Spot, rows: Sequence[Row], source: int | None, stack: str, known: Parameter) -> Iterator[Pair]:
    """Rows for one layer; a filter may reach into the part of the name that holds the layer's number."""
    here, there = f"{stack}.{spot.layer}.", f"{stack}.{spot.layer if source is None else spot.sources[source]}."
    if known.default is not None:
        yield f"{here}*", known.default
    for row in reversed(rows):
        value, wanted = row_value(row, spot.t, known.kind), row.filter
        if wanted is None or wanted in there:
            yield f"{here}*", value
            continue
        cuts = [i for i in range(1, len(wanted)) if there.endswith(wanted[:i])]
        for i in cuts:
            yield f"{here}{wanted[i:]}*", value
        if not cuts and not _numbered([row]):
            yield f"{here}*{wanted}*", value


def _reachable(rows: Rows) -> Rows:
    """Rows up to the first that takes every tensor, without those that no name can contain."""
    end = next((i + 1 for i, row in enumerate(rows) if row.filter is None), len(rows))
    return tuple(row for row in rows[:end] if row.filter is None or not set(row.filter) & set("*?"))


def _numbered(rows: Sequence[Row]) -> bool:
    return any(row.filter is not None and any(character.isdigit() for character in row.filter) for row in rows)


def _fitting(pairs: list[Pair], names: Sequence[str]) -> list[Pair]:
    """Without the patterns that no name matches; one that matches a single name in full becomes that name."""
    found = []
    for pattern, value in pairs:
        hits = fnmatch.filter(names, pattern.replace("[", "[[]"))
        if hits:
            found.append((hits[0] if hits == [pattern.strip("*")] else pattern, value))
    return found


def _last_word(pairs: list[Pair]) -> list[Pair]:
    """Without the rows that a later one for every tensor overrules."""
    start = max((i for i, (pattern, _) in enumerate(pairs) if pattern == "*"), default=0)
    return pairs[start:]


def _says(pairs: list[Pair], wanted: dict, names: Sequence[str]) -> bool:
    """Whether a table gives every tensor the value that mergekit gives it."""
    try:
        got = dict(zip(names, resolve(Table(tuple(pairs)), list(names)), strict=True))
    except RecipeError:
        return False
    return all(abs(got[name] - value) <= 1e-12 * max(1, abs(value)) for name, value in wanted.items())


def _by_name(wanted: dict) -> Iterator[Pair]:
    (most, _), = Counter(wanted.values()).most_common(1)
    yield "*", most
    yield from ((name, value) for name, value in wanted.items() if value != most)

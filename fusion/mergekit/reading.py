"""mergekit's YAML as a Document; whatever looks wrong becomes a note, all at once.

Only what mergekit itself reads is accepted. Unknown keys, which mergekit drops without a word, are named with the nearest key.
Price: YAML nodes instead of plain data, a few times slower than loading, never more than a second for any real file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from fusion.errors import nearest
from fusion.mergekit.catalogue import DTYPES, FORMS, OTHERS
from fusion.mergekit.document import Document, Note, Parameters, Reference, Row, Scalar, Slice, Source, Tokenizer

MAX_CHARACTERS, MAX_NODES = 4_000_000, 200_000
TOP = ("models", "slices", "modules", "merge_method", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
        "tokenizer", "chat_template", "name")
_OTHER_TOOLS = {"experts": "mergekit-moe, which lays dense models side by side as the experts of one",
                "genome": "mergekit-evolve, which searches for weights"}  # its own key → whose file it is
_THEIRS = {*TOP, *_OTHER_TOOLS, "gate_mode"} - {"name", "dtype", "slices"}  # these three a recipe has too
_OURS = {"pivot", "targets", "method", "weights", "options", "overrides", "exclude", "granularity", "measure", "vocabulary",
         "donor", "seed", "revisions", "result"}
_MERGE, _DEEPEST = "tag:yaml.org,2002:merge", 50
_TAGS = ("str", "int", "float", "bool", "timestamp")
_PARAMETERS = {name for form in FORMS.values() for name in form.parameters}.union(*OTHERS.values())


def is_mergekit(text: str) -> bool:
    """Whether a YAML text is a mergekit file rather than a recipe: by its top-level keys, however they are written."""
    keys = _top_keys(text)
    return "fusechat" not in keys and len(keys & _THEIRS) > len(keys & _OURS)


def _top_keys(text: str) -> set[str]:
    """The top-level keys of all documents; where this is no valid YAML also words that begin a line as keys do."""
    import yaml

    keys: set[str] = set()
    level, table, at_key = 0, False, True
    try:
        for event in yaml.parse(text[:MAX_CHARACTERS], Loader=yaml.SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                table, at_key = (isinstance(event, yaml.MappingStartEvent), True) if level == 0 else (table, at_key)
                level += 1
                if level > _DEEPEST:  # no recipe of anybody's; PyYAML's time grows with the square of the depth
                    raise ValueError("nested too deeply")
            elif isinstance(event, yaml.CollectionEndEvent):
                level -= 1
            if level == 1 and table and not isinstance(event, yaml.MappingStartEvent):
                keys |= {event.value} if at_key and isinstance(event, yaml.ScalarEvent) else set()
                at_key = not at_key
    except (yaml.YAMLError, RecursionError, ValueError):
        keys |= set(re.findall(r"""^\s*["']?(\w+)["']?\s*:""", text[:MAX_CHARACTERS], re.M))
    return keys


def read(text: str) -> tuple[tuple[Document, ...], list[Note]]:
    """Read every document of a mergekit file; notes of level error say what cannot be read, and nothing is raised."""
    import yaml

    if len(text) > MAX_CHARACTERS:
        return (), [Note("error", 1, f"the file is longer than {MAX_CHARACTERS // 1_000_000} MB")]
    try:
        roots, shared = _composed(text)
    except RecursionError:
        return (), [Note("error", 1, "nested too deeply")]
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        return (), [Note("error", line, f"not valid YAML: {error.problem or error.context}")]
    except Exception as error:  # the border to PyYAML, which raises a dozen kinds
        return (), [Note("error", 1, f"not valid YAML: {' '.join(str(error).split())[:200]}")]
    reader = _Reader(shared)
    documents = tuple(reader.document(root) for root in roots)
    if not roots:
        reader.note("error", 1, "there is nothing in this file")
    return documents, reader.notes


def _composed(text: str) -> tuple[list, list]:
    """The root node of every document, and the nodes that aliases stand for."""
    import yaml

    shared: list = []

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            alias = self.check_event(yaml.AliasEvent)
            node = super().compose_node(parent, index)
            shared.extend([node] if alias else [])
            return node

    return [node for node in yaml.compose_all(text, Loader=Loader) if node is not None and node.value != ""], shared


class _Full(Exception):
    pass


class _Reader:
    """Walks YAML nodes and gathers notes; a part that cannot be read is left out and noted."""

    def __init__(self, shared: Sequence = ()):
        self.notes: list[Note] = []
        self.nodes = 0
        self.shared = {id(node): node for node in shared}

    def note(self, level: str, line: int, text: str) -> None:
        self.notes.append(Note(level, line, text))

    def document(self, root) -> Document:
        try:
            return self._document(root)
        except _Full:
            self.note("error", _line(root), f"more than {MAX_NODES:,} settings; aliases may repeat them")
            return Document(_line(root))

    def _document(self, root) -> Document:
        tool = self._other_tool(root)
        if tool:
            self.note("error", _line(root), f"this is a file for {tool}; no merge method here does that. Write one with "
                      "merge_method and models")
            return Document(_line(root))
        table = self.table(root, "the file", TOP)
        given = [key for key in ("models", "slices", "modules") if key in table and not _empty(table[key])]
        whole = _kind(root) == "mapping"
        if whole and len(given) != 1:
            self.note("error", _line(table[given[1]]) if given else _line(root),
                      "give exactly one of models, slices and modules" + (f"; here are {' and '.join(given)}" if given else ""))
        if whole and ("merge_method" not in table or _empty(table["merge_method"]) or not table["merge_method"].value):
            self.note("error", _line(table.get("merge_method", root)), "merge_method is missing: say which method merges")
        module, body = self.module(table["modules"]) if given[:1] == ["modules"] else ("", table)
        if "tokenizer" in table and "tokenizer_source" in table:
            self.note("error", _line(table["tokenizer_source"]), "give tokenizer or tokenizer_source, not both")
        models = tuple(self.sources(body["models"], False)) if "models" in body else ()
        slices = tuple(self.slices(body["slices"])) if "slices" in body else ()
        return Document(
            _line(root), self.text(table, "name"), self.text(table, "merge_method"),
            self.reference(table["base_model"]) if "base_model" in table and not _empty(table["base_model"]) else None,
            models, slices if not models else (), module,
            self.parameters(body) if module else {}, self.parameters(table), self.dtype(table, "dtype"),
            self.dtype(table, "out_dtype"), self.tokenizer(table), self.text(table, "chat_template"),
            {key: _line(node) for key, node in table.items()})

    def _other_tool(self, root) -> str:
        """The program of mergekit's that a file without a method is for; "" where it is for none that is known."""
        keys = {str(key.value) for key, _ in self.own(root)} if _kind(root) == "mapping" else set()
        return "" if "merge_method" in keys else next((tool for key, tool in _OTHER_TOOLS.items() if key in keys), "")

    def table(self, node, what: str, known: Sequence[str]) -> dict:
        """The mapping's keys with their value nodes; merge keys spread out, unknown keys noted and left out."""
        if _kind(node) != "mapping":
            self.note("error", _line(node), f"{what} should be a table of settings, not {_shown(node)}")
            return {}
        table, keys = {}, {}
        for key, value in self.own(node):
            name = str(key.value)
            if name in table:
                self.note("warning", _line(key), f"{name} is given twice (first in line {_line(keys[name])}); the last one counts")
            keys[name], table[name] = key, value
        for key, value in self.merged(node):
            keys.setdefault(str(key.value), key)
            table.setdefault(str(key.value), value)
        for name in [name for name in table if known and name not in known]:
            if not self.holds_anchor(keys[name], table[name]):
                self.unknown(name, _line(keys[name]), known, what)
            del table[name]
        return table

    def own(self, node) -> Iterator[tuple]:
        """The keys that stand in a mapping itself."""
        for key, value in node.value:
            self.nodes += 1
            if self.nodes > MAX_NODES:
                raise _Full
            if key.tag != _MERGE:
                yield key, value

    def merged(self, node, above: tuple = ()) -> Iterator[tuple]:
        """The keys that a mapping's merge keys (`<<`) bring, those that win first: they give way to its own keys and to
        those of mappings listed before."""
        for key, value in reversed(node.value):
            for part in (value.value if _kind(value) == "sequence" else [value]) if key.tag == _MERGE else ():
                if _kind(part) != "mapping":
                    self.note("error", _line(key), f"<< takes in tables of settings, not {_shown(part)}")
                elif len(above) == _DEEPEST or any(part is one for one in (node, *above)):
                    self.note("error", _line(key), "<< goes round in a circle, or too deep")
                else:
                    yield from reversed(tuple(self.own(part)))
                    yield from self.merged(part, (node, *above))

    def holds_anchor(self, key, value) -> bool:
        """Whether what a key has is there for aliases elsewhere: some node in it, not itself an alias, is one of theirs."""
        todo, seen = [value], set()
        while todo:
            node = todo.pop()
            if id(node) in seen or node.start_mark.index < key.start_mark.index:  # an alias: its node stands farther up
                continue
            if id(node) in self.shared:
                return True
            seen.add(id(node))
            kind = _kind(node)
            todo += [part for pair in node.value for part in pair] if kind == "mapping" else \
                node.value if kind == "sequence" else []
        return False

    def unknown(self, name: str, line: int, known: Sequence[str], what: str) -> None:
        close = difflib.get_close_matches(name, sorted(_PARAMETERS), n=1, cutoff=0.8) if "parameters" in known else []
        if name in close:
            todo = "It belongs under `parameters:`."
        elif name == "revision" and "model" in known:
            todo = "Write it behind the model: path@revision."
        elif name == "layer_range" and "model" in known:
            todo = "Layer ranges belong to `slices:`; under `models:` every layer is merged."
        else:
            todo = f"Did you mean {close[0]!r}? It belongs under `parameters:`." if close else nearest(name, known)
        self.note("warning", line, f"mergekit knows no {name!r} in {what} and drops it without a word. {todo}")

    def items(self, node, what: str) -> list:
        if _kind(node) != "sequence":
            self.note("error", _line(node), f"{what} should be a list, not {_shown(node)}")
            return []
        self.nodes += len(node.value)
        if self.nodes > MAX_NODES:
            raise _Full
        return node.value

    def scalar(self, node) -> Scalar | None:
        if _kind(node) != "scalar" or _empty(node) or node.tag.removeprefix("tag:yaml.org,2002:") not in _TAGS:
            return None
        if not node.tag.endswith((":bool", ":int", ":float")):
            return node.value
        from yaml.constructor import SafeConstructor

        try:
            return SafeConstructor().construct_object(node) if len(node.value) < 20 or node.tag.endswith(":float") else None
        except ValueError:
            return None

    def text(self, table: dict, key: str) -> str:
        if key not in table or _empty(table[key]):
            return ""
        value = self.scalar(table[key])
        if not isinstance(value, str) or table[key].tag.endswith((":int", ":float")):
            self.note("error", _line(table[key]), f"{key} should be text, not {_shown(table[key])}")
            return ""
        return value

    def dtype(self, table: dict, key: str) -> str:
        name = self.text(table, key).removeprefix("torch.")
        if name and name not in DTYPES:
            self.note("error", _line(table[key]), f"{key}: unknown {name!r}. {nearest(name, DTYPES)}")
            return ""
        return name

    def reference(self, node) -> Reference:
        """A model by its short text or as a table {model, lora, override_architecture}."""
        if _kind(node) == "mapping":
            table = self.table(node, "a model", ("model", "lora", "override_architecture"))
            parts = [self.path(table[key]) for key in ("model", "lora") if key in table and not _empty(table[key])]
            if "model" not in table:
                self.note("error", _line(node), "a model needs its path under `model:`")
            return Reference(_line(node), "+".join(parts), self.text(table, "override_architecture"))
        value = self.scalar(node)
        if not isinstance(value, str) or not value:
            self.note("error", _line(node), f"a model should be a folder or repository, not {_shown(node)}")
            return Reference(_line(node), "")
        parts = value.split("+")
        if len(parts) > 2 or any(part.count("@") > 1 for part in parts) or not all(part.split("@")[0] for part in parts):
            self.note("error", _line(node), f"{value!r} is no model. Write path, path@revision, or path+adapter.")
        return Reference(_line(node), value)

    def path(self, node) -> str:
        if _kind(node) == "mapping":
            table = self.table(node, "a model's path", ("path", "revision"))
            return "@".join(filter(None, (self.text(table, "path"), self.text(table, "revision"))))
        value = self.scalar(node)
        if not isinstance(value, str):
            self.note("error", _line(node), f"a model's path should be text, not {_shown(node)}")
        return str(value)

    def sources(self, node, ranged: bool) -> Iterator[Source]:
        keys = ("model", "layer_range", "parameters") if ranged else ("model", "parameters")
        for item in self.items(node, "sources" if ranged else "models"):
            table = self.table(item, "a source" if ranged else "a model of models", keys)
            if "model" not in table:
                self.note("error", _line(item), "here `model:` is missing")
                continue
            layers = None
            if ranged and "layer_range" not in table:
                self.note("error", _line(item), "a source of a slice needs `layer_range: [first, end]`")
            elif ranged:
                layers = self.layers(table["layer_range"])
            yield Source(_line(item), self.reference(table["model"]), layers, self.parameters(table))

    def layers(self, node) -> tuple[int, int] | None:
        values = [self.scalar(item) for item in self.items(node, "layer_range")]
        if len(values) != 2 or not all(type(value) is int for value in values) or not 0 <= values[0] < values[1] <= 10_000:
            self.note("error", _line(node), "layer_range should be two whole numbers [first, end], first below end; "
                                            "the end itself is not taken")
            return None
        return values[0], values[1]

    def slices(self, node) -> Iterator[Slice]:
        for item in self.items(node, "slices"):
            table = self.table(item, "a slice", ("sources", "base_model", "residual_weight", "parameters"))
            if "sources" not in table:
                self.note("error", _line(item), "a slice needs `sources:`")
                continue
            if "residual_weight" in table:
                self.note("warning", _line(table["residual_weight"]), "residual_weight has no effect in mergekit, and none here")
            base = self.reference(table["base_model"]) if "base_model" in table and not _empty(table["base_model"]) else None
            yield Slice(_line(item), tuple(self.sources(table["sources"], True)), base, self.parameters(table))

    def module(self, node) -> tuple[str, dict]:
        table = self.table(node, "modules", ())
        if len(table) != 1:
            self.note("error", _line(node), f"modules with {len(table)} parts ({', '.join(table)}) cannot be read: only the text "
                                            "model of a checkpoint is merged here, its other towers are carried along")
            return "", {}
        (name, body), = table.items()
        inside = self.table(body, f"module {name}", ("models", "slices", "parameters"))
        if ("models" in inside) == ("slices" in inside):
            self.note("error", _line(body), f"module {name} needs either models or slices")
        return name, inside

    def parameters(self, table: dict) -> Parameters:
        if "parameters" not in table or _empty(table["parameters"]):
            return {}
        found = self.table(table["parameters"], "parameters", ())
        return {name: rows for name, node in found.items() if (rows := tuple(self.rows(name, node)))}

    def rows(self, name: str, node) -> Iterator[Row]:
        items = self.items(node, name) if _kind(node) == "sequence" else [node]
        if not items:
            self.note("error", _line(node), f"{name}: an empty list gives no value")
        if all(_kind(item) == "mapping" for item in items):
            yield from (row for item in items for row in self.condition(name, item))
        elif any(_kind(item) != "scalar" for item in items):
            self.note("error", _line(node), f"{name}: a list holds either plain values or tables with filter and value, not both")
        else:
            yield from self.value(name, node, None)

    def condition(self, name: str, node) -> Iterator[Row]:
        table = self.table(node, f"{name}", ("filter", "value"))
        if "value" not in table:
            self.note("error", _line(node), f"{name}: `value:` is missing beside the filter")
        elif _kind(table["value"]) == "mapping":
            self.note("error", _line(table["value"]), f"{name}: a value is a number or a list of numbers")
        else:
            wanted = None
            if "filter" in table and not _empty(table["filter"]):
                wanted = str(table["filter"].value) if _kind(table["filter"]) == "scalar" else None
                if wanted is None:
                    self.note("error", _line(table["filter"]), f"{name}: a filter is one piece of text")
            yield from self.value(name, table["value"], wanted if wanted not in ("*", "") else None, _line(node))

    def value(self, name: str, node, wanted: str | None, line: int = 0) -> Iterator[Row]:
        gradient = _kind(node) == "sequence"
        values = [self.scalar(item) for item in (node.value if gradient else [node])]
        if not values or any(value is None for value in values):
            self.note("error", _line(node), f"{name}: {_shown(node)} is no value")
        else:
            yield Row(line or _line(node), wanted, tuple(values), gradient)

    def tokenizer(self, table: dict) -> Tokenizer | None:
        if "tokenizer_source" in table and not _empty(table["tokenizer_source"]):
            node = table["tokenizer_source"]
            return Tokenizer(_line(node), self.reference(node).text)
        if "tokenizer" not in table or table["tokenizer"].tag.endswith(":null"):
            return None
        node = table["tokenizer"]
        inside = self.table(node, "tokenizer", ("source", "tokens", "pad_to_multiple_of"))
        tokens = self.table(inside["tokens"], "tokens", ()) if "tokens" in inside and not _empty(inside["tokens"]) else {}
        pad = self.scalar(inside["pad_to_multiple_of"]) if "pad_to_multiple_of" in inside else None
        if pad is not None and (type(pad) is not int or pad < 1):
            self.note("error", _line(inside["pad_to_multiple_of"]), "pad_to_multiple_of should be a whole number above 0")
            pad = None
        return Tokenizer(_line(node), self.reference(inside["source"]).text if "source" in inside else "union", tuple(tokens), pad)


def _line(node) -> int:
    return node.start_mark.line + 1


def _kind(node) -> str:
    return {"MappingNode": "mapping", "SequenceNode": "sequence"}.get(type(node).__name__, "scalar")


def _empty(node) -> bool:
    return node.tag == "tag:yaml.org,2002:null" or (_kind(node) != "scalar" and not node.value)


def _shown(node) -> str:
    if _kind(node) != "scalar":
        return {"mapping": "a table", "sequence": "a list"}[_kind(node)]
    return "nothing" if _empty(node) else repr(str(node.value)[:60])

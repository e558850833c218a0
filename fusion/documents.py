"""Strict YAML: plain data together with the line of every entry, so that whoever refuses an entry can say where it stands.

    documents, problems = read("a: 1\\n---\\nb: 2\\n")
    documents[0].data, documents[1].line(("b",))       # {"a": 1}, 3

Only what a recipe needs is YAML here: tables, lists, text, true and false, decimal numbers (`1e-4` is one). Aliases, tags and
repeated keys are problems, with their lines; an unquoted date, `yes` or `0x1f` is text. Price: PyYAML's slow composer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

MAX_CHARACTERS = 4_000_000
MAX_DOCUMENTS = 100
_WHOLE = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None,
          "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
Problem = tuple[int, str]  # line, what is wrong
Path = tuple  # of keys and list positions, from the document's root


@dataclass(frozen=True)
class Document:
    """One document of a file: its plain `data`, and the line of every entry by its path."""

    data: object
    lines: Mapping[Path, int] = field(default_factory=dict)

    def line(self, path: Path) -> int:
        """The line of an entry, or of the nearest entry that holds it; 0 when the data came from no file."""
        return next((self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), 0)


def read(text: str) -> tuple[list[Document], list[Problem]]:
    """Read all documents of a YAML text; what YAML itself must not hold here comes back as problems, none is raised."""
    if len(text) > MAX_CHARACTERS:
        return [], [(1, f"the file is longer than {MAX_CHARACTERS // 1_000_000} MB")]
    import yaml

    problems: list[Problem] = []
    documents = []
    try:
        loader = _loader()(text)
        loader.problems = problems
        while loader.check_node():
            if len(documents) == MAX_DOCUMENTS:
                return [], [(loader.peek_event().start_mark.line + 1, f"more than {MAX_DOCUMENTS} documents")]
            lines: dict[Path, int] = {}
            documents.append(Document(_data(loader.get_node(), (), lines, problems), lines))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problems.append((_line(error, text), f"not valid YAML: {_reason(error)}"))
    return documents, problems


def write(documents: list[dict]) -> str:
    """Plain data as YAML text that `read` gives back exactly."""
    import yaml

    def dump(readable: bool) -> str:
        return yaml.dump_all(documents, Dumper=_dumper(), sort_keys=False, allow_unicode=readable, width=120)

    text = dump(readable=True)
    return dump(readable=False) if {"\x85", "\u2028", "\u2029"} & set(text) else text  # PyYAML folds these like line ends


def _data(node, path: Path, lines: dict[Path, int], problems: list[Problem]) -> object:
    lines.setdefault(path, node.start_mark.line + 1)
    if node.id == "scalar":
        return _scalar(node, problems)
    if node.id == "sequence":
        return [_data(item, (*path, i), lines, problems) for i, item in enumerate(node.value)]
    table = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.id != "scalar":
            problems.append((line, "a key must be a word"))
        elif key.value in table:
            problems.append((line, f"{key.value!r} is given twice"))
        else:
            lines[(*path, key.value)] = line
            table[key.value] = _data(value, (*path, key.value), lines, problems)
    return table


def _scalar(node, problems: list[Problem]) -> object:
    word = node.value
    if node.style is not None:  # quoted or a block of text
        return word
    if word in _WORDS:
        return _WORDS[word]
    if _WHOLE.fullmatch(word):
        if len(word) <= 20:
            return int(word)
        problems.append((node.start_mark.line + 1, f"a number of {len(word)} digits"))
        return 0
    return float(word.lower().replace(".inf", "inf").replace(".nan", "nan")) if _NUMBER.fullmatch(word) else word


def _line(error: Exception, text: str) -> int:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        return mark.line + 1
    return text.count("\n", 0, getattr(error, "position", 0)) + 1


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    said = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return " ".join(str(said).split())[:400]


@lru_cache(maxsize=1)
def _loader():
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            event = self.peek_event()
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):  # never followed: a few of them can stand for gigabytes
                self.get_event()
                self.problems.append((line, "aliases are not allowed"))
                return yaml.ScalarNode("", "", event.start_mark, event.end_mark)
            if event.tag is not None:
                self.problems.append((line, f"the tag {event.tag[:80]} is not allowed"))
            return super().compose_node(parent, index)

    return Loader


@lru_cache(maxsize=1)
def _dumper():
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data):
            return True

    def numbers_in_one_line(dumper, items):
        flat = all(isinstance(item, (int, float)) for item in items)
        return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flat)

    Dumper.add_representer(list, numbers_in_one_line)
    # text that `read` would take for a number must be quoted, though PyYAML itself would not
    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_NUMBER.pattern})$"), list("-+.0123456789"))
    return Dumper

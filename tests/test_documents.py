"""fusion.documents: strict YAML, with the line of every entry, and nothing of what YAML can hide."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fusion import documents

TEXT = """\
fusechat: 1
options:
  density:
    table:
    - {tensors: '*', value: 0.5}
    - tensors: a
      value: 1
weights: [1,
  2]
---
name: b
"""


def problems(text: str) -> list[str]:
    return [f"{line}: {said}" for line, said in documents.read(text)[1]]


def data(text: str) -> object:
    (document,), found = documents.read(text)
    assert found == []
    return document.data


@pytest.mark.parametrize(("path", "line"), [
    ((), 1), (("fusechat",), 1), (("options",), 2), (("options", "density"), 3), (("options", "density", "table"), 4),
    (("options", "density", "table", 0, "value"), 5), (("options", "density", "table", 1, "value"), 7), (("weights", 0), 8),
    (("weights", 1), 9), (("weights", 5, "curve"), 8), (("nothing",), 1)])
def test_every_entry_has_its_line(path, line):
    first, second = documents.read(TEXT)[0]
    assert first.line(path) == line
    assert second.data == {"name": "b"} and second.line(("name",)) == 11


def test_data_from_no_file_has_no_line():
    assert documents.Document({"a": 1}).line(("a",)) == 0


@pytest.mark.parametrize(("word", "value"), [
    ("1", 1), ("-7", -7), ("+2", 2), ("0.5", .5), (".5", .5), ("1.", 1.0), ("1e-4", 1e-4), ("1E3", 1000.0), ("-1.5e+2", -150.0),
    (".inf", float("inf")), ("-.Inf", float("-inf")), ("true", True), ("False", False), ("~", None), ("null", None), ("", None),
    ("yes", "yes"), ("No", "No"), ("on", "on"), ("2020-01-01", "2020-01-01"), ("1:30", "1:30"), ("0x1f", "0x1f"), ("010", 10),
    ("1_000", "1_000"), ("'1'", "1"), ('"true"', "true"), ("a: 1", {"a": 1}), ("1e400", float("inf")), ("e5", "e5"), (".", "."),
    ("=", "="), ("<<", "<<"), ("|\n  7", "7")])
def test_words_are_what_they_look_like(word, value):
    got = data(f"key: {word}" if ":" not in word or word[0] == "1" else f"key:\n  {word}")["key"]
    assert got == value and type(got) is type(value)


def test_what_is_refused_is_refused_with_its_line_and_all_at_once():
    assert problems("a: &x [1]\nb: *x\nc: !!int 3\nd: 1\nd: 2\n? [1]\n: 2\ne: " + "9" * 21) == [
        "2: aliases are not allowed", "3: the tag tag:yaml.org,2002:int is not allowed", "5: 'd' is given twice",
        "6: a key must be a word", "8: a number of 21 digits"]


@pytest.mark.parametrize(("text", "said"), [
    ("a: 1\nb: [1\nc: 2", "3: not valid YAML: expected ',' or ']', but got ':'"), ("a: 1\n\tb: 2", "2: not valid YAML: "),
    ("a: 1\nb: \0", "2: not valid YAML: special characters are not allowed"), ("[" * 20_000, "it is nested too deeply"),
    ("a: b: c", "1: not valid YAML: mapping values are not allowed here"), ("%YAML 9.9\n---\na: 1", "not valid YAML"),
    ("a" * 4_000_001, "1: the file is longer than 4 MB"), ("a: 'x", "not valid YAML"), ("&a &b x", "not valid YAML")])
def test_what_is_no_yaml_is_said_with_its_line(text, said):
    (only,) = problems(text)
    assert said in only


def test_a_bomb_of_aliases_takes_no_time():
    pairs = zip("abcdefghi", "bcdefghij", strict=True)
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in pairs)
    started = time.perf_counter()
    assert len(problems(bomb)) == 36
    assert time.perf_counter() - started < 1


LETTERS = st.characters(exclude_categories=("Cs",))
NUMBERS = st.integers(-10**18, 10**18) | st.floats(allow_nan=False)
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(LETTERS, max_size=8) | st.from_regex(r"[-+.0-9eE_:]{1,6}", fullmatch=True)
KEYS = st.text(LETTERS, max_size=5)
DATA = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8)


@settings(max_examples=200)
@given(st.lists(st.dictionaries(KEYS, DATA, max_size=4), min_size=1, max_size=3))
@example([{"a": "1e-4", "1e3": "+1", "\x85": "a\u2028b", "": [[], {}, "", None]}])
@example([{"a": ["0x1f", "no", "010", "2020-01-01", "<<", "=", "---", "...", "# a", "&a", "*a", "!a", "~", " 1", "1 "]}])
def test_what_was_written_is_read_again_exactly(parts):
    found, said = documents.read(documents.write(parts))
    assert said == [] and [part.data for part in found] == parts


def test_numbers_stand_in_one_line():
    assert documents.write([{"curve": [0.0, 0.5, 1], "names": ["a", "b"]}]) == "curve: [0.0, 0.5, 1]\nnames:\n- a\n- b\n"

"""Broken and hostile input: every one ends in words and exit status 2, never in a traceback, a hang or a written file."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.__main__ import main
from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError, FusionError, printable
from fusion.merge import merge
from fusion.progress import Progress, finish
from fusion.recipe import Recipe, load_stages
from fusion.tables import table
from tests.conftest import CONFIG, save_checkpoint, save_raw, snapshot, tiny_tokenizer

pytestmark = pytest.mark.timeout(40)  # none may hang

UP, HEAD = "model.layers.0.mlp.up_proj.weight", "lm_head.weight"
TENSORS = {UP: np.ones((2, 4), np.float32), HEAD: np.ones((2, 2), np.float32)}
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00002.safetensors"
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
DEEP = "[" * 100_000


@pytest.fixture(autouse=True)
def little_memory():
    """What would eat all memory fails by itself, not the machine."""
    now, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 3_000_000_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (now, hard))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a sound pivot and a sound target of two shards."""
    folder = tmp_path_factory.mktemp("models")
    for i, name in enumerate(("pivot", "target")):
        save_checkpoint(folder / name, {key: value * i for key, value in TENSORS.items()}, shards=2)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def place(models, tmp_path) -> Path:
    """A copy of the models that a test may break."""
    return Path(shutil.copytree(models, tmp_path / "models"))


def tree(folder: Path) -> dict[str, tuple]:
    """Names, kinds and sizes of everything below a folder; opens nothing, since a pipe would block."""
    return {str(path.relative_to(folder)): (stat.st_mode, stat.st_size if path.is_file() else 0)
            for path in sorted(folder.rglob("*")) if (stat := path.lstat())}


def refused(place: Path, capsys, *argv: str) -> str:
    """The command ends with status 2 and words for people, and writes nothing; returns the words."""
    before = tree(place)
    status = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert status == 2 and err.startswith("error: ") and "Traceback" not in err
    assert not STEERING.search(out + err)
    assert tree(place) == before
    return err


def merged(place: Path, *options: str) -> list[str]:
    return ["merge", str(place / "pivot"), str(place / "target"), "--out", str(place / "out"), *options]


def merged_or_refused(place: Path, capsys) -> None:
    """Merging ends in a folder or in words; what it says steers no terminal."""
    status = main(merged(place))
    out, err = capsys.readouterr()
    assert (status, (place / "out").is_dir()) in ((0, True), (2, False))
    assert not STEERING.search(out + err) and "Traceback" not in err
    assert not [path for path in place.iterdir() if path.name.startswith(".")]
    shutil.rmtree(place / "out", ignore_errors=True)


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────

def raw(header: dict | bytes, data: bytes = bytes(8), length: int | None = None) -> Callable[[Path], None]:
    """One safetensors file with this header in place of the shards."""
    def apply(folder: Path) -> None:
        [path.unlink() for path in folder.glob("*.safetensors*")]
        save_raw(folder, header, data, length)
    return apply


def file(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in the place of a file."""
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)
    return apply


def sparse(nbytes: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, nbytes)
    return make


def to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def index(**weight_map: object) -> Callable[[Path], None]:
    return file(INDEX, json.dumps({"weight_map": weight_map}))


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    # the header
    "header of length 0": (raw(b"", b"", 0), "header is empty"),
    "header of 2**63 bytes": (raw({"a": ENTRY}, length=2**63), "cut short or is no safetensors file"),
    "header longer than the file": (raw({"a": ENTRY}, length=5000), "cut short or is no safetensors file"),
    "header of 99 MB of nothing": (instead(SHARD, lambda path: path.write_bytes((99_000_000).to_bytes(8, "little"))
                                           and os.truncate(path, 99_000_100)), "header is not valid"),
    "header that is not UTF-8": (raw(b'{"\xff": {}}'), "header is not valid"),
    "header nested 10**5 deep": (raw(DEEP.encode()), "header is not valid"),
    "header with objects nested 10**5 deep": (raw(b'{"a":' * 100_000), "header is not valid"),
    "header that is a list": (raw(b"[]"), "not a table of tensors"),
    "header with a number of 5000 digits": (raw(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}"), "not"),
    "name given twice": (raw(b'{"a": 1, "a": 2}'), "a name occurs twice"),
    "name of half a surrogate pair": (raw(b'{"\\ud800": {}}'), "not valid"),
    "tensor that is a number": (raw({"a": 5}), "does not say shape and offsets"),
    "no dtype": (raw({"a": {"shape": [2], "data_offsets": [0, 8]}}), "unknown dtype"),
    "dtype that is a list": (raw({"a": {**ENTRY, "dtype": ["F32"]}}), "unknown dtype"),
    "dtype with escape sequences": (raw({"a": {**ENTRY, "dtype": "\x1b]0;owned\x07\x1b[2J"}}), "unknown dtype"),
    "dtype of 10 MB": (raw({"a": {**ENTRY, "dtype": "F" * 10**7}}), "unknown dtype"),
    "negative shape": (raw({"a": {**ENTRY, "shape": [-2]}}), "does not say shape and offsets"),
    "shape of floats": (raw({"a": {**ENTRY, "shape": [2.0]}}), "does not say shape and offsets"),
    "shape of NaN": (raw(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}'), "does not say shape and offsets"),
    "shape of true": (raw({"a": {**ENTRY, "shape": [True, 2]}}), "does not say shape and offsets"),
    "shape whose product overflows": (raw({"a": {**ENTRY, "shape": [2**62, 2**62, 0, 2]}}), "needs 0 bytes"),
    "shape of a million axes": (raw({"a": {**ENTRY, "shape": [1] * 10**6}}), "does not say shape and offsets"),
    "offsets in reverse": (raw({"a": {**ENTRY, "data_offsets": [8, 0]}}), "the offsets give"),
    "offsets below zero": (raw({"a": {**ENTRY, "data_offsets": [-8, 0]}}), "does not say shape and offsets"),
    "offsets beyond the end": (raw({"a": {**ENTRY, "data_offsets": [10**9, 10**9 + 8]}}), "overlap or leave a gap"),
    "offsets of three": (raw({"a": {**ENTRY, "data_offsets": [0, 8, 16]}}), "the offsets give"),
    "tensors that overlap": (raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)), "overlap or leave a gap"),
    "a gap between tensors": (raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [16, 24]}}, bytes(24)), "overlap or leave a gap"),
    "data after the last tensor": (raw({"a": ENTRY}, bytes(9)), "longer than its header says"),
    "data that is cut": (raw({"a": ENTRY}, bytes(7)), "cut short"),
    "only metadata": (raw({"__metadata__": {"format": "pt"}}, b""), "no tensor"),
    # files that are no files
    "shard that is a pipe": (instead(SHARD, os.mkfifo), "missing"),
    "shard that is a device": (instead(SHARD, to("/dev/zero")), "missing"),
    "shard that is a folder": (instead(SHARD, os.mkdir), "missing"),
    "shard that links to itself": (instead(SHARD, to(SHARD)), "missing"),
    "shard that links nowhere": (instead(SHARD, to("nowhere")), "missing"),
    "shard of no byte": (instead(SHARD, sparse(0)), "cut short or is no safetensors file"),
    "shard of zeros": (instead(SHARD, sparse(10**9)), "header is empty"),
    "shard that is the config": (index(a="config.json"), "cut short or is no safetensors file"),
    "config that is a pipe": (instead("config.json", os.mkfifo), "there is no config.json"),
    "config that is a device": (instead("config.json", to("/dev/zero")), "there is no config.json"),
    "config that is a folder": (instead("config.json", os.mkdir), "there is no config.json"),
    "config that links to itself": (instead("config.json", to("config.json")), "there is no config.json"),
    "index that is a pipe": (instead(INDEX, os.mkfifo), "2 safetensors files without"),
    "index that is a folder": (instead(INDEX, os.mkdir), "2 safetensors files without"),
    # the index
    "index that is a list": (file(INDEX, "[]"), "not a JSON object"),
    "index of no byte": (file(INDEX, ""), "not valid JSON"),
    "index nested 10**5 deep": (file(INDEX, DEEP), "not valid JSON"),
    "index without a map": (file(INDEX, '{"metadata": {}}'), "no valid weight_map"),
    "index of numbers": (index(a=5), "no valid weight_map"),
    "index that leads up": (index(a="../pivot/" + SHARD), "not a plain file name"),
    "index that leads to the root": (index(a="/etc/passwd"), "not a plain file name"),
    "index of a hidden file": (index(a=".."), "not a plain file name"),
    "index with a null character": (index(a="b\0"), "missing"),
    "index with escape sequences": (index(a="\x1b[2J\x9b31m"), "\\x1b[2J\\x9b31m"),
    "index of a name too long": (index(a="b" * 5000), "missing"),
    "index of other tensors": (index(a=SHARD), "not there"),
    "index of one shard only": (index(**{UP: SHARD}), "target"),
    # the config
    "config of no byte": (file("config.json", ""), "not valid JSON"),
    "config that is a list": (file("config.json", "[]"), "not a JSON object"),
    "config that is null": (file("config.json", "null"), "not a JSON object"),
    "config that is binary": (file("config.json", bytes(range(256))), "not valid JSON"),
    "config in UTF-16": (file("config.json", "{}".encode("utf-16")), "not valid JSON"),
    "config nested 10**5 deep": (file("config.json", '{"a":' * 100_000), "not valid JSON"),
    "config of 20 GB": (instead("config.json", sparse(20 * 10**9)), "more than 200 MB"),
    "config with a number of 5000 digits": (file("config.json", '{"vocab_size": ' + "9" * 5000 + "}"), "not valid JSON"),
    "quantisation that is a list": (file("config.json", json.dumps({**CONFIG, "quantization_config": [[1]]})), "quantised"),
    # other weights
    "only a pickle that runs code": (lambda folder: ([path.unlink() for path in folder.glob("*.safetensors*")], (
        folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")), "target"),
    "two checkpoints in one folder": (instead(INDEX, lambda path: None), "2 safetensors files without"),
    "no tokenizer of the pivot's": (file("tokenizer.json", '{"model": {"vocab": {"\x1b[2J": 0}}}'.replace("\x1b", "\\u001b")),
                                    "vocabulary"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_hostile_checkpoint_is_refused_in_words(place, capsys, name):
    damage, words = CHECKPOINTS[name]
    damage(place / "target")
    for argv in (merged(place), ["preflight", place / "pivot", place / "target"], ["variation", place / "pivot", place / "target"]):
        assert words in refused(place, capsys, *argv)
    damage(place / "pivot")
    merged_or_refused(place, capsys)


@pytest.mark.parametrize("architecture", ["\x1b[2J", {"a": 1}, ["a"], 5, None], ids=str)
def test_a_hostile_architecture_is_only_text(place, capsys, architecture):
    with_config(place / "target", architectures=[architecture])
    assert main(["preflight", str(place / "pivot"), str(place / "target")]) == 0  # names and shapes decide
    out, err = capsys.readouterr()
    assert not STEERING.search(out + err)
    assert architecture != "\x1b[2J" or "\\x1b[2J" in out


NAMES = {"leads out of the folder": "../../../etc/passwd",
         "escapes": "\x1b[31m\x1b]52;c;aGk=\x07\r\u202e", "null": "a\0b", "empty": "",
         "megabyte": "x." * 500_000, "slashes": "/" * 1000, "many lines": "a\n" * 100, "a file": "model.safetensors"}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_hostile_name_is_only_text(place, capsys, name):
    raw({name: ENTRY})(place / "pivot")
    assert printable(name)[:40] in refused(place, capsys, *merged(place))
    raw({name: ENTRY})(place / "target")
    merged_or_refused(place, capsys)


JUNK = [None, True, -1, 0, 10**30, 10**400, 1e400, float("nan"), "", "x", "\x1b[2J", [], [[]], [None], {}, {"a": {}}, [{"id": []}]]
CONFIG_FIELDS = ("architectures", "model_type", "vocab_size", "tie_word_embeddings", "text_config", "torch_dtype", "dtype",
                 "quantization_config", "num_attention_heads", "num_hidden_layers", "rope_scaling", "rope_theta", "layer_types",
                 "_name_or_path", "compression_config", "auto_map")


def with_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("value", JUNK, ids=str)
def test_any_value_of_a_config_field_ends_in_words_or_in_none(place, capsys, value):
    sound = (place / "target/config.json").read_text()
    for field in CONFIG_FIELDS:
        for fields in ({field: value}, {"text_config": {field: value}}):
            with_config(place / "target", **fields)
            status = main(["preflight", str(place / "pivot"), str(place / "target")])
            out, err = capsys.readouterr()
            assert status in (0, 2) and not STEERING.search(out + err)
            (place / "target/config.json").write_text(sound)
    for folder in (place / "pivot", place / "target"):
        with_config(folder, **{field: value for field in CONFIG_FIELDS if "quant" not in field and "compress" not in field})
    merged_or_refused(place, capsys)


@pytest.mark.parametrize("value", [*JUNK, {"vocab": 5}, {"vocab": {"a": []}}, {"vocab": {"a": "\x1b[2J"}}, {"vocab": [[]]},
                                   {"vocab": [["a"]]}, {"vocab": [[["a"], 1]]}], ids=str)
def test_any_tokenizer_ends_in_a_merge_or_in_words(place, capsys, value):
    for tokenizer in (value, {"model": value}, {"model": {"vocab": {"a": 0}}, "added_tokens": value},
                      {"model": {"vocab": {"a": 0}}, "added_tokens": [value, {"id": value, "content": value}]}):
        for names in (("target",), ("pivot", "target")):
            [(place / name / "tokenizer.json").write_text(json.dumps(tokenizer)) for name in names]
            merged_or_refused(place, capsys)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
                                  "special_tokens_map.json", "vocab.json"])
@pytest.mark.parametrize("what", ["pipe", "folder", "loop", "device", "zeros", "deep", "binary", "empty"])
def test_any_side_file_ends_in_a_merge_or_in_words(place, capsys, name, what):
    for folder in (place / "pivot", place / "target"):
        path = folder / name
        path.unlink(missing_ok=True)
        {"pipe": os.mkfifo, "folder": os.mkdir, "loop": to(name), "device": to("/dev/zero"), "zeros": sparse(10**7),
         "deep": lambda path: path.write_text('{"a":' * 100_000), "binary": lambda path: path.write_bytes(bytes(range(256)) * 9),
         "empty": lambda path: path.touch()}[what](path)
    merged_or_refused(place, capsys)


def test_a_chat_template_is_only_copied(place):
    bomb = "{% for i in range(10**12) %}{{ cycler.__init__.__globals__.os.system('touch owned') }}{% endfor %}\x1b[2J\0"
    (place / "pivot/chat_template.jinja").write_text(bomb)
    (place / "target/chat_template.jinja").write_text(bomb)
    folder = finish(merge(Recipe(place / "pivot", (place / "target",)), place / "out")).folder
    assert (folder / "chat_template.jinja").read_text() == bomb and not Path("owned").exists()


def test_unreadable_files_are_refused_in_words(place, capsys):
    (place / "target/config.json").chmod(0)
    if os.access(place / "target/config.json", os.R_OK):
        pytest.skip("this user may read everything")
    for name in (SHARD, "config.json", INDEX):
        (place / "target" / name).chmod(0)
        assert "denied" in refused(place, capsys, *merged(place))
        (place / "target" / name).chmod(0o644)
    (place / "target").chmod(0)
    refused(place, capsys, *merged(place))
    (place / "target").chmod(0o755)


@pytest.mark.parametrize("target", ["gone", "a\0b", "a" * 5000, "", "pivot/config.json", "loop", "pipe", "/dev/null", "\x1b[2J"])
def test_what_is_no_folder_is_refused_in_words(place, capsys, target):
    (place / "loop").symlink_to("loop")
    os.mkfifo(place / "pipe")
    refused(place, capsys, "merge", place / "pivot", place / target if target else "", "--out", place / "out")


# ── what reaches the terminal and the card ───────────────────────────────────────────────────────────────────────────

NASTY = "model.\x1b[2J\x1b]52;c;aGk=\x07\r\x9b1m\u202e.weight"


def test_names_of_tensors_steer_no_terminal_and_no_card(tmp_path, capsys):
    folders = [save_checkpoint(tmp_path / name, {NASTY: np.full(4, i, np.float32)}, config={"architectures": ["\x1b[2J"]})
               for i, name in enumerate(("pivot", "a\x1b[2J\x07"))]
    for command in ("preflight", "variation"):
        assert main([command, *map(str, folders)]) == 0
        out, err = capsys.readouterr()
        assert not STEERING.search(out + err) and "\\x1b[2J" in out
    result = finish(merge(Recipe(*folders[:1], tuple(map(str, folders[1:]))), tmp_path / "out"))
    assert not STEERING.search((result.folder / "README.md").read_text())
    assert list(Checkpoint(result.folder)) == [NASTY]  # in the files the names are what they were


def test_control_characters_are_shown_and_text_is_left_alone():
    assert printable(NASTY) == "model.\\x1b[2J\\x1b]52;c;aGk=\\x07\\r\\x9b1m\\u202e.weight"
    assert printable("größer 10 % → \U0001f600\n\tend") == "größer 10 % → \U0001f600\n\tend"
    for text in (str(FusionError(NASTY, where=NASTY, todo=NASTY)), str(Progress("Merging", note=NASTY)), table([""], [[NASTY]])):
        assert not STEERING.search(text) and "\\x1b[2J" in text


# ── the header, mutated ──────────────────────────────────────────────────────────────────────────────────────────────

HEADER = {"__metadata__": {"format": "pt"}, UP: {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
          HEAD: {"dtype": "BF16", "shape": [2, 2], "data_offsets": [32, 40]}}
NUMBERS = st.sampled_from([-1, 0, 1, 2, 8, 31, 32, 33, 40, 41, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, .5, -0.0, 1e300, True, None])
VALUES = NUMBERS | st.lists(NUMBERS, max_size=4) | st.text(max_size=4) | st.sampled_from(
    ["F32", "F64", "BF16", "I8", "BOOL", "F8_E4M3", "U64", "f32", "F32\0", [], {}, [[]], {"dtype": "F32"}, "../x", "\ud800"])
FIELD = st.tuples(st.sampled_from([UP, HEAD, "__metadata__", "new"]), st.sampled_from(["dtype", "shape", "data_offsets", "odd"]),
                  VALUES)
BYTES = st.tuples(st.integers(0, 240), st.sampled_from(["flip", "cut", "insert", "double"]), st.integers(0, 255))


def opens_or_says_why(folder: Path) -> None:
    try:
        with_weights = Checkpoint(folder)
        assert sum(tensor.nbytes for tensor in with_weights.info.values()) <= (folder / "model.safetensors").stat().st_size
        [with_weights.raw(name) for name in with_weights]
    except CheckpointError as error:
        assert str(error) and error.where


@settings(max_examples=150)
@given(changes=st.lists(FIELD, min_size=1, max_size=3), rename=st.sampled_from([None, "", "a\0", "../x", "\x1b", "é" * 99, UP]))
def test_a_header_with_changed_fields_is_read_or_refused(tmp_path_factory, changes, rename):
    header = json.loads(json.dumps(HEADER))
    for name, key, value in changes:
        header.setdefault(name, {})
        header[name] = {**header[name], key: value}
    if rename is not None:
        header[rename] = header.pop(HEAD)
    opens_or_says_why(save_raw(tmp_path_factory.getbasetemp() / "fields", header, bytes(40)))


@settings(max_examples=150)
@given(changes=st.lists(BYTES, min_size=1, max_size=4))
def test_a_file_with_changed_bytes_is_read_or_refused(tmp_path_factory, changes):
    folder = save_raw(tmp_path_factory.getbasetemp() / "bytes", HEADER, bytes(40))
    data = bytearray((folder / "model.safetensors").read_bytes())
    for at, what, value in changes:
        if what == "flip" and at < len(data):
            data[at] ^= value
        elif what == "cut":
            del data[at:at + value]
        else:
            data[at:at] = bytes([value]) if what == "insert" else data[at:at + value]
    (folder / "model.safetensors").write_bytes(data)
    opens_or_says_why(folder)


@settings(max_examples=50)
@given(changes=st.lists(FIELD, min_size=1, max_size=2))
def test_a_target_with_a_changed_header_is_merged_or_refused(tmp_path_factory, changes):
    place = tmp_path_factory.mktemp("mutated")
    header = json.loads(json.dumps(HEADER))
    for name, key, value in changes:
        header[name] = {**header.get(name, {}), key: value}
    save_raw(place / "pivot", HEADER, bytes(40))
    save_raw(place / "target", header, bytes(range(40)))
    try:
        finish(merge(Recipe(place / "pivot", (place / "target",), allow_nonfinite=True), place / "out"))
    except FusionError:
        assert sorted(os.listdir(place)) == ["pivot", "target"]
    else:
        assert sorted(os.listdir(place)) == ["out", "pivot", "target"]


# ── recipes ──────────────────────────────────────────────────────────────────────────────────────────────────────────

HEADLINE = "fusechat: 1\npivot: pivot\ntargets: [target]\n"
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [" + ",".join([f"*a{i - 1}"] * 9) + "]\n" for i in range(1, 12))
RECIPES: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "recipe"), "a comment": ("# hello\n", "recipe"), "a word": ("hello", "table of settings"),
    "a list": ("- a\n- b\n", "table of settings"), "a number": ("5", "table of settings"),
    "null characters": ("fusechat: 1\0\n", "YAML"), "escape sequences": (HEADLINE + "\x1b[2J: 1\n", "YAML"),
    "escape sequences in quotes": (HEADLINE + '"\\x1b[2J": 1\n', "\\x1b[2J"),
    "no UTF-8": (b"fusechat: \xff\n", "read"), "half of UTF-16": (HEADLINE.encode("utf-16")[:-1], "read"),
    "binary": (bytes(range(256)), "read"),
    "tabs": ("fusechat: 1\n\tpivot: a\n", "YAML"), "half a line": ("fusechat: 1\npivot: 'a\n", "YAML"),
    "an alias bomb": (HEADLINE + BOMB, "aliases are not allowed"), "an alias of itself": (HEADLINE + "x: &x [*x]\n", "aliases"),
    "a merge key": (HEADLINE + "x: &x {a: 1}\ny:\n  <<: *x\n", "aliases"),
    "a tag that runs code": (HEADLINE + "x: !!python/object/apply:os.system ['touch owned']\n", "tag"),
    "a tag of a module": ("!!python/module:os\n", "tag"), "a binary tag": (HEADLINE + "x: !!binary aGVsbG8=\n", "tag"),
    "lists nested 10**5 deep": (DEEP, "YAML"), "tables nested 10**5 deep": ("{a: " * 100_000, "YAML"),
    "a number of 5000 digits": (HEADLINE + "seed: " + "9" * 5000, "digits"),
    "a key given twice": (HEADLINE + "pivot: b\n", "twice"),
    "a key that is a list": (HEADLINE + "? [a, b]\n: 1\n", "key"),
    "an unknown key": (HEADLINE + "methd: ties\n", "Did you mean 'method'"),
    "10**5 documents": ("---\n" * 100_000, "more than 100 documents"), "a long line": (HEADLINE + "x" * 5_000_000, "longer than"),
    "no version": ("pivot: a\ntargets: [b]\n", "fusechat"), "another version": ("fusechat: 2\npivot: a\ntargets: [b]\n", "version"),
    "a version that is true": ("fusechat: true\npivot: a\ntargets: [b]\n", "version"),
    "no pivot": ("fusechat: 1\ntargets: [b]\n", "pivot"),
    "a pivot that is a list": ("fusechat: 1\npivot: [a]\ntargets: [b]\n", "text"),
    "no targets": ("fusechat: 1\npivot: a\ntargets: []\n", "at least one"),
    "targets: null": ("fusechat: 1\npivot: a\ntargets:\n", "path"),
    "targets: nested": ("fusechat: 1\npivot: a\ntargets: [[b]]\n", "path"),
    "17 targets": (
        "fusechat: 1\npivot: a\ntargets: [" + ",".join(f"t{i}" for i in range(17)) + "]\n", "too many"),
    "the same target twice": ("fusechat: 1\npivot: a\ntargets: [b, b]\n", "twice"),
    "a target with unknown keys": ("fusechat: 1\npivot: a\ntargets: [{path: b, nmae: c}]\n", "path"),
    "a name that is taken": ("fusechat: 1\npivot: a\ntargets: [{path: b, name: pivot}]\n", "name of its own"),
    "a path with a null character": ('fusechat: 1\npivot: "a\\0b"\ntargets: [target]\n', "folder"),
    "a path too long": (f"fusechat: 1\npivot: {'a' * 9000}\ntargets: [target]\n", "folder"),
    "a path that leads nowhere": ('fusechat: 1\npivot: "../../\\e[2J"\ntargets: [target]\n', "folder"),
    "a path that is a device": ("fusechat: 1\npivot: /dev/zero\ntargets: [target]\n", "folder"),
    "an unknown method": (HEADLINE + "method: tise\n", "unknown 'tise'"),
    "a method that is a list": (HEADLINE + "method: [a]\n", "text"),
    "granularity that is a table": (HEADLINE + "granularity: {a: 1}\n", "text"),
    "weights of NaN": (HEADLINE + "method: linear\nweights: [.nan]\n", "finite"),
    "weights of infinity": (HEADLINE + "method: linear\nweights: [.inf]\n", "finite"),
    "weights of 1e300": (HEADLINE + "method: linear\nweights: [1e300]\n", "finite"),
    "weights below zero": (HEADLINE + "method: linear\nweights: [-1]\n", "sum above 0"),
    "weights that are words": (HEADLINE + "method: linear\nweights: [much]\n", "weights"),
    "weights that are a table": (HEADLINE + "method: linear\nweights: {a: 1}\n", "list"),
    "too many weights": (HEADLINE + "method: linear\nweights: [1, 2, 3]\n", "3 numbers for 1 target"),
    "overrides of nobody": (HEADLINE + "overrides: [{tensors: '*', weights: {x: 1}}]\n", "unknown target"),
    "overrides of NaN": (HEADLINE + "overrides: [{tensors: '*', weights: {target: .nan}}]\n", "from 0 to 1"),
    "overrides that are a number": (HEADLINE + "overrides: 5\n", "overrides"),
    "a pattern that matches nothing": (HEADLINE + "exclude: ['model.lairs.*']\n", "no tensor matches"),
    "a pattern of a megabyte": (HEADLINE + f"exclude: ['{'*?' * 500}[a-']\n", "no tensor matches"),
    "exclude that is a word": (HEADLINE + "exclude: lm_head\n", "list of patterns"),
    "allow_nonfinite: maybe": (HEADLINE + "allow_nonfinite: maybe\n", "true or false"),
    "revisions that are a list": (HEADLINE + "revisions: [a]\n", "revisions"),
    "revisions of other models": (HEADLINE + "revisions: {pivot: '0'}\n", "not the checkpoint"),
    "a donor that is not there": (HEADLINE + "donor: x\n", "unknown 'x'"),
    "a dtype that is none": (HEADLINE + "dtype: float128\n", "dtype"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_hostile_recipe_is_refused_in_words(place, capsys, monkeypatch, name):
    content, words = RECIPES[name]
    (place / "x.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(place)
    err = refused(place, capsys, "merge", "x.yaml", "--out", "out")
    assert words in err and len(err) < 20_000


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, to("/dev/zero"), to("x.yaml"), to("nowhere"), sparse(20 * 10**9)],
                         ids=["folder", "pipe", "device", "loop", "dangling", "20 GB"])
def test_a_recipe_that_is_no_small_file_is_refused_in_words(place, capsys, make):
    make(place / "x.yaml")
    refused(place, capsys, "merge", place / "x.yaml", "--out", place / "out")


WORDS = st.text("abc:{}[]-&*!|>'\"#%@`,? \n\t0.1e\\~<", max_size=40) \
    | st.sampled_from(["fusechat: 1\n", "pivot: a\n", "targets: [b]\n"])


@settings(max_examples=200)
@given(text=st.lists(WORDS, max_size=6).map("".join))
def test_any_text_is_a_recipe_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(text)
    try:
        assert all(isinstance(stage, Recipe) for stage in load_stages(path))
    except FusionError as error:
        assert str(error)


@pytest.mark.parametrize("out", ["pivot", "pivot/config.json", "x\0y", "n" * 300, "pivot/config.json/x", "loop", "\x1b[2J" * 60])
def test_an_output_that_cannot_be_is_refused_in_words(place, capsys, out):
    (place / "loop").symlink_to("loop")
    refused(place, capsys, "merge", place / "pivot", place / "target", "--out", place / out)
    assert snapshot(place / "pivot")

"""Data as people have it: files and folders of all kinds, datasets of the Hub, and why a record is no dialogue."""

from __future__ import annotations

import gzip
import json
import re
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from fusion import CheckpointError, RecipeError
from fusion.distill.dialogues import Dialogue, Report, checked, load, split_long
from fusion.distill.layout import by_name, data_files, files_of
from fusion.evaluate import perplexity
from fusion.pairwise import FuseRecipe
from tests.test_hub import SHA, Hub

TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
GOOD = {"conversations": TALK}
LINES = "".join(f"{json.dumps(GOOD)}\n" for _ in range(2))


def said(text: str) -> dict:
    """A record whose reply is this text."""
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]}


def parquet(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def replies(source: Path, **which) -> list[str]:
    return [dialogue.turns[0][1] for dialogue in load(str(source), **which)[0]]


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl", LINES.encode("utf-8-sig")), ("a.json", json.dumps([GOOD, GOOD]).encode("utf-8-sig")), ("a.json", LINES.encode()),
    ("a.jsonl", json.dumps([GOOD, GOOD], indent=1).encode()), ("a.ndjson", LINES.replace("\n", "\r\n\r\n").encode()),
    ("a.json", json.dumps({"version": 1, "data": [GOOD, GOOD]}).encode()),
    ("a.json", json.dumps({"tags": ["a", "b"], "none": [], "data": [GOOD, GOOD]}).encode()), ("A.JSON", LINES.encode()),
    ("A.JSONL.GZ", gzip.compress(LINES.encode())), ("a.jsonl.gz", gzip.compress(LINES.encode())),
    ("a.json.gz", gzip.compress(json.dumps([GOOD, GOOD]).encode("utf-8-sig"))), ("a.json", b"\n" + LINES.encode("utf-8-sig"))])
def test_files_as_people_have_them(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path / name, tmp_path):
        assert replies(source) == ["Hello"] * 2


def test_messages_may_stand_in_columns(tmp_path):
    parquet(tmp_path / "A.PARQUET", [{"conversations": {"from": ["human", "gpt"], "value": ["Hi", "Hello"]}}] * 2)
    assert replies(tmp_path / "A.PARQUET") == replies(tmp_path) == ["Hello"] * 2
    for uneven in ({"role": ["user", "assistant"], "content": ["Hi"]}, {"role": "user", "content": "Hi"}, {}):
        assert "no messages" in read({"messages": uneven})[1]


def test_parquet_may_be_packed(tmp_path):
    parquet(tmp_path / "a.parquet", [GOOD] * 2)
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    dialogues, report = load(str(tmp_path))
    assert report.kept == 4 and dialogues[2].origin == "b.parquet.gz row 1"


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_a_line_ends_at_a_line_break_and_nowhere_else(tmp_path, sign):
    file, text = tmp_path / "a.jsonl", f"one{sign}two"
    file.write_text("".join(f"{json.dumps(said(text), ensure_ascii=False)}\n" for _ in range(2)), newline="\n")
    assert replies(file) == [text] * 2
    file.write_text("".join(f"{json.dumps({'text': text}, ensure_ascii=False)}\n" for _ in range(2)), newline="\n")
    assert perplexity.read(str(file)).texts == (text,) * 2


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.json", b"[", "JSON"), ("a.jsonl", LINES.encode() + b'{"a":', "line 3"), ("a.json", LINES.encode() + b'{"a":', "line 3"),
    ("a.jsonl", LINES.encode("utf-16"), "not UTF-8"), ("a.jsonl.gz", b"no gzip", "cannot be read"),
    ("a.jsonl.gz", gzip.compress(LINES.encode())[:-20], "cannot be read"), ("a.parquet.gz", gzip.compress(b"no"), "Parquet"),
    ("a.txt.gz", b"no", "cannot be read")])
def test_broken_files_end_in_words(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        perplexity.read(str(tmp_path / name)) if "txt" in name else load(str(tmp_path / name))


def test_texts_may_be_packed_and_in_parquet(tmp_path):
    parquet(tmp_path / "a.parquet", [{"text": "one"}, {"text": "two"}])
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("one\n\ntwo".encode("utf-8-sig")))
    for name in ("a.parquet", "a.txt.gz"):
        assert perplexity.read(str(tmp_path / name)).texts == ("one", "two")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "the whole", **GOOD}))
    assert len(perplexity.read(str(tmp_path / "b.jsonl")).dialogues) == 1


# ── folders and datasets ─────────────────────────────────────────────────────────────────────────────────────────────────

CARD = """---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: english/part-*.jsonl
  - {split: test, path: [english/held/**]}
- config_name: de
  data_files: german.jsonl
---
# A dataset
"""


@pytest.fixture
def clone(tmp_path):
    """A clone of a Hub dataset whose card names subsets and splits."""
    for name in ("english/part-1.jsonl", "english/part-2.jsonl", "english/held/deep/a.jsonl", "german.jsonl", "other.jsonl",
                 "english/part-3/deep.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(said(name)))
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "dataset_infos.json").write_text("{}")
    return tmp_path


def test_a_card_says_which_files_are_a_split(clone):
    assert replies(clone, subset="en") == ["english/part-1.jsonl", "english/part-2.jsonl"]
    assert replies(clone, subset="en", split="test") == ["english/held/deep/a.jsonl"]
    assert replies(clone, subset="de") == ["german.jsonl"]
    for which, words in (({}, "several subsets .en, de.*subset: en"), ({"subset": "fr"}, "no subset 'fr'.*en, de"),
                         ({"subset": "en", "split": "dev"}, "no split 'dev'.*train.*test")):
        with pytest.raises(RecipeError, match=words):
            load(str(clone), **which)
    (clone / "README.md").write_text(CARD.replace("config_name: de", "config_name: default"))
    assert replies(clone) == ["german.jsonl"]
    (clone / "README.md").write_text("---\nconfigs: [\n---\n")  # a card that cannot be read says nothing
    assert len(replies(clone)) == 6


@pytest.mark.parametrize(("names", "splits"), [
    (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test_sft-00000-of-00001-ab12.parquet"],
     {"train": 2, "test_sft": 1}),
    (["train.jsonl", "dev.jsonl", "my_test.jsonl.gz", "readme.json"], {"train": 1, "validation": 1, "test": 1}),
    (["en/training/a.json", "en/valid/a.json"], {"train": 1, "validation": 1}),
    (["a.json", "latest.json", "data-00000-of-00001.json"], {"train": 3})])
def test_names_say_which_files_are_a_split(names, splits):
    assert {split: len(files) for split, files in by_name(names).items()} == splits
    assert len(files_of(names, "no card", "train", "", "here")) == splits["train"]
    with pytest.raises(RecipeError, match=f"no split 'dev'.*{', '.join(splits)}: write `split: {next(iter(splits))}`"):
        files_of(names, "", "dev", "", "here")


@pytest.mark.parametrize("said", ["5", "[3]", "{train: {path: a.json}}", "[{path: 7}]", "true"])
def test_a_card_that_names_no_file_ends_in_words(said):
    with pytest.raises(RecipeError, match="no split 'train'"):
        files_of(["a.json"], f"---\nconfigs:\n- config_name: default\n  data_files: {said}\n---\n", "train", "", "here")


def test_only_files_of_records_are_read():
    assert data_files(["a.json", ".cache/b.json", "dataset_infos.json", "x/state.json", "/etc/c.json", "d.py", "e/f.jsonl.gz"]) == [
        "a.json", "e/f.jsonl.gz"]


def test_a_folder_of_save_to_disk(tmp_path):
    one, other = (datasets.Dataset.from_list([said(text)] * 2) for text in ("one", "other"))
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=other).save_to_disk(tmp_path / "both")
    assert replies(tmp_path / "one") == replies(tmp_path / "both") == ["one"] * 2
    assert replies(tmp_path / "both", split="test") == ["other"] * 2
    for name in ("one", "both"):
        with pytest.raises(RecipeError, match="no split 'dev'"):
            load(str(tmp_path / name), split="dev")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(str(tmp_path / "one"))


class Datasets(Hub):
    """What huggingface_hub asks of a dataset: its facts and its files."""

    def do_GET(self):
        self.log.append((self.path, ""))
        path, folder = self.path.split("?")[0], self.repos["org/data"][SHA]
        if re.fullmatch(r"/api/datasets/org/data/revision/(main|a+)", path):
            names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
            tree = [{"rfilename": name, "size": (folder / name).stat().st_size} for name in names]
            self.answer(200, {"id": "org/data", "sha": SHA, "siblings": tree})
        elif re.fullmatch(r"/api/datasets/org/data/tree/.*", path):
            tree = [{"type": "file", "path": file.relative_to(folder).as_posix(), "size": file.stat().st_size, "oid": "0"}
                    for file in sorted(folder.rglob("*")) if file.is_file()]
            self.answer(200, tree)
        elif found := re.fullmatch(r"/datasets/org/data/resolve/\w+/([\w./-]+)", path):
            self.content(folder / found[1])
        else:
            self.answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})

    def content(self, file: Path):
        data = file.read_bytes()
        self.answer(200, data, {"ETag": f'"{file.stat().st_size}-{file.name}"', "X-Repo-Commit": SHA})


@pytest.fixture
def server(clone, tmp_path_factory, monkeypatch):
    handler = type("Handler", (Datasets,), {"repos": {"org/data": {SHA: clone}}, "log": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        running.log = handler.log
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield running
        running.shutdown()


def test_of_a_dataset_of_the_hub_only_the_split_is_fetched(server, monkeypatch):
    dialogues, _ = load("org/data", subset="en", split="test")
    assert [(its.turns[0][1], its.origin) for its in dialogues] == [
        ("english/held/deep/a.jsonl", "org/data english/held/deep/a.jsonl line 1")]
    fetched = {path.rpartition("/")[2] for path, _ in server.log if "resolve" in path}
    assert fetched == {"README.md", "a.jsonl"}
    assert replies(Path("org/data"), subset="de") == ["german.jsonl"]
    with pytest.raises(RecipeError, match=r"no split 'dev'.*train"):
        load("org/data", subset="en", split="dev")
    with pytest.raises(CheckpointError, match="no such dataset"):
        load("org/other")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(CheckpointError, match="cannot be reached"):  # a part of a dataset in the cache is not taken for the whole
        load(f"org/data@{SHA}", subset="en", split="test")


def test_a_recipe_names_split_and_subset():
    text = "fusechat_fuse: 1\npivot: a\nsources: [b]\ndata: c\nsplit: test\nsubset: en\n"
    recipe = FuseRecipe.from_yaml(text)
    assert (recipe.split, recipe.subset) == ("test", "en") and FuseRecipe.from_yaml(recipe.to_yaml()) == recipe
    assert "split" not in FuseRecipe("a", ("b",), "c").to_yaml()


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

USER, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def read(record: object) -> tuple[Dialogue | None, str]:
    report = Report()
    return checked(record, "here", report), "; ".join(report.reasons)


@pytest.mark.parametrize(("record", "reason"), [
    ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}, {"role": "tool", "content": "4"}, REPLY]},
     "a call of a tool"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}, {"role": "tool", "content": "4"}, REPLY]}, "a call of a tool"),
    ({"messages": [USER, {"role": "tool", "content": "4"}, REPLY]}, "a turn of a tool (role 'tool')"),
    ({"conversations": [TALK[0], {"from": "observation", "value": "4"}, TALK[1]]}, "a turn of a tool (role 'observation')"),
    ({"conversations": [TALK[0], {"from": "narrator", "value": "4"}, TALK[1]]}, "an unknown role 'narrator'"),
    ({"messages": [USER, {"role": None, "content": "x"}]}, "an unknown role 'None'"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "a message without text (null)"),
    ({"messages": [USER, {"role": "assistant"}]}, "a message without text (null)"),
    ({"messages": [USER, {"content": "4"}]}, "an unknown role 'None'"),
    ({"conversations": [TALK[0], {"from": "gpt", "value": 4}]}, "a message whose text is no text, but a number"),
    ({"conversations": [TALK[0], {"from": "gpt", "value": {"a": 1}}]}, "a message whose text is no text, but a table"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, REPLY]}, "no text ('image_url')"),
    ({"messages": [USER, {"role": "assistant", "content": "ok \ud83d"}]}, "half of a surrogate pair"),
    ({"messages": [{"role": "user", "content": "smile \ude00"}, REPLY]}, "half of a surrogate pair"),
    ({"system": "\ud83d", "conversations": TALK}, "half of a surrogate pair"),
    ({"messages": [USER, {**REPLY, "weight": 0}]}, "no reply that is to be learnt"),
    ({"messages": [USER, REPLY, {"role": "system", "content": "x"}, USER, REPLY]}, "a system message that is not the first"),
    ({"instruction": "Add", "output": "4"}, "(its columns: instruction, output)")])
def test_a_record_is_left_out_for_its_true_reason(record, reason):
    dialogue, why = read(record)
    assert dialogue is None and reason in why and (("no messages" in why) == ("instruction" in record))


@pytest.mark.parametrize("parts", [[{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}], ["He", "llo"],
                                   [{"type": "output_text", "text": "Hello"}], "Hello"])
def test_text_in_parts_is_text(parts):
    dialogue, why = read({"messages": [{"role": "User", "content": [{"type": "text", "text": "Hi"}]},
                                       {"role": "assistant", "content": parts}]})
    assert dialogue.turns == (("Hi", "Hello"),) and not why


@pytest.mark.parametrize(("record", "system", "why"), [
    ({"system": "Be brief."}, "Be brief.", ""), ({"system_prompt": " Be brief.\n"}, "Be brief.", ""), ({"system": ""}, "", ""),
    ({"system": None, "system_message": "Be brief."}, "Be brief.", ""), ({"system": 7}, "", "a system prompt that is no text"),
    ({"system": " \n"}, "", ""), ({"system": [{"type": "text", "text": "Be brief."}]}, "Be brief.", ""),
    ({"system": {"a": 1}}, "", "a system prompt that is no text"),
    ({"tools": [{"name": "f"}]}, "", "a list of tools")])
def test_a_system_prompt_may_have_a_column(record, system, why):
    dialogue, found = read({**record, "conversations": TALK})
    assert dialogue.system == system and found.startswith(why) and bool(found) == bool(why)


def test_a_system_message_goes_before_a_column():
    talk = [{"from": "system", "value": "Be kind."}, *TALK]
    assert read({"system": "Be kind.", "conversations": talk})[1] == ""
    dialogue, why = read({"system": "Be brief.", "conversations": talk})
    assert dialogue.system == "Be kind." and "the column was left out" in why
    assert read({"messages": [{"role": "developer", "content": "Be brief"}, USER, REPLY]})[0].system == "Be brief"


@pytest.mark.parametrize(("mark", "unlearnt"), [
    ({"weight": 0}, True), ({"weight": 0.0}, True), ({"train": False}, True), ({"training": "false"}, True), ({"loss": "0"}, True),
    ({"loss_mask": 0}, True), ({"loss_mask": 1}, False),
    ({"weight": 1}, False), ({"train": True}, False), ({"weight": None}, False), ({}, False)])
def test_turns_that_are_read_but_not_learnt(mark, unlearnt):
    dialogue, why = read({"messages": [USER, {**REPLY, **mark}, {**USER, "weight": 0}, REPLY]})
    assert dialogue.unlearnt == ((0,) if unlearnt else ()) and len(dialogue.turns) == 2 and not why


def test_a_cut_keeps_what_is_only_read():
    dialogue = Dialogue((("a", "bb"), ("c", "dd"), ("e", "ff")), "", "x", (0, 2))
    parts = split_long([dialogue], lambda part: 3 * len(part.turns), 6)
    assert [(part.turns, part.unlearnt) for part in parts] == [(dialogue.turns[:2], (0,))]  # nothing of the third is learnt


def test_a_run_ends_in_words_where_no_record_fits(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(said("ok \ud83d")) + "\n" + json.dumps({"text": "no"}))
    with pytest.raises(RecipeError, match="half of a surrogate pair") as found:
        load(str(tmp_path / "a.jsonl"))
    assert "a.jsonl line 2" in str(found.value)

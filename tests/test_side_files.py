"""fusion.side_files: what goes with a merge beside config and weights, and what is told where something does not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fusion import side_files
from fusion.__main__ import main
from fusion.checkpoint import Checkpoint
from fusion.hub import _wanted
from fusion.merge import merge
from fusion.preflight import preflight
from fusion.progress import finish
from fusion.recipe import Recipe
from fusion.verify import verify
from fusion.writer import CheckpointWriter
from tests.conftest import save_checkpoint
from tests.test_vocabulary import byte_level

UP = "model.layers.0.mlp.up_proj.weight"
TOKENIZERS = ("tokenizer.json", "tekken.json", "qwen.tiktoken", "vocab.txt", "sentencepiece.bpe.model", "spiece.model",
              "tokenizer.model", "tokenizer.model.v3", "tiktoken.model", "vocab.json", "merges.txt")
OTHERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
          "additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja", "generation_config.json",
          "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "image_processor_config.json")
NOT = ("README.md", "model.py", "pytorch_model.bin", "additional_chat_templates/x.txt", "other/vocab.txt", "notes.json",
       "../vocab.txt", ".tiktoken", "trainer_state.json")


@pytest.fixture
def pair(tmp_path):
    """Folders of a pivot and a target."""
    return [save_checkpoint(tmp_path / name, {UP: np.full(2, i, np.float32)}) for i, name in enumerate(("pivot", "target"))]


def lay(folder: Path, name: str, text: str = "{}") -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)


def merged(pair: list[Path], out: Path):
    return finish(merge(Recipe(str(pair[0]), (str(pair[1]),), method="linear"), out))


@pytest.mark.parametrize("name", [*TOKENIZERS, *OTHERS])
def test_what_belongs_to_a_model_goes_with_it_and_comes_from_the_hub(pair, tmp_path, name):
    lay(pair[0], name)
    result = merged(pair, tmp_path / "out")
    assert (result.folder / name).read_text() == "{}" and side_files.is_side_file(name) and _wanted(name)
    assert any("no tokenizer files" in text for text in result.warnings) == (name not in TOKENIZERS)
    assert finish(verify(result.folder)).equal


def test_nothing_else_goes_with_it(pair, tmp_path):
    for name in set(NOT) - {"../vocab.txt"}:
        lay(pair[0], name)
    (pair[0] / "vocab.txt").mkdir()  # no file
    folder = merged(pair, tmp_path / "out").folder
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md", "fusechat_recipe.yaml"}
    assert not any(map(side_files.is_side_file, NOT))


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer.json", "additional_chat_templates/tool_use.jinja"])
def test_a_link_out_of_the_folder_is_not_followed_and_told(pair, tmp_path, name):
    (tmp_path / "secret").write_text('{"model": {"vocab": {}}}')
    (pair[0] / "additional_chat_templates").mkdir()
    (pair[0] / name).symlink_to(tmp_path / "secret")
    lay(pair[0], "inside.json")
    (pair[0] / "generation_config.json").symlink_to("inside.json")
    result = merged(pair, tmp_path / "out")
    assert not os.path.lexists(result.folder / name) and (result.folder / "generation_config.json").read_text() == "{}"
    assert any(text.startswith(f"pivot: {name} is a link that leads out of the folder") for text in result.warnings)


def test_a_folder_of_templates_that_leads_elsewhere_is_not_followed(pair, tmp_path):
    lay(tmp_path / "elsewhere", "x.jinja")
    (pair[0] / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    result = merged(pair, tmp_path / "out")
    assert not (result.folder / "additional_chat_templates").exists() and "x.jinja is a link" in "".join(result.warnings)


def test_the_hubs_cache_keeps_contents_beside_its_folders(tmp_path):
    repo = tmp_path / "models--org--name"
    folder = save_checkpoint(repo / "snapshots/abc", {UP: np.zeros(2, np.float32)})
    lay(repo, "blobs/1")
    (tmp_path / "other").write_text("{}")
    for name, target in (("tokenizer.json", "../../blobs/1"), ("merges.txt", "../../../other")):
        (folder / name).symlink_to(target)
    assert list(side_files.copied(Checkpoint(folder))) == ["tokenizer.json"]


def test_sizes_and_numbers_are_bounded(pair, monkeypatch):
    monkeypatch.setattr(side_files, "MAX_BYTES", 10)
    monkeypatch.setattr(side_files, "MAX_FILES", 3)
    lay(pair[0], "tokenizer.json", "x" * 11)
    for i in range(5):
        lay(pair[0], f"additional_chat_templates/{i}.jinja")
    model = Checkpoint(pair[0])
    assert list(side_files.copied(model)) == [f"additional_chat_templates/{i}.jinja" for i in range(2)]
    assert "tokenizer.json has more than" in side_files.left_out(model, {})[0]


@pytest.mark.parametrize(("file", "auto_map", "named"), [
    ("config.json", {"AutoConfig": "configuration_x.C", "AutoModel": "modeling_x.M"}, "configuration_x.py, modeling_x.py"),
    ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_x.Slow", None]}, "tokenization_x.py"),
    ("preprocessor_config.json", {"AutoProcessor": "processing_x.P"}, "processing_x.py"),
    ("config.json", {"AutoConfig": "org/repo--configuration_x.C"}, None),  # lies on the Hub
    ("config.json", {"AutoConfig": "../../etc/x.C", "other": 3}, None), ("config.json", ["x.C"], None)])
def test_code_is_never_copied_and_named(pair, tmp_path, capsys, file, auto_map, named):
    known = json.loads((pair[0] / file).read_text()) if (pair[0] / file).exists() else {}
    lay(pair[0], file, json.dumps({**known, "auto_map": auto_map}))
    for name in ("configuration_x.py", "tokenization_x.py"):
        lay(pair[0], name, "raise SystemExit('this must not run')\n")
    assert main(["merge", *map(str, pair), "--method", "linear", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.py")) and ("name code" in said) == bool(named) and (named or "") in said


def test_it_is_told_before_the_merge_too(pair):
    pivot, target = map(Checkpoint, pair)
    lay(pair[1], "tokenizer.json")
    assert any("no tokenizer files" in text for text in preflight(pivot, [target]).warnings)
    assert not any("no tokenizer files" in text for text in preflight(pivot, [target], donor=target).warnings)


@pytest.mark.parametrize(("config", "wanted"), [("a string", "a string"), (
    [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"), ([{"name": "rag", "template": "r"}], None)])
def test_a_donors_template_comes_along_though_its_tokens_do_not(tmp_path, config, wanted):
    pair = []
    for name, word in (("pivot", "ab"), ("target", "cd")):
        tokenizer = byte_level(word)
        rows = tokenizer.get_vocab_size()
        pair.append(save_checkpoint(tmp_path / name, {"model.embed_tokens.weight": np.ones((rows, 2), np.float32)},
                                    config={"vocab_size": rows, "tie_word_embeddings": True}))
        tokenizer.save(str(pair[-1] / "tokenizer.json"))
    lay(pair[1], "tokenizer_config.json", json.dumps({"chat_template": config}))
    recipe = Recipe(str(pair[0]), (str(pair[1]),), method="linear", vocabulary="union", donor="target")
    folder = finish(merge(recipe, tmp_path / "out")).folder
    assert Checkpoint(folder).chat_template == wanted and not (folder / "tokenizer_config.json").exists()


def test_what_a_killed_merge_left_in_folders_is_removed(tmp_path):
    with CheckpointWriter(tmp_path / "out", [("a", "F32", (1,))]) as writer:
        lay(writer.folder, "old/x.jinja")
        writer.write("a", 0, np.ones(1, np.float32))
        writer.write_file("new/x.jinja", "n")
        writer.finish()
    assert (tmp_path / "out/new/x.jinja").read_text() == "n" and not (tmp_path / "out/old").exists()

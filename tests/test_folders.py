"""Which models a folder offers: plain ones, the Hugging Face cache with its links, adapters; and what is said without any."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.folders import cached_name, models_in, nothing_in
from components.models import build
from components.studio import Studio
from fusion import FusionError, demo

PIVOT = demo.FOLDER / "pivot"
COMMITS = ["0123456789" * 4, "abcdef0123" * 4]


def cached(hub: Path, repo: str, *commits: str, refs: dict[str, str] | None = None, outside: Path | None = None) -> Path:
    """A repository of the cache: files are links into its blobs, the config of one `outside` leads elsewhere."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True)
    for file in PIVOT.iterdir():
        os.link(file, folder / "blobs" / f"b-{file.name}") if file.stat().st_dev == hub.stat().st_dev else shutil.copy(
            file, folder / "blobs" / f"b-{file.name}")
    for commit in commits:
        (folder / "snapshots" / commit).mkdir(parents=True)
        for file in PIVOT.iterdir():
            (folder / "snapshots" / commit / file.name).symlink_to(f"../../blobs/b-{file.name}")
        if outside:
            (folder / "snapshots" / commit / "generation_config.json").unlink(missing_ok=True)
            (folder / "snapshots" / commit / "generation_config.json").symlink_to(outside)
    for name, commit in (refs or {}).items():
        (folder / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / name).write_text(commit)
    return folder


def titles(studio: Studio) -> list[str]:
    return [entry.title for entry in studio.entries() if not entry.key.startswith("demo")]


@pytest.mark.parametrize("above", ["", "hub", "huggingface/hub"])
def test_the_cache_is_offered_by_the_names_of_the_hub(tmp_path, above):
    hub = tmp_path / "root" / above
    hub.mkdir(parents=True)
    cached(hub, "me/tiny", COMMITS[0])
    cached(hub, "gpt2", COMMITS[0])
    cached(hub, "me/two", *COMMITS, refs={"main": COMMITS[0], "pr/1": COMMITS[1]})
    cached(hub, "me/older", *COMMITS, refs={"main": COMMITS[1]})
    (hub / "datasets--me--data" / "snapshots" / COMMITS[0]).mkdir(parents=True)
    assert sorted(found.name for found in models_in(tmp_path / "root")) == [
        "gpt2", "me/older", "me/older@0123456", "me/tiny", "me/two", "me/two@pr/1"]
    studio = Studio(tmp_path / "root", tmp_path / "outputs")
    entry = next(entry for entry in studio.entries() if entry.title == "me/two")
    assert entry.folder.name == COMMITS[0] and studio.checkpoint(entry.key).name == "me/two"
    assert studio.nothing == ""


def test_links_lead_nowhere_else(tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    cached(tmp_path, "me/good", COMMITS[0])
    cached(tmp_path, "me/bad", COMMITS[0], outside=tmp_path / "secret.json")
    gone = cached(tmp_path, "me/gone", COMMITS[0])
    (gone / "blobs" / "b-model.safetensors").unlink()
    foreign = cached(tmp_path, "me/foreign", COMMITS[0])
    (foreign / "snapshots" / COMMITS[1]).symlink_to(PIVOT)
    settings = cached(tmp_path, "me/settings", COMMITS[0])
    (settings / "snapshots" / COMMITS[0] / "model.safetensors").unlink()
    assert [found.name for found in models_in(tmp_path)] == ["me/foreign", "me/good"]


def test_a_snapshot_and_a_single_model_are_called_by_their_names(tmp_path):
    folder = cached(tmp_path / "hub", "me/tiny", COMMITS[0]) if (tmp_path / "hub").mkdir() is None else None
    snapshot = folder / "snapshots" / COMMITS[0]
    assert cached_name(snapshot) == "me/tiny" and cached_name(PIVOT) == ""
    assert [found.name for found in models_in(folder)] == [found.name for found in models_in(snapshot)] == ["me/tiny"]
    assert Studio(None, tmp_path / "outputs").add_folder(str(snapshot)).title == "me/tiny"
    shutil.copytree(PIVOT, tmp_path / "models" / "lmstudio-community" / "tiny")
    assert titles(Studio(tmp_path / "models", tmp_path / "outputs")) == ["lmstudio-community/tiny"]


@pytest.mark.parametrize(("file", "said"), [
    (None, "No model was found"), ("a/b/model.gguf", "GGUF files cannot be merged"),
    ("a/adapter_config.json", "adapters need a base"), ("a/b/c/config.json", "No model was found")])
def test_a_folder_without_models_says_so(tmp_path, file, said):
    root = tmp_path / "root"
    (root / (file or "x")).parent.mkdir(parents=True)
    if file:
        (root / file).write_text("{}")
    studio = Studio(root, tmp_path / "outputs")
    assert said in studio.nothing and said in nothing_in(root) and str(tmp_path) not in studio.nothing
    import gradio as gr

    with gr.Blocks() as page:
        build(studio, gr.State(studio.first_selection()))
    assert any(said in str(block.value) for block in page.blocks.values() if isinstance(block, gr.HTML))
    assert "no such folder" in nothing_in(tmp_path / "none")


# ── Open a folder ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def adapter(tmp_path) -> Path:
    """LoRA of rank 1 on one matrix of the pivot, made for a base that each test names."""
    folder = tmp_path / "my-lora"
    folder.mkdir()
    tensors = load_file(PIVOT / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    rows, columns = tensors[name].shape
    own = f"base_model.model.{name.removesuffix('.weight')}"
    save_file({f"{own}.lora_A.weight": torch.ones(1, columns), f"{own}.lora_B.weight": torch.ones(rows, 1)},
              folder / "adapter_model.safetensors")
    made_for(folder, str(PIVOT))
    return folder


def made_for(folder: Path, base: str | None) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], "base_model_name_or_path": base}))


def test_an_adapter_is_taken_with_the_base_that_it_names(tmp_path, adapter):
    studio = Studio(None, tmp_path / "outputs")
    entry = studio.add_folder(str(adapter))
    assert entry.title == "Pivot+my-lora" and studio.add_folder(f"{PIVOT}+{adapter}") == entry
    adapted, base = studio.checkpoint(entry.key), studio.checkpoint("demo/pivot")
    assert sum((adapted[name] != base[name]).any() for name in base) == 1
    assert studio.folder_name(entry.key).endswith(f"+{adapter}")
    assert studio.named(studio.folder_name(entry.key)) == entry
    with studio.chat_model(entry.key, studio.first_selection()) as model:
        assert model.name == "Pivot+my-lora" and model.nbytes > 0
    shutil.rmtree(adapter)
    with pytest.raises(FusionError, match="was removed"):
        studio.checkpoint(entry.key)


@pytest.mark.parametrize("base", ["org/not-here", None, "../elsewhere"])
def test_an_adapter_without_its_base_says_what_to_type(tmp_path, adapter, base):
    made_for(adapter, base)
    with pytest.raises(FusionError, match=r"holds an adapter.*Type BASE\+ADAPTER"):
        Studio(None, tmp_path / "outputs").add_folder(str(adapter))


def test_a_base_beside_it_or_in_the_menus_is_found(tmp_path, adapter):
    (tmp_path / "base").symlink_to(PIVOT)
    made_for(adapter, "base")
    assert Studio(None, tmp_path / "outputs").add_folder(str(adapter)).title == "Pivot+my-lora"
    shutil.copytree(PIVOT, tmp_path / "models" / "org" / "name")
    made_for(adapter, "org/name")
    assert Studio(tmp_path / "models", tmp_path / "outputs").add_folder(str(adapter)).title == "org/name+my-lora"


def test_pickled_weights_are_taken_and_nonsense_is_refused_in_words(tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(PIVOT, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(PIVOT / "model.safetensors"), folder / "pytorch_model.bin")
    studio = Studio(None, tmp_path / "outputs")
    entry = studio.add_folder(str(folder))
    name = next(iter(studio.checkpoint("demo/pivot")))
    assert studio.checkpoint(entry.key).raw(name) == studio.checkpoint("demo/pivot").raw(name)
    for text in ("", "org/name", f"{PIVOT}+org/name", "x+", str(tmp_path), "a\0b"):
        with pytest.raises(FusionError) as caught:
            studio.add_folder(text)
        assert "open_checkpoint" not in str(caught.value)
    with pytest.raises(FusionError, match="public"):
        Studio(None, tmp_path / "outputs", public=True).add_folder(str(folder))

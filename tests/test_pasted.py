"""A text pasted into the page opens no model that is not in the catalogue and asks nobody, whatever way it names one."""

from __future__ import annotations

import sys

import pytest

from components.page import build
from components.studio import Studio
from fusion import demo
from tests.browser import two_targets
from tests.conftest import save_family
from tests.test_adapters import pair, save_adapter

_WATCHED: list = [None]  # the folder whose files are watched; an audit hook stays for good


def _note(event: str, args: tuple) -> None:
    if event in ("open", "os.listdir", "os.scandir") and _WATCHED[0] and str(args[0]).startswith(_WATCHED[0][0]):
        _WATCHED[0][1].append((event, str(args[0])))


sys.addaudithook(_note)


@pytest.fixture
def foreign(tmp_path):
    """A checkpoint and an adapter on the server's disk that no page offers, and what of them is opened."""
    folder = save_family(tmp_path / "private", "llama")[0]
    save_adapter(tmp_path / "private" / "lora", pair())
    opened: list = []
    _WATCHED[0] = (str(tmp_path / "private"), opened)
    yield folder, tmp_path / "private" / "lora", opened
    _WATCHED[0] = None


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The handler behind "Load a recipe": a public page's and that of a page for its owner."""
    made = {}
    for name, public in (("public", True), ("local", False)):
        studio = two_targets(Studio(outputs=tmp_path_factory.mktemp(name) / "outputs", public=public))
        load = next(each.fn for each in build(studio).fns.values() if each.api_name == "load_recipe")
        made[name] = lambda text, load=load, studio=studio: load(text, studio.first_selection())
    return made


PIVOT, A, B = (demo.FOLDER / name for name in ("pivot", "target-qwen", "target-neox"))
FORMS = {  # X: the model that is not offered
    "mergekit base": "merge_method: linear\nbase_model: X\nmodels: [{model: %A}, {model: %B}]\nparameters: {weight: 1}\n",
    "mergekit model": "merge_method: ties\nbase_model: %P\nmodels: [{model: X}, {model: %B}]\nparameters: {weight: 1}\n",
    "mergekit filter": "merge_method: linear\nbase_model: X\nmodels: [{model: %A}]\n"
                       "parameters: {weight: [{filter: no, value: 1}]}\n",
    "mergekit slices": "merge_method: passthrough\nslices:\n- sources: [{model: X, layer_range: [0, 2]}]\n"
                       "- sources: [{model: %A, layer_range: [1, 3]}]\n",
    "mergekit whole slice": "merge_method: karcher\nslices:\n"
                            "- sources: [{model: %A, layer_range: [0, 4]}, {model: X, layer_range: [0, 4]}]\n",
    "mergekit tokenizer": "merge_method: linear\nmodels: [{model: %A}, {model: %B}]\nparameters: {weight: 1}\n"
                          "tokenizer_source: X\n",
    "mergekit tokens": "merge_method: linear\nmodels: [{model: %A}, {model: %B}]\nparameters: {weight: 1}\n"
                       "tokenizer: {source: union, tokens: {<s>: {source: X, force: true}}}\n",
    "mergekit stages": "name: one\nmerge_method: linear\nbase_model: X\nmodels: [{model: %A}]\nparameters: {weight: 1}\n---\n"
                       "merge_method: ties\nbase_model: %P\nmodels: [{model: one}]\nparameters: {weight: 1}\n",
    "mergekit moe": "base_model: X\ngate_mode: random\nexperts: [{source_model: %A, positive_prompts: [a]}]\n",
    "recipe pivot": "pivot: X\ntargets: {a: %A, b: %B}\n",
    "recipe target": "pivot: %P\ntargets: {a: X, b: %B}\n",
    "recipe donor": "pivot: %P\ntargets: {a: %A, b: X}\ndonor: b\n",
    "recipe stages": "name: one\npivot: X\ntargets: {a: %A}\n---\npivot: one\ntargets: {b: %B}\n",
}


def references(folder, lora) -> list[str]:
    """Ways to write a model that a page does not offer."""
    hub = ["evilorg/repo", "evilorg/repo@refs/pr/1", f"{PIVOT}+evilorg/repo", f"{PIVOT}+evilorg/repo@main",
           f"{PIVOT}@main+evilorg/repo", "evilorg/repo+evilorg/lora", f"{{model: {PIVOT}, lora: evilorg/repo}}",
           "{model: {path: evilorg/repo, revision: v1}, lora: {path: evilorg/lora}}", "{model: evilorg/repo}"]
    return [*hub, str(folder), f"{PIVOT}+{lora}", f"{folder}+{lora}", f"{{model: {PIVOT}, lora: {lora}}}",
            f"{folder}/../{folder.name}", f"file://{folder}", "/etc", '"a\\0b"', "~root"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("page", ["public", "local"])
def test_a_pasted_text_opens_nothing_that_the_page_does_not_offer(page, form, pages, foreign, hub_log):
    *private, opened = foreign
    text = FORMS[form].replace("%P", str(PIVOT)).replace("%A", str(A)).replace("%B", str(B))
    for reference in references(*private):
        selection, _, said = pages[page](text.replace("X", reference))
        assert hub_log == [], reference
        if page == "public":  # the owner's own folders may be named on the owner's page
            assert opened == [], reference
            assert isinstance(selection, dict) and "no value for" not in said, reference  # refused, and no tensor is named
        assert not any(name.endswith((".bin", "adapter_model.safetensors")) for _, name in opened), reference


def test_what_is_offered_is_read_from_its_own_header(pages, hub_log):
    """The whole of every model is its whole: with the names of the catalogue's own checkpoint slices are left out."""
    text = FORMS["mergekit whole slice"].replace("X", str(B)).replace("%A", str(A))
    selection, settings, _ = pages["public"](text)
    assert len(selection.targets) == 2 and settings.slices == () and hub_log == []

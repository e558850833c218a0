"""The house: who may import whom, what is pure, what lies where."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusion

ROOT = Path(__file__).parent.parent
LEVELS = (  # from the roof down: a module imports lower rows, and in its own row only what stands left of it
    ("__main__",),
    ("commands",),
    ("chat", "merge", "stages", "live", "verify", "cluster", "review", "compare", "train", "pairwise", "arena", "evaluate", "demo"),
    ("settings", "recipe_yaml", "recipe_rules", "recipe", "mergekit", "weights", "slices", "checkpoint_stack", "plan", "card",
     "distill"),
    ("compatibility", "preflight", "variation", "inspection", "writer"),
    ("dtypes", "compiled", "maps", "header", "journal", "shards", "anatomy", "naming", "files", "quantised", "checkpoint", "digest",
     "blocks", "view", "alike", "side_files", "configs", "pickles", "adapter_settings", "adapter_parts", "adapter_files",
     "adapters", "hub", "sources", "loading", "tables", "documents", "endpoint", "methods", "align", "tokens", "vocabulary",
     "untied", "template"),
    ("caching", "errors", "progress", "threads", "version"),
)
RANK = {module: (-row, column) for row, modules in enumerate(LEVELS) for column, module in enumerate(modules)}
TOP = {"app.py", "fusion", "components", "assets", "tests", "requirements.txt", "README.md", "CHANGELOG.md", "pyproject.toml",
       "LICENSE"}
NEWER = {"tomllib", "datetime.UTC", "enum.StrEnum", "typing.Self", "typing.Never", "typing.assert_never", "typing.override",
         "typing.Unpack", "itertools.batched", "contextlib.chdir", "hashlib.file_digest"}  # not yet in Python 3.10
PURE = ("fusion/methods", "fusion/align")
SOURCES = sorted(path for folder in ("fusion", "components", "tests") for path in (ROOT / folder).rglob("*.py"))
HOUSE = [path for path in SOURCES if path.is_relative_to(ROOT / "fusion") or path.is_relative_to(ROOT / "components")]


def dotted(path: Path) -> list[str]:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, relative imports resolved; `from a import b` gives a.b."""
    package = dotted(path) if path.name == "__init__.py" else dotted(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            yield from (".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names)


def inside_fusion(path: Path) -> Iterator[str]:
    """The modules of fusion that a file of fusion imports, by their first name."""
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "fusion" and len(parts) > 1:
            yield parts[1]


@pytest.mark.parametrize("path", HOUSE, ids=lambda path: ".".join(dotted(path)))
def test_imports_point_downwards(path):
    module = dotted(path)
    if module[0] == "components":
        assert not [name for name in imports(path) if name.split(".")[0] == "app"]
        return
    assert not [name for name in imports(path) if name.split(".")[0] in ("components", "app", "gradio")]
    if module == ["fusion"]:
        return
    assert module[1] in RANK, f"fusion.{module[1]} has no level yet: write it into LEVELS"
    rank = RANK[module[1]]
    upwards = [name for name in inside_fusion(path) if name != module[1]
               and not (RANK[name][0] < rank[0] or (RANK[name][0] == rank[0] and RANK[name][1] < rank[1]))]
    assert not upwards


def test_a_wrong_import_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "fusion/chat").mkdir(parents=True)
    file = tmp_path / "fusion/chat/pool.py"
    file.write_text("from ..merge import merge\nfrom . import model\ndef f():\n    from fusion import live\n")
    assert list(imports(file)) == ["fusion.merge.merge", "fusion.chat.model", "fusion.live"]
    assert list(inside_fusion(file)) == ["merge", "chat", "live"]


@pytest.mark.parametrize("path", [path for path in HOUSE if any(path.is_relative_to(ROOT / folder) for folder in PURE)],
                         ids=lambda path: ".".join(dotted(path)))
def test_methods_know_no_file(path):
    allowed = {"numpy", "torch", "math", "dataclasses", "collections", "typing", "functools", "re", "rapidfuzz", "inspect",
               "__future__", "fusion"}
    assert {name.split(".")[0] for name in imports(path)} <= allowed
    pure = ("fusion.compiled", *(folder.replace("/", ".") for folder in PURE))
    assert not [name for name in imports(path) if name.startswith("fusion.") and not name.startswith(pure)]


def test_nothing_is_called_utils():
    bad = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not [path for path in HOUSE if bad & set(dotted(path))]


def test_the_top_level_is_as_fixed():
    ignored = {"outputs", "__pycache__"}
    assert {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - ignored <= TOP


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: ".".join(dotted(path)))
def test_files_are_python_3_10(path):
    ast.parse(path.read_text(), feature_version=(3, 10))
    assert not NEWER & set(imports(path))


def test_every_public_door_opens():
    assert fusion.__all__ == sorted(fusion.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert all(hasattr(fusion, name) for name in fusion.__all__)

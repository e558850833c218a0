"""The README is true: its front matter, its file map, its commands and its Python."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fusion.plan import MergePlan
from fusion.recipe import load_stages

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MAP = TEXT.split("## File map")[1].split("```")[1]


def test_the_front_matter_is_what_a_space_reads():
    matter = yaml.safe_load(TEXT.split("---")[1])
    assert matter["sdk"] == "gradio" and re.fullmatch(r"\d+\.\d+\.\d+", matter["sdk_version"])
    assert (ROOT / matter["app_file"]).is_file()
    assert len(matter["short_description"]) <= 60
    assert {matter["colorFrom"], matter["colorTo"]} <= {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def mapped() -> set[str]:
    """Paths that the map lists: a line begins with names of files or folders; indented ones lie in the folder above."""
    folder, paths = "", set()
    for line in filter(None, MAP.splitlines()):
        names = re.match(r"\s*((?:[\w.]+(?:/|\.\w+)\s+)+)", line)[1].split()
        if not line.startswith(" "):
            folder = names[0] if names[0].endswith("/") else ""
            paths.add(names[0].rstrip("/"))
        else:
            paths |= {(folder + name).rstrip("/") for name in names}
    return paths


def test_everything_in_the_file_map_exists():
    assert {path for path in mapped() if not (ROOT / path).exists()} == set()


def test_every_module_is_in_the_file_map():
    for folder in ("fusion", "components"):
        for path in (ROOT / folder).iterdir():
            if path.name != "__init__.py" and not path.name.startswith("__pyc"):
                assert f"{folder}/{path.name}" in mapped(), path


def test_linked_files_are_there():
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", TEXT):
        assert (ROOT / target).is_file(), target


def test_the_python_of_the_readme_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)[1].replace("outputs/my-merge", str(tmp_path / "my-merge"))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my-merge" / "model.safetensors").is_file()


def test_the_two_commands_are_on_the_first_screen():
    head = TEXT.split("---", 2)[2][:700]
    assert "pip install -r requirements.txt && python app.py" in head and "bash tests/run.sh" in head


@pytest.mark.parametrize("path", sorted((ROOT / "assets" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_example_recipes_can_be_merged(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = MergePlan.open(load_stages(path)[0])
    assert plan.report.level == "good"

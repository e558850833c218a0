"""The command that evaluates as the page did."""

from __future__ import annotations

import re
import shlex

from components.state import Selection
from components.studio import Studio


def command_line(studio: Studio, keys: tuple[str, ...], now: Selection, reference: str, words: list[str], notes: list[str]) -> str:
    """The CLI command for these models; what it needs before stands above it as remarks."""
    merges = {merge.key: merge.title for merge in now.merges}
    saved = {key: re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") for key, title in merges.items() if key in keys}
    folders = {key: f"./{studio.outputs.name}/{saved[key]}" if key in saved else studio.folder_name(key) for key in keys}
    remarks = [f"# {merges[key]} is only in memory: save it in Merge as {name} first" for key, name in saved.items()]
    baseline = ["--baseline", folders[reference]] if reference in folders and len(keys) > 1 else []
    line = ["python", "-m", "fusion", "evaluate", *folders.values(), *words, *baseline, "--out", "my-evaluation"]
    return "\n".join([*remarks, *(f"# {note}" for note in notes), shlex.join(line)])

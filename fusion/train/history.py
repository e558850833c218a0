"""The loss curve of a training, also while it runs: one line of JSON per logged step beside the unfinished work.

A training that is resumed continues its curve; steps that are done again replace what they said before.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

HISTORY_FILE = "training_history.json"
LIVE_FILE = "training_history.jsonl"


def unfinished_work(out: str | os.PathLike) -> Path:
    """Where a training towards `out` keeps what it needs to be resumed."""
    out = Path(out).absolute()
    return out.parent / f".{out.name}.training"


def history(out: str | os.PathLike) -> tuple[dict, ...]:
    """The losses (step, loss, clm, fusion, learning_rate) of a finished or running training into `out`; () if there are none."""
    finished, live = Path(out) / HISTORY_FILE, unfinished_work(out) / LIVE_FILE
    try:
        return tuple(json.loads(finished.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return tuple(_lines(live))


def earlier(work: Path, last_step: int) -> list[dict]:
    """What a resumed training had said up to `last_step`; what came after it is forgotten on disk too."""
    kept = [line for line in _lines(work / LIVE_FILE) if line["step"] <= last_step]
    (work / LIVE_FILE).write_text("".join(map(_line, kept)), encoding="utf-8")
    return kept


def append(work: Path, entry: dict) -> None:
    """Add one step to the curve on disk."""
    with (work / LIVE_FILE).open("a", encoding="utf-8") as file:
        file.write(_line(entry))


def _line(entry: dict) -> str:
    return json.dumps(entry) + "\n"


def _lines(file: Path) -> list[dict]:
    """The whole lines of a file that somebody may be writing."""
    found = []
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return found
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found

"""An evaluation as files: tables, every answer, a radar chart — in a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fusion.errors import OutputError
from fusion.evaluate.radar import figure, radar
from fusion.evaluate.scores import Scores
from fusion.evaluate.tables import Table
from fusion.shards import disk_error
from fusion.version import VERSION


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation: what was asked (`settings`), its table, the scores behind it, and a record per answer."""

    kind: str
    settings: dict
    table: Table
    scores: Scores | None = None
    records: tuple[dict, ...] = ()
    details: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain data that a page can show; the records are left out."""
        return {"kind": self.kind, "engine": VERSION, "settings": self.settings, "table": self.table.to_dict(),
                "radar": radar(self.table), "details": self.details}


def refuse_existing(out: str | os.PathLike) -> None:
    """OutputError when the folder is there already."""
    if os.path.lexists(out):
        raise OutputError("exists already; nothing is ever overwritten", where=str(out), todo="Choose another folder.")


def write(evaluation: Evaluation, out: str | os.PathLike) -> Path:
    """Write results.json, table.md, table.csv, scores.json, answers.jsonl and radar.html into the new folder `out`.

    OutputError when it exists or cannot be written, ResourceError when the disk is full.
    """
    out = Path(out)
    refuse_existing(out)
    with _hidden(out) as folder:
        for name, text in _files(evaluation):
            (folder / name).write_text(text, encoding="utf-8")
        refuse_existing(out)
        os.rename(folder, out)
    return out


def _files(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    data = evaluation.to_dict()
    yield "results.json", _json(data, indent=1)
    yield "table.md", evaluation.table.markdown()
    yield "table.csv", evaluation.table.csv()
    if evaluation.scores is not None:
        yield "scores.json", _json(evaluation.scores.to_dict())
    if evaluation.records:
        yield "answers.jsonl", "".join(_json(record) for record in evaluation.records)
    if data["radar"]["axes"]:
        yield "radar.html", figure(data["radar"]).to_html(include_plotlyjs=True)


def _json(data: object, indent: int | None = None) -> str:
    return json.dumps(data, ensure_ascii=False, allow_nan=False, indent=indent) + "\n"


def document(evaluation: Evaluation) -> str:
    """Everything as one JSON text: settings, table, radar, and a record per answer."""
    return _json({**evaluation.to_dict(), "answers": list(evaluation.records)}, indent=1)


@contextlib.contextmanager
def _hidden(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, gone at the end unless it was renamed."""
    folder = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        raise disk_error(error, out) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)

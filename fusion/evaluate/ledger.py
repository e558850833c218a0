"""Answers and verdicts as they come in, one JSON line each, so that a run that was killed continues where it stopped."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from fusion.distill.store import write_whole
from fusion.errors import OutputError
from fusion.shards import disk_error

PLAN, LINES = "plan.json", "lines.jsonl"


class Ledger:
    """The hidden folder `.NAME.judging` beside the output, made for one plan (plain data) and locked while it is used.

    A context manager; `remove` it after everything was written elsewhere. OutputError when another plan was begun
    there or another run uses it.
    """

    def __init__(self, out: str | os.PathLike, plan: Mapping[str, object]):
        out = Path(out).absolute()
        self.folder, self.plan = out.parent / f".{out.name}.judging", json.dumps(plan, sort_keys=True, indent=1)
        self.records: dict[str, dict] = {}
        self._adding = threading.Lock()

    def __enter__(self) -> Ledger:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise disk_error(error, self.folder) from error
        try:
            self._take()
            self._lines = self._open()
        except OSError as error:
            os.close(self._lock)
            raise disk_error(error, self.folder) from error
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *exception) -> None:
        with self._adding:
            self._lines.close()
        os.close(self._lock)

    def add(self, key: str, record: Mapping[str, object]) -> None:
        """Keep one record durably under its key; any thread may. What comes after the end is lost."""
        line = json.dumps({"key": key, **record}, ensure_ascii=False) + "\n"
        with self._adding:
            if self._lines.closed:
                return
            try:
                self._lines.write(line.encode("utf-8", "surrogatepass"))
                self._lines.flush()
                os.fsync(self._lines.fileno())
            except OSError as error:
                raise disk_error(error, self.folder, "what was there is kept") from error
            self.records[key] = json.loads(line)

    def remove(self) -> None:
        """Remove the folder; call it when the results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError("another run is judging there", where=str(self.folder), todo="Wait for it.") from error
        file = self.folder / PLAN
        if not file.exists():
            if {path.name for path in self.folder.iterdir()} - {f".{PLAN}.partial"}:
                raise OutputError("is in the way: it holds something else", where=str(self.folder), todo="Move it away.")
            write_whole(file, self.plan.encode())
        elif file.read_text(encoding="utf-8") != self.plan:
            raise OutputError("another judging was begun there: other models, questions, judge or settings",
                              where=str(self.folder), todo="Finish that one, remove the folder, or choose another --out.")

    def _open(self):
        """Open the lines for appending; the half of a line that a killed run left is cut off."""
        file = self.folder / LINES
        content = file.read_bytes() if file.exists() else b""
        whole = content[:content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(file, len(whole))
        try:
            self.records = {(record := json.loads(line))["key"]: record for line in whole.split(b"\n")[:-1]}
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError("what was kept is damaged", where=str(file), todo="Remove the folder to begin again.") from error
        return file.open("ab")

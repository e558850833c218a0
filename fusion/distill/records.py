"""Records out of files: JSON, JSON lines and Parquet, packed with gzip or not, folders of them, and datasets of the Hub."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from fusion import hub
from fusion.distill.layout import ENDINGS, data_files, files_of, no_split
from fusion.errors import CheckpointError

_CARD = "README.md"
_KINDS = "a .json, .jsonl or .parquet file (or one of these as .gz)"


def read_records(source: str, split: str = "train", subset: str = "") -> Iterator[tuple[str, object]]:
    """Every record of a file, a folder or a Hub dataset "org/name[@revision]", with where it comes from.

    A file is one split, whatever it is called. CheckpointError when something cannot be read, RecipeError for a split or subset
    that is not there.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        yield from _folder(path, split, subset, source)
    elif path.exists():
        yield from file_records(path, path.name)
    elif path.name.lower().endswith(ENDINGS) or hub.parse(source) is None:
        raise CheckpointError("there is no such file or folder", where=source, todo=f"Give {_KINDS}.")
    else:
        yield from _of_hub(source, split, subset)


def file_records(path: Path, name: str) -> Iterator[tuple[str, object]]:
    """The records of one file; `name` is what people call it."""
    plain = path.name.lower()
    packed, ending = plain.endswith(".gz"), Path(plain.removesuffix(".gz")).suffix
    try:
        if ending == ".parquet":
            yield from _parquet(gzip.decompress(path.read_bytes()) if packed else path, name)
            return
        with (gzip.open if packed else open)(path, "rb") as stream:
            yield from (_lines if ending in (".jsonl", ".ndjson") else _json)(stream, name)
    except (OSError, EOFError, zlib.error) as error:
        raise CheckpointError(f"cannot be read ({error})", where=str(path)) from error


def _folder(path: Path, split: str, subset: str, source: str) -> Iterator[tuple[str, object]]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        yield from _saved(path, split, source)
        return
    names = data_files(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    if not names:
        raise CheckpointError("there is no .json, .jsonl or .parquet file in it", where=source)
    card = path / _CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    for name in files_of(names, text, split, subset, source):
        yield from file_records(path / name, name)


def _saved(path: Path, split: str, source: str) -> Iterator[tuple[str, object]]:
    """A folder of datasets' `save_to_disk`, which holds one split or several."""
    try:
        import datasets

        found = datasets.load_from_disk(str(path))
    except Exception as error:  # the border to datasets, which raises many kinds
        raise CheckpointError(f"this saved dataset cannot be loaded ({str(error)[:200]})", where=source,
                              todo=f"Give {_KINDS}.") from error
    splits = dict(found) if isinstance(found, dict) else {str(found.split or "train"): found, "train": found}
    if split not in splits:
        raise no_split(split, list(splits), source)
    yield from ((f"{path.name} {split} {number}", record) for number, record in enumerate(splits[split], 1))


def _of_hub(source: str, split: str, subset: str) -> Iterator[tuple[str, object]]:
    """A dataset of the Hub: only the files of the split are fetched."""
    name, revision = hub.parse(source)
    folder, files = hub.dataset(name, revision, _CARD, lambda names, card: _chosen(names, card, split, subset, source))
    for file in files:
        yield from file_records(folder / file, f"{name} {file}")


def _chosen(names: list[str], card: str, split: str, subset: str, source: str) -> list[str]:
    data = data_files(names)
    if not data:
        raise CheckpointError("this dataset has no .json, .jsonl or .parquet file", where=source,
                              todo="Download it yourself and give one of these files.")
    return files_of(data, card, split, subset, source)


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[str, object]]:
    """JSON lines: a line ends at "\\n" and nowhere else. A whole JSON document under such a name is read too."""
    lines = enumerate(stream, 1)
    start = next(((number, line) for number, line in lines if line.strip(b"\xef\xbb\xbf \t\r\n")), None)
    if start is None:
        return
    try:
        first = _parsed(start[1], f"{name} line {start[0]}")
    except CheckpointError:
        try:
            yield from _document(start[1] + stream.read(), name)
        except CheckpointError:
            pass
        else:
            return
        raise
    yield f"{name} line {start[0]}", first
    for number, line in lines:
        if line.strip():
            yield f"{name} line {number}", _parsed(line, f"{name} line {number}")


def _json(stream: BinaryIO, name: str) -> Iterator[tuple[str, object]]:
    """A JSON document, or JSON lines under such a name."""
    content = stream.read()
    first, _, more = content.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")
    if more.strip() and first.startswith(b"{") and _is_json(first):
        yield from _lines(io.BytesIO(content), name)
    else:
        yield from _document(content, name)


def _document(content: bytes, name: str) -> Iterator[tuple[str, object]]:
    """The records of a whole JSON document: its list, or the first list of tables in its table, or the document itself."""
    data = _parsed(content, name)
    lists = [value for key, value in data.items() if isinstance(value, list) and key not in MESSAGES] \
        if isinstance(data, dict) and not any(isinstance(data.get(key), list) for key in MESSAGES) else []
    tables = [its for its in lists if its and all(isinstance(record, (dict, list)) for record in its)]
    records = data if isinstance(data, list) else (tables or lists)[0] if lists else [data]
    yield from ((f"{name} record {number}", record) for number, record in enumerate(records, 1))


MESSAGES = ("messages", "conversations", "conversation", "dialogue")  # where a record may hold its messages


def _is_json(text: bytes) -> bool:
    try:
        _parsed(text, "")
    except CheckpointError:
        return False
    return True


def _parsed(text: bytes, where: str) -> object:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"not UTF-8 text ({error.reason} at byte {error.start})", where=where,
                              todo="Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON ({str(error)[:200]})", where=where) from error


def _parquet(file: Path | bytes, name: str) -> Iterator[tuple[str, object]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise CheckpointError("reading Parquet needs pyarrow", where=name, todo="Run pip install pyarrow.") from error
    try:
        with parquet.ParquetFile(io.BytesIO(file) if isinstance(file, bytes) else file) as rows:
            records = chain.from_iterable(batch.to_pylist() for batch in rows.iter_batches(batch_size=512))
            yield from ((f"{name} row {number}", record) for number, record in enumerate(records, 1))
    except ArrowException as error:
        raise CheckpointError(f"not a sound Parquet file ({str(error)[:200]})", where=name) from error

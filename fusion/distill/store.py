"""What a teacher said, compact on disk: for every label its top-k tokens, their log-probabilities and the gold token's loss.

Shards of a few hundred dialogues, each written whole or not at all, so that a killed run continues at the first missing one.
Numbers per label: k ids (int32), k log-probabilities (float16) and the loss (float32) — about 64 bytes at k = 10.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusion.errors import CheckpointError, OutputError

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Rows:
    """The distributions of one dialogue: `ids`, `logprobs` [L, k] best first, `nats` [L] (the gold token's −log p).

    Log-probabilities are the model's own, over its whole vocabulary: what k of them lack of 1 is the tail. An id of −1 with
    probability 0 fills a place for which nothing is known.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    nats: np.ndarray


class Store:
    """A folder of shards made for one plan (plain data: model, data, k, …); another plan is refused, not mixed in.

    CheckpointError when the folder holds something else, OutputError when it cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, plan: Mapping[str, object], sizes: Sequence[int]):
        self.folder, self.sizes = Path(folder), tuple(sizes)
        self.starts = np.concatenate(([0], np.cumsum(self.sizes))).astype(np.int64)
        wanted = json.dumps({**plan, "sizes": list(self.sizes)}, sort_keys=True, indent=1)
        self.plan_digest = hashlib.sha256(wanted.encode()).hexdigest()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / PLAN_FILE
            if not file.exists():
                if any(self.folder.iterdir()):
                    raise CheckpointError("the folder is not empty and was not made by this program", where=str(self.folder),
                                          todo="Choose an empty folder.")
                write_whole(file, wanted.encode())
            elif file.read_text(encoding="utf-8") != wanted:
                raise CheckpointError("the folder holds the distributions of another model, data or setting",
                                      where=str(self.folder), todo="Choose another folder, or remove this one.")
        except OSError as error:
            raise OutputError(f"cannot be written ({error.strerror})", where=str(self.folder)) from error

    def missing(self) -> list[int]:
        """The numbers of the shards that are not there yet."""
        return [number for number in range(len(self.sizes)) if not self._file(number).exists()]

    def dialogues(self, shard: int) -> range:
        """The numbers of the dialogues of one shard."""
        return range(int(self.starts[shard]), int(self.starts[shard + 1]))

    def write(self, shard: int, rows: Sequence[Rows]) -> None:
        """Write one shard: the rows of its dialogues, in order."""
        from safetensors.numpy import save

        if len(rows) != self.sizes[shard]:
            raise ValueError(f"shard {shard} holds {self.sizes[shard]} dialogues, not {len(rows)}")
        lengths = np.array([len(row.nats) for row in rows], np.int64)
        arrays = {"starts": np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)}
        for field, dtype in (("ids", np.int32), ("logprobs", np.float16), ("nats", np.float32)):
            arrays[field] = np.concatenate([getattr(row, field) for row in rows]).astype(dtype)
        try:
            write_whole(self._file(shard), save(arrays))
        except OSError as error:
            raise OutputError(f"cannot be written ({error.strerror})", where=str(self.folder)) from error

    def read(self, shard: int) -> list[Rows]:
        """The rows of the dialogues of one shard; logprobs as float32."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            arrays = load_file(self._file(shard))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"a shard cannot be read ({str(error)[:200]})", where=str(self._file(shard)),
                                  todo="Remove it; the next run makes it again.") from error
        spans = zip(arrays["starts"][:-1], arrays["starts"][1:], strict=True)
        return [Rows(arrays["ids"][a:b], arrays["logprobs"][a:b].astype(np.float32), arrays["nats"][a:b]) for a, b in spans]

    def __iter__(self) -> Iterator[Rows]:
        for shard in range(len(self.sizes)):
            yield from self.read(shard)

    def _file(self, shard: int) -> Path:
        return self.folder / f"rows-{shard:05}.safetensors"


def data_digest(texts: Sequence[str]) -> str:
    """A mark of the data a store was made from."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}|".encode() + text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def write_whole(file: Path, content: bytes) -> None:
    """Write a small file durably under its name, or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(file)

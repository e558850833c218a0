"""Fused targets on disk, ready to train on: shards that are written whole and read piece by piece.

A run that was killed continues at the first missing shard. Price per label at K entries: 6 K bytes and a choice; reading one
dialogue touches only its own bytes.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fusion.distill.dialogues import Dialogue
from fusion.distill.encoding import Encoder
from fusion.distill.store import PLAN_FILE, Store, write_whole
from fusion.distill.targets import Blend, Vocabulary, end_tokens, fuse_dialogue, pair_counts, vocabulary_table
from fusion.errors import CheckpointError
from fusion.progress import Meter, Work

STATISTICS_FILE = "statistics.json"
_FIELDS = {"ids": np.int32, "labels": np.int32, "target_ids": np.int32, "chances": np.float16, "choice": np.int8}


@dataclass(frozen=True)
class Example:
    """One dialogue to learn: `ids` [T], `labels` [L] positions in it, fused targets `target_ids`, `chances` [L, K]; `choice`
    [L] says whose distribution it is (0 = the pivot's, j = source j's)."""

    ids: np.ndarray
    labels: np.ndarray
    target_ids: np.ndarray
    chances: np.ndarray
    choice: np.ndarray | None = None


@dataclass(frozen=True)
class Knower:
    """A model whose distributions are stored: its `name`, how it cuts dialogues, and what it said."""

    name: str
    encoder: Encoder
    store: Store


class FusedData(Sequence):
    """The fused examples of a folder, read when asked for; CheckpointError when a shard is missing or broken."""

    def __init__(self, folder: str | os.PathLike):
        from safetensors import SafetensorError, safe_open

        self.folder = Path(folder)
        self._files, self._starts = [], [0]
        try:
            plan = json.loads((self.folder / PLAN_FILE).read_text(encoding="utf-8"))
            for shard, size in enumerate(plan["sizes"]):
                self._files.append(safe_open(shard_file(self.folder, shard), framework="np"))
                self._starts.append(self._starts[-1] + size)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"fused targets cannot be read ({str(error)[:200]})", where=str(folder),
                                  todo="Run the fusion stage again.") from error

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, number: int) -> Example:
        number = range(len(self))[number]
        shard = bisect_right(self._starts, number) - 1
        file, at = self._files[shard], number - self._starts[shard]
        tokens, labels = (file.get_slice(name)[at:at + 2] for name in ("token_starts", "label_starts"))
        spans = {"ids": tokens, "labels": labels, "target_ids": labels, "chances": labels, "choice": labels}
        return Example(**{name: file.get_slice(name)[int(a):int(b)] for name, (a, b) in spans.items()})


def shard_file(folder: Path, shard: int) -> Path:
    """The file of one shard."""
    return folder / f"fused-{shard:05}.safetensors"


def build(dialogues: Sequence[Dialogue], pivot: Knower, sources: Sequence[Knower], folder: str | os.PathLike,
          blend: Blend) -> Work[FusedData]:
    """Align and fuse the stored distributions of pivot and sources into `folder`; yields Progress, returns FusedData.

    One source is pairwise fusion, several are fused all at once ("Multi"). Dialogues that a model cannot show as they are
    must have been left out before. Statistics of the alignment are written beside the shards.
    """
    blend.check()
    folder = Path(folder)
    plan = {"blend": asdict(blend), "models": [knower.store.plan_digest for knower in (pivot, *sources)]}
    store = Store(folder, plan, pivot.store.sizes)
    missing = [shard for shard in range(len(store.sizes)) if not shard_file(folder, shard).exists()]
    words = [(Vocabulary(pivot.encoder), Vocabulary(source.encoder)) for source in sources]
    meter = Meter("Fusing distributions", sum(store.sizes[shard] for shard in missing), "dialogues")
    yield meter.step()
    tables = yield from _tables(dialogues, pivot, sources, words, blend, meter) if missing else _nothing()
    for shard in missing:
        examples, tally = [], Counter()
        rows = [knower.store.read(shard) for knower in (pivot, *sources)]
        for at, number in enumerate(store.dialogues(shard)):
            encoded = [knower.encoder.encode(dialogues[number]) for knower in (pivot, *sources)]
            theirs = [(encoded[j], rows[j][at], tables[j - 1]) for j in range(1, len(encoded))]
            fused = fuse_dialogue((encoded[0], rows[0][at]), theirs, blend, words)
            examples.append(Example(encoded[0].ids, encoded[0].labels, fused.ids, fused.chances, fused.choice))
            _count(tally, fused, sources)
            yield meter.step(1)
        write_whole(shard_file(folder, shard), _packed(examples))
        write_whole(folder / f"tally-{shard:05}.json", json.dumps(tally).encode())
    total = Counter()
    for shard in range(len(store.sizes)):
        total.update(json.loads((folder / f"tally-{shard:05}.json").read_text(encoding="utf-8")))
    write_whole(folder / STATISTICS_FILE, (json.dumps(statistics(total, sources), indent=1) + "\n").encode())
    return FusedData(folder)


def statistics(total: Mapping[str, int], sources: Sequence[Knower]) -> dict:
    """What alignment and fusion did, as shares: labels with a counterpart, with a distribution, and whose was chosen."""
    labels = max(total.get("labels", 0), 1)
    names = ["pivot", *(source.name for source in sources)]
    kinds = {source.name: {kind: total.get(f"kind {kind} {source.name}", 0) / labels for kind in ("1-1", "1-n", "n-1", "-")}
             for source in sources}
    return {"dialogues": total.get("dialogues", 0), "labels": total.get("labels", 0), "kinds": kinds,
            "aligned": {source.name: total.get(f"aligned {source.name}", 0) / labels for source in sources},
            "chosen": {name: total.get(f"chosen {j}", 0) / labels for j, name in enumerate(names)},
            "empty": total.get("empty", 0) / labels}


def _nothing():
    yield from ()
    return []


def _tables(dialogues, pivot: Knower, sources: Sequence[Knower], words, blend: Blend, meter: Meter) -> Work[list[np.ndarray]]:
    """The vocabulary table of every source, from all tokens that occur in its stored distributions."""
    tables = []
    for j, source in enumerate(sources):
        seen: set[int] = set()
        ends: dict[int, int] = {}
        for shard in range(len(source.store.sizes)):
            seen.update(np.unique(np.concatenate([rows.ids.ravel() for rows in source.store.read(shard)])).tolist())
        pairs = ((pivot.encoder.encode(dialogue), source.encoder.encode(dialogue)) for dialogue in dialogues)
        counts = None
        if blend.mapping in ("statistics", "fusechat"):
            pairs = list(pairs)
            counts = pair_counts(pairs, words[j])
        for i, pair in enumerate(pairs):
            ends.update(end_tokens(*pair))
            if counts is None and i >= 64:  # end tokens do not depend on the dialogue
                break
        yield meter.step(note=f"vocabulary of {source.name}")
        tables.append(vocabulary_table(*words[j], blend, seen, ends, counts))
    return tables


def _count(tally: Counter, fused, sources: Sequence[Knower]) -> None:
    tally["dialogues"] += 1
    tally["labels"] += len(fused.choice)
    tally["empty"] += int((fused.chances.sum(axis=1) == 0).sum())
    for j in range(len(sources) + 1):
        tally[f"chosen {j}"] += int((fused.choice == j).sum())
    for source, link in zip(sources, fused.links, strict=True):
        tally[f"aligned {source.name}"] += int((link.usable >= 0).sum())
        for kind, count in Counter(link.kinds()).items():
            tally[f"kind {kind} {source.name}"] += count


def _packed(examples: Sequence[Example]) -> bytes:
    from safetensors.numpy import save

    width = max(example.target_ids.shape[1] for example in examples)
    wide = [Example(e.ids, e.labels, *_widened(e, width), e.choice) for e in examples]
    arrays = {name: np.ascontiguousarray(np.concatenate([getattr(e, name) for e in wide]).astype(dtype))
              for name, dtype in _FIELDS.items()}
    for name, field in (("token_starts", "ids"), ("label_starts", "labels")):
        arrays[name] = np.concatenate(([0], np.cumsum([len(getattr(e, field)) for e in wide]))).astype(np.int64)
    return save(arrays)


def _widened(example: Example, width: int) -> tuple[np.ndarray, np.ndarray]:
    extra = ((0, 0), (0, width - example.target_ids.shape[1]))
    return np.pad(example.target_ids, extra, constant_values=-1), np.pad(example.chances, extra)

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
from fusion.distill.spelling import Vocabulary, end_tokens, pair_counts, vocabulary_table
from fusion.distill.store import PLAN_FILE, Store, write_whole
from fusion.distill.targets import Blend, Fused, fuse_dialogue
from fusion.errors import CheckpointError
from fusion.progress import Meter, Work

STATISTICS_FILE = "statistics.json"
FORM = 2  # of the targets: 2 keeps the mass that was kept, and a vocabulary is mapped by bytes
_FIELDS = {"ids": np.int32, "labels": np.int32, "target_ids": np.int32, "chances": np.float16, "choice": np.int8}


@dataclass(frozen=True)
class Example:
    """One dialogue to learn: `ids` [T], `labels` [L] positions in it, fused targets `target_ids`, `chances` [L, K] out of 1 (the
    rest is the tail: any other token; zeros: the gold label alone); `choice`
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
            self._whole = plan.get("blend", {}).get("tail", "renormalise") == "renormalise"
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
        found = {name: file.get_slice(name)[int(a):int(b)] for name, (a, b) in spans.items()}
        if self._whole:  # no tail out of the rounding to 16 bits
            chances = found["chances"].astype(np.float32)
            total = chances.sum(axis=1, keepdims=True)
            found["chances"] = chances / np.where(total > 0, total, 1)
        return Example(**found)


def shard_file(folder: Path, shard: int) -> Path:
    """The file of one shard."""
    return folder / f"fused-{shard:05}.safetensors"


def build(dialogues: Sequence[Dialogue], pivot: Knower, sources: Sequence[Knower], folder: str | os.PathLike,
          blend: Blend) -> Work[FusedData]:
    """Align and fuse the stored distributions of pivot and sources into `folder`; yields Progress, returns FusedData.

    One source is pairwise fusion, several are fused all at once ("Multi"). Dialogues that a model cannot show as they are
    must have been left out before. Statistics of the alignment are written beside the shards. CheckpointError when the folder
    holds targets of other settings, or of an earlier version.
    """
    blend.check()
    folder = Path(folder)
    plan = {"form": FORM, "blend": asdict(blend), "models": [knower.store.plan_digest for knower in (pivot, *sources)]}
    _refuse_earlier(folder)
    store = Store(folder, plan, pivot.store.sizes)
    missing = [shard for shard in range(len(store.sizes)) if not shard_file(folder, shard).exists()]
    words = [(Vocabulary(pivot.encoder), Vocabulary(source.encoder)) for source in sources]
    meter = Meter("Fusing distributions", sum(store.sizes[shard] for shard in missing), "dialogues")
    yield meter.step()
    tables = yield from _tables(dialogues, pivot, sources, words, blend, meter) if missing else _nothing()
    written = (yield from _written(dialogues, pivot, meter)) if missing else np.zeros(0, int)
    for shard in missing:
        examples, tally = [], Counter()
        rows = [knower.store.read(shard) for knower in (pivot, *sources)]
        for at, number in enumerate(store.dialogues(shard)):
            encoded = [knower.encoder.encode(dialogues[number]) for knower in (pivot, *sources)]
            theirs = [(encoded[j], rows[j][at], tables[j - 1]) for j in range(1, len(encoded))]
            fused = fuse_dialogue((encoded[0], rows[0][at]), theirs, blend, words)
            examples.append(Example(encoded[0].ids, encoded[0].labels, fused.ids, fused.chances, fused.choice))
            _count(tally, fused, sources, written)
            yield meter.step(1)
        write_whole(shard_file(folder, shard), _packed(examples))
        write_whole(folder / f"tally-{shard:05}.json", json.dumps(tally).encode())
    total = Counter()
    for shard in range(len(store.sizes)):
        total.update(json.loads((folder / f"tally-{shard:05}.json").read_text(encoding="utf-8")))
    write_whole(folder / STATISTICS_FILE, (json.dumps(statistics(total, sources), indent=1) + "\n").encode())
    return FusedData(folder)


def _refuse_earlier(folder: Path) -> None:
    """CheckpointError for targets of an earlier version: they took what was left of a distribution for all of it."""
    try:
        form = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8")).get("form", 1)
    except (OSError, ValueError, AttributeError):
        return  # none yet, or what the store refuses
    if form != FORM:
        raise CheckpointError("the fused targets were made by another version, which mapped vocabularies otherwise",
                              where=str(folder), todo="Remove this folder; the next run makes it again, without reading any model.")


def statistics(total: Mapping[str, float], sources: Sequence[Knower]) -> dict:
    """What alignment and fusion did, as shares.

    Of the labels: with a counterpart (`aligned`, `kinds`), where a source is `heard` (there, or inside its token), whose
    distribution was `chosen`, `empty` ones that the gold label teaches alone. Of a source's mass, the mean over the labels where
    it is heard: `read` (its top-k), `kept` (what of it has a pivot token), `unwritten` (what of that lies on tokens that the
    pivot never writes in these dialogues). `emptied`: the share of these labels where too little was kept.
    """
    labels = max(total.get("labels", 0), 1)
    names = ["pivot", *(source.name for source in sources)]
    kinds = {source.name: {kind: total.get(f"kind {kind} {source.name}", 0) / labels for kind in ("1-1", "1-n", "n-1", "-")}
             for source in sources}
    found = {"dialogues": total.get("dialogues", 0), "labels": total.get("labels", 0), "kinds": kinds,
             "chosen": {name: total.get(f"chosen {j}", 0) / labels for j, name in enumerate(names)},
             "empty": total.get("empty", 0) / labels}
    for share in ("aligned", "heard"):
        found[share] = {source.name: total.get(f"{share} {source.name}", 0) / labels for source in sources}
    for mean in ("read", "kept", "unwritten", "emptied"):
        found[mean] = {source.name: total.get(f"{mean} {source.name}", 0) / max(total.get(f"heard {source.name}", 0), 1)
                       for source in sources}
    return found


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


def _written(dialogues: Sequence[Dialogue], pivot: Knower, meter: Meter) -> Work[np.ndarray]:
    """The ids of all tokens that the pivot writes in the dialogues."""
    found: set[int] = set()
    for dialogue in dialogues:
        found.update(pivot.encoder.encode(dialogue).ids.tolist())
        yield meter.step(note="tokens that the pivot writes")
    return np.array(sorted(found), np.int64)


def _count(tally: Counter, fused: Fused, sources: Sequence[Knower], written: np.ndarray) -> None:
    tally["dialogues"] += 1
    tally["labels"] += len(fused.choice)
    tally["empty"] += int((fused.chances.sum(axis=1) == 0).sum())
    for j in range(len(sources) + 1):
        tally[f"chosen {j}"] += int((fused.choice == j).sum())
    for source, link, its in zip(sources, fused.links, fused.carried, strict=True):
        heard, name = its.at >= 0, source.name
        odd = np.where((its.ids >= 0) & ~np.isin(its.ids, written), its.chances, 0)
        tally.update({f"aligned {name}": int((link.usable >= 0).sum()), f"heard {name}": int(heard.sum()),
                      f"read {name}": float(its.read[heard].sum()), f"kept {name}": float(its.kept[heard].sum()),
                      f"unwritten {name}": float(odd[heard].sum()), f"emptied {name}": int(its.emptied.sum())})
        for kind, count in Counter(link.kinds()).items():
            tally[f"kind {kind} {name}"] += count


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

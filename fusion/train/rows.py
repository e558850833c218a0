"""What a training step is given: dialogues as rows, one each or packed, in which order, and joined to a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from fusion.distill.fused import Example
from fusion.train.packing import pack
from fusion.train.settings import Training


class Rows(torch.utils.data.Dataset):
    """The rows of a training: one dialogue each, or packed; dialogues are fetched when a row is asked for."""

    def __init__(self, examples: Sequence[Example], training: Training):
        self.examples = examples
        self.rows = pack([len(example.ids) for example in examples], training.max_tokens) if training.pack \
            else [[i] for i in range(len(examples))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> list[Example]:
        return [self.examples[i] for i in self.rows[number]]


class ByLength(torch.utils.data.Sampler):
    """Row numbers in an order that puts similar lengths side by side: drawn anew every epoch, the same for the same seed.

    Stretches of 50 batches are sorted by length each, and their batches shuffled.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int):
        self.lengths, self.batch, self.seed, self.epoch = np.asarray(lengths), batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """What the Trainer calls before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order, stretch = rng.permutation(len(self.lengths)), 50 * self.batch
        for start in range(0, len(order), stretch):
            rows = order[start:start + stretch]
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            groups = [rows[at:at + self.batch] for at in range(0, len(rows), self.batch)]
            last = groups.pop() if len(groups[-1]) < self.batch else []  # a short batch in the middle would shift all others
            for group in (*(groups[i] for i in rng.permutation(len(groups))), last):
                yield from map(int, group)


class Collator:
    """Rows of examples to one batch: padded on the right; packed rows carry positions that begin anew with every dialogue."""

    def __call__(self, rows: Sequence[Sequence[Example]]) -> dict[str, torch.Tensor]:
        longest = max(sum(len(example.ids) for example in row) for row in rows)
        k = max(example.target_ids.shape[1] for row in rows for example in row)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        labels = torch.full((len(rows), longest), -100)
        positions = torch.arange(longest).repeat(len(rows), 1)
        targets, chances, places = [], [], []
        for i, row in enumerate(rows):
            at = 0
            for example in row:
                count = len(example.ids)
                ids[i, at:at + count] = torch.from_numpy(np.asarray(example.ids, np.int64))
                spots = torch.from_numpy(np.asarray(example.labels, np.int64))
                labels[i, spots + at] = ids[i, spots + at]
                positions[i, at:] = torch.arange(longest - at)
                places.append(i * longest + at + spots - 1)
                width = (0, k - example.target_ids.shape[1])
                targets.append(torch.nn.functional.pad(torch.from_numpy(example.target_ids.astype(np.int64)), width, value=-1))
                chances.append(torch.nn.functional.pad(torch.from_numpy(example.chances.astype(np.float32)), width))
                at += count
        batch = {"input_ids": ids, "labels": labels, "places": torch.cat(places), "target_ids": torch.cat(targets),
                 "chances": torch.cat(chances)}
        return {**batch, "position_ids": positions} if any(len(row) > 1 for row in rows) else batch

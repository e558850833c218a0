"""Teacher passes: what a model expects at every label of every dialogue, read off once and kept.

    store = finish(represent(LocalTeacher("source-qwen"), dialogues, "work/source-qwen", top_k=10))

A teacher is a `transformers` model here, or a running server that returns log-probabilities of prompt tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import fields
from functools import cached_property
from typing import Protocol

import numpy as np

from fusion.checkpoint import Checkpoint
from fusion.distill.dialogues import Dialogue
from fusion.distill.encoding import Encoded, Encoder
from fusion.distill.heads import Head
from fusion.distill.store import Rows, Store, data_digest
from fusion.errors import CheckpointError
from fusion.loading import load_model, tokenizer_of
from fusion.progress import Meter, Work
from fusion.sources import open_checkpoint

SHARD_DIALOGUES = 256
BATCH_TOKENS = 8192


class Teacher(Protocol):
    """Anything that says what it expects: `encoder` cuts dialogues into its tokens, `mark` tells it from other teachers."""

    encoder: Encoder
    mark: str

    def rows(self, batch: Sequence[Encoded], top_k: int) -> list[Rows]:
        """The distributions at the labels of some dialogues of similar length."""


class LoadedTeacher:
    """A causal model of transformers that is in memory already; `template` shared by all models, None = the tokenizer's own."""

    def __init__(self, model, tokenizer, mark: str = "", *, template: str | None = None, max_tokens: int | None = None):
        self.model, self.mark, self.device = model, mark, model.device
        self.encoder = Encoder(tokenizer, template, limit_of(model.config, max_tokens), rows_of(model))

    @cached_property
    def _head(self) -> Head:
        return Head(self.model)

    def rows(self, batch: Sequence[Encoded], top_k: int) -> list[Rows]:
        """See Teacher; padding stands on the right, where attention never looks."""
        import torch

        longest = max(len(encoded.ids) for encoded in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, encoded in zip(ids, batch, strict=True):
            row[:len(encoded.ids)] = torch.from_numpy(encoded.ids)
        places = torch.from_numpy(np.concatenate([i * longest + encoded.labels - 1 for i, encoded in enumerate(batch)]))
        gold = torch.from_numpy(np.concatenate([encoded.targets for encoded in batch])).to(self.device)
        with torch.inference_mode():
            found = self._head(places.to(self.device), lambda logits, part: _top(logits, gold[part], top_k),
                               input_ids=ids.to(self.device), use_cache=False)
        return _split(found, [len(encoded.labels) for encoded in batch])


class LocalTeacher(LoadedTeacher):
    """A causal model that transformers loads: a folder, "folder+adapter" or a Hub id.

    `dtype` "auto" (as stored on a GPU; float32 on a CPU, where bfloat16 is several times as slow), "float32", "bfloat16" …;
    `device` "auto" takes a GPU when there is one; `template` shared by all models, None = the model's own.
    """

    def __init__(self, source: str, *, template: str | None = None, max_tokens: int | None = None, dtype: str = "auto",
                 device: str = "auto"):
        import torch

        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        if dtype == "auto" and place.type == "cpu":
            dtype = "float32"
        with closing(open_checkpoint(source)) as checkpoint:
            mark, model, tokenizer = checkpoint.fingerprint, load_model(checkpoint, dtype), tokenizer_of(checkpoint)
        super().__init__(model.to(place).eval(), tokenizer, mark, template=template, max_tokens=max_tokens)


def _top(logits, gold, top_k: int) -> Rows:
    """Top-k of logits [n, V], and the nats of the true tokens; float32 from here on."""
    import torch

    picked = logits.float()
    total = torch.logsumexp(picked, dim=1)
    best = picked.topk(min(top_k, picked.shape[1]), dim=1)
    true = picked.gather(1, gold[:, None])[:, 0]
    return Rows(best.indices.cpu().numpy().astype(np.int32), (best.values - total[:, None]).cpu().numpy(),
                (total - true).cpu().numpy())


def _split(found: Sequence[Rows], counts: Sequence[int]) -> list[Rows]:
    """Slices of a batch as the rows of each dialogue, which have `counts` labels."""
    whole = [np.concatenate([getattr(rows, its.name) for rows in found]) for its in fields(Rows)]
    return [Rows(*parts) for parts in zip(*(np.split(array, np.cumsum(counts)[:-1]) for array in whole), strict=True)]


def rows_of(model) -> int | None:
    """How many tokens a model in memory has an embedding for; None when it does not say."""
    table = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "weight", None)
    return None if table is None else int(table.shape[0])


def context_of(config) -> int | None:
    """How many tokens a model can read, from its config; None when it does not say."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def limit_of(config, max_tokens: int | None = None) -> int | None:
    """How many tokens of a dialogue a model is shown: `max_tokens`, but never more than it can read; None without either."""
    return min((limit for limit in (max_tokens, context_of(config)) if limit), default=None)


def limit_in(checkpoint: Checkpoint, max_tokens: int | None = None) -> int | None:
    """The same of a checkpoint that is not loaded; of a kind of model that transformers does not know, `max_tokens`."""
    from transformers import AutoConfig

    try:
        return limit_of(AutoConfig.for_model(**checkpoint.config), max_tokens)
    except (ValueError, TypeError, KeyError, AttributeError):
        return max_tokens


def prepare(teacher: Teacher, dialogues: Sequence[Dialogue], folder: str | os.PathLike, *, top_k: int = 10,
            shard_dialogues: int = SHARD_DIALOGUES) -> Store:
    """Make the store of a teacher's distributions, or open it where it was begun; CheckpointError when it is another's."""
    sizes = [min(shard_dialogues, len(dialogues) - start) for start in range(0, len(dialogues), shard_dialogues)]
    texts = [message["content"] for dialogue in dialogues for message in dialogue.messages()]
    texts += [f"{number} {dialogue.unlearnt}" for number, dialogue in enumerate(dialogues) if dialogue.unlearnt]
    return Store(folder, {"teacher": teacher.mark, "data": data_digest(texts), "top_k": top_k,
                          "template": teacher.encoder.template, "max_tokens": teacher.encoder.max_tokens}, sizes)


def represent(teacher: Teacher, dialogues: Sequence[Dialogue], folder: str | os.PathLike, *, top_k: int = 10,
              batch_tokens: int = BATCH_TOKENS, shard_dialogues: int = SHARD_DIALOGUES,
              part: tuple[int, int] = (0, 1)) -> Work[Store]:
    """Read off a teacher's distributions at every label of every dialogue into `folder`; yields Progress, returns the Store.

    A run that was stopped or killed continues at the first missing shard. `part` (number, count): several processes share the
    shards. Memory: one batch of about `batch_tokens` tokens and its logits. Source: FuseLLM, arXiv 2401.10491; FuseChat,
    arXiv 2402.16107, section 3.2.
    """
    store = prepare(teacher, dialogues, folder, top_k=top_k, shard_dialogues=shard_dialogues)
    missing = [shard for shard in store.missing() if shard % part[1] == part[0]]
    meter = Meter("Reading off distributions", sum(store.sizes[shard] for shard in missing), "dialogues")
    yield meter.step()
    for shard in missing:
        encoded = [teacher.encoder.encode(dialogues[number]) for number in store.dialogues(shard)]
        found: dict[int, Rows] = {}
        for batch in batches([len(its.ids) for its in encoded], batch_tokens):
            rows = teacher.rows([encoded[i] for i in batch], top_k)
            found.update(zip(batch, rows, strict=True))
            yield meter.step(len(batch))
        for i, row in found.items():
            if not np.isfinite(row.nats).all():
                raise CheckpointError("the teacher's losses are not finite", where=dialogues[store.dialogues(shard)[i]].origin,
                                      todo="Load the teacher as float32, or leave this dialogue out.")
        store.write(shard, [found[i] for i in range(len(encoded))])
    return store


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group indexes by length so that a batch, padded to its longest, holds at most `batch_tokens` tokens (at least one item)."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if group and lengths[i] * (len(group) + 1) > batch_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group

"""Llama-shaped checkpoints of random numbers for the benchmarks: a pivot and targets that moved away from it.

They are made once and kept in the work folder. Price: one write of every byte; about a minute for 1.1 B × 4.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusion import dtypes
from fusion.writer import CheckpointWriter

SHARD_BYTES = 1_000_000_000
PIECE = 1 << 20  # elements made at once
POOL = (1 << 22) + 15  # random numbers that all tensors take theirs from


@dataclass(frozen=True)
class Size:
    """The shape of a Llama model: width, width of its MLP, layers, heads, key-value heads, vocabulary."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def config(self) -> dict:
        """The `config.json` of the model."""
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
                "intermediate_size": self.inner, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab, "tie_word_embeddings": False,
                "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu", "dtype": "bfloat16"}

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor, in the usual order."""
        key_value = self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            for part, shape in (("self_attn.q_proj", (self.hidden, self.hidden)), ("self_attn.k_proj", (key_value, self.hidden)),
                                ("self_attn.v_proj", (key_value, self.hidden)), ("self_attn.o_proj", (self.hidden, self.hidden)),
                                ("mlp.gate_proj", (self.inner, self.hidden)), ("mlp.up_proj", (self.inner, self.hidden)),
                                ("mlp.down_proj", (self.hidden, self.inner)), ("input_layernorm", (self.hidden,)),
                                ("post_attention_layernorm", (self.hidden,))):
                yield f"model.layers.{layer}.{part}.weight", shape
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)


SIZES = {"tiny": Size(64, 160, 2, 4, 2, 512), "100m": Size(640, 1728, 12, 10, 5, 32000),
         "1.1b": Size(2048, 5632, 22, 32, 4, 32000), "7b": Size(4096, 11008, 32, 32, 32, 32000)}


def make_set(work: Path, size: str, targets: int = 3, linked: bool = False) -> list[Path]:
    """Make pivot and targets of this size below `work` unless they are there; returns their folders, the pivot first.

    `linked`: targets share the pivot's shards by symbolic links, so that large shapes cost one model of disk.
    """
    folders = [work / size / "pivot", *(work / size / f"target-{'abcdefgh'[j]}" for j in range(targets))]
    folders[0].parent.mkdir(parents=True, exist_ok=True)
    if not folders[0].exists():
        _write(folders[0], SIZES[size], 0)
    for j, folder in enumerate(folders[1:], 1):
        if not folder.exists() and linked:
            folder.mkdir()
            for file in folders[0].iterdir():
                (folder / file.name).symlink_to(file.resolve())
        elif not folder.exists():
            _write(folder, SIZES[size], j)
    return folders


def _write(folder: Path, size: Size, model: int) -> None:
    pool = np.random.default_rng(7).standard_normal(POOL, np.float32)
    tensors = list(size.tensors())
    with CheckpointWriter(folder, [(name, "BF16", shape) for name, shape in tensors], SHARD_BYTES) as writer:
        with ThreadPoolExecutor(2) as threads:
            for _ in threads.map(lambda tensor: _fill(writer, pool, *tensor, model), tensors):
                pass
        writer.write_file("config.json", json.dumps(size.config, indent=2))
        writer.finish()


def _fill(writer: CheckpointWriter, pool: np.ndarray, name: str, shape: tuple[int, ...], model: int) -> None:
    """Write one tensor: numbers of the pool at places that differ by tensor; target j adds others, scaled by tensor and j."""
    numel, norm = int(np.prod(shape)), len(shape) == 1
    for start in range(0, numel, PIECE):
        n = min(PIECE, numel - start)
        values = _taken(pool, f"{name}@{start}", n) * np.float32(0.02) + np.float32(norm)
        if model:
            scale = 0.002 * (1 + zlib.crc32(f"{name}/{model}".encode()) % 7) / 4
            values += _taken(pool, f"{name}@{start}/{model}", n) * np.float32(scale)
        writer.write(name, start, dtypes.encode(values, "BF16"))


def _taken(pool: np.ndarray, mark: str, n: int) -> np.ndarray:
    """`n` numbers of the pool from a place that the mark gives."""
    return np.take(pool, np.arange(n) + zlib.crc32(mark.encode()) % POOL, mode="wrap")

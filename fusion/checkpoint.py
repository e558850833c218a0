"""A checkpoint is a folder seen as a lazy mapping: names, shapes and dtypes come from headers, weights only when asked for.

    pivot = Checkpoint("assets/demo/pivot")
    pivot.info["model.norm.weight"].shape          # no weight is read
    pivot["model.norm.weight"]                     # one tensor, float32

Where the bytes lie is `files`, what they mean is `dtypes` and `quantised`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from fusion import dtypes
from fusion.anatomy import main_stack, place
from fusion.errors import CheckpointError, nearest
from fusion.files import Files, Span, file_names, list_tensors, read_json
from fusion.header import TensorInfo
from fusion.quantised import decode, dequantised, plain_config, read_scale


class Checkpoint(Mapping[str, np.ndarray]):
    """A folder with config, tokenizer and safetensors weights; `checkpoint[name]` is the tensor in float32.

    `name` is what people see (default: the folder's name), `weights` the folder of the safetensors where that is another
    one, `revision` the commit that was downloaded, `stored` the header entries where they are known already.
    CheckpointError when the folder cannot be a checkpoint: no config, no safetensors, a missing or broken shard, quantised
    weights.
    """

    def __init__(self, folder: str | os.PathLike, name: str | None = None, *, weights: Path | None = None, revision: str = "",
                 stored: Mapping[str, TensorInfo] | None = None):
        self.folder = Path(folder)
        if not os.path.isdir(self.folder):
            raise CheckpointError("there is no such folder", where=str(folder), todo="Give the folder that holds config.json.")
        self.name = name or self.folder.resolve().name
        self.revision = revision
        config = self._config()
        self._stored = list_tensors(weights or self.folder) if stored is None else stored
        self.info, self._fp8 = dequantised(self._stored, config, str(self.folder))
        self.config = plain_config(config) if self._fp8 else config
        self._refuse_whole_numbers()
        self._scales: dict[str, np.ndarray | None] = {}
        self._files = Files()

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self.info[name]
        return self.read(name, 0, tensor.numel, np.empty(tensor.numel, np.float32)).reshape(tensor.shape)

    def __repr__(self) -> str:
        return f"Checkpoint({self.name!r}, {self.architecture}, {self.parameters:,} parameters)"

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """Read the flat elements start … stop of a tensor into `out` (float32) and return that part of it."""
        tensor = self.info[name]
        if tensor.dtype not in dtypes.FLOATS:
            raise CheckpointError(f"holds {tensor.dtype}, which is not a weight dtype", where=f"{self.name}: {name}")
        if name in self._fp8:
            return decode(self._fp8[name], self.raw(name, start, stop), start, self._scale(name), out[:stop - start])
        return dtypes.decode(self.raw(name, start, stop), tensor.dtype, out[:stop - start])

    def plain(self, name: str) -> bool:
        """Whether the bytes of `raw` are, decoded by the tensor's dtype, just what `read` gives."""
        return self.info[name].dtype in dtypes.FLOATS and name not in self._fp8

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The stored bytes of the flat elements start … stop of a tensor."""
        return self._files.tensor(self._stored[name], start, stop)

    def raw_into(self, name: str, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """As `raw`, read into the first bytes of `out` (uint8) instead of new memory; returns that part of it."""
        return self._files.tensor_into(self._stored[name], start, stop, out)

    def span(self, name: str) -> Span | None:
        """Where the stored numbers of a `plain` tensor lie; None where only `read` and `raw_into` know."""
        return self._files.span(self._stored[name]) if self.plain(name) else None

    def _scale(self, name: str) -> np.ndarray | None:
        if name not in self._scales:
            self._scales[name] = read_scale(self._fp8[name], lambda tensor: self.raw(tensor.name))
        return self._scales[name]

    def close(self) -> None:
        """Close the files that reading opened."""
        self._files.close()

    @property
    def architecture(self) -> str:
        """The architecture the config names, e.g. "LlamaForCausalLM"."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else str(self.config.get("model_type", "unknown"))

    @cached_property
    def parameters(self) -> int:
        """How many numbers the float tensors hold."""
        return sum(tensor.numel for tensor in self.info.values() if tensor.dtype in dtypes.FLOATS)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.nbytes for tensor in self.info.values())

    @cached_property
    def dtype(self) -> str:
        """The safetensors code of the dtype that holds most of the numbers."""
        count: dict[str, int] = {}
        for tensor in self.info.values():
            count[tensor.dtype] = count.get(tensor.dtype, 0) + tensor.numel
        return max(count, key=lambda code: (count[code], code))

    @cached_property
    def layers(self) -> int:
        """How many layers the names count in the largest stack that reads and writes text."""
        return main_stack(self.info)[1]

    @cached_property
    def tied(self) -> bool:
        """Whether the head shares the embedding's matrix: no head is stored, or one that repeats it and that no config unties."""
        heads = {name for name in self.info if place(name).kind == "head"}
        return heads == self.tied_copies if heads else self._says_tied is not False

    @cached_property
    def tied_copies(self) -> frozenset[str]:
        """Names of stored heads that only repeat the embedding, as 64 samples of them show; none when the config unties them."""
        if self._says_tied is False:
            return frozenset()
        tables = [name for name in self.info if place(name).kind == "embedding"]
        return frozenset(name for name in self.info
                         if place(name).kind == "head" and any(self._equal(name, table) for table in tables))

    @property
    def _says_tied(self) -> bool | None:
        said = [config["tie_word_embeddings"] for config in (self.config, self._text_config)
                if config.get("tie_word_embeddings") is not None]
        return bool(said[0]) if said else None

    def _equal(self, one: str, other: str) -> bool:
        """Whether two tensors agree in shape and in 64 samples of up to 1024 numbers: some kilobytes instead of gigabytes."""
        first, second, numel = self.info[one], self.info[other], self.info[one].numel
        if first.shape != second.shape or not {first.dtype, second.dtype} <= set(dtypes.FLOATS):
            return False
        mine, its = np.empty((2, 1024), np.float32)
        spans = [(start, min(start + 1024, numel)) for start in range(0, numel, max(numel // 64, 1024))]
        return all(np.array_equal(self.read(one, *span, mine), self.read(other, *span, its), equal_nan=True) for span in spans)

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding, as the config says."""
        size = self.config.get("vocab_size", self._text_config.get("vocab_size"))
        return size if isinstance(size, int) else None

    @cached_property
    def vocabulary(self) -> Mapping[str, int] | None:
        """Token → id of the tokenizer, added tokens included; None when there is no tokenizer.json."""
        return self._tokens[0]

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """Token → id of what was added to the vocabulary that the tokenizer was trained with."""
        return self._tokens[1]

    @cached_property
    def _tokens(self) -> tuple[Mapping[str, int] | None, Mapping[str, int]]:
        return read_tokens(self.file("tokenizer.json"))

    @cached_property
    def chat_template(self) -> str | None:
        """The tokenizer's own chat template, or None; of several by name the one called default."""
        file = self.file("chat_template.jinja")
        if os.path.isfile(file):
            return file.read_text(encoding="utf-8", errors="replace")
        template = read_json(self.file("tokenizer_config.json")).get("chat_template")
        if template is None:
            template = read_json(self.file("chat_template.json")).get("chat_template")
        if isinstance(template, list):
            named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    @cached_property
    def fingerprint(self) -> str:
        """A cheap mark that tells checkpoints apart: SHA-256 over config, headers and up to 4 KiB inside every tensor.

        It reads a few kilobytes a tensor instead of gigabytes. Equal marks do not prove equal weights; a fine-tune of any
        size changes it.
        """
        return sampled(self.config, self._stored, self._files)

    @property
    def stamps(self) -> dict[Path, tuple[int, int, int]]:
        """Every file that weights come from, with its size in bytes, time in ns and inode."""
        return file_marks({tensor.file for tensor in self._stored.values()})

    @property
    def stamp(self) -> str:
        """A mark of the very files on this disk: paths, sizes and times. It notices what `fingerprint` may miss."""
        return repr(sorted((str(file.resolve()), *mark) for file, mark in self.stamps.items()))

    @property
    def origin(self) -> str:
        """Where it was read from: two models with one origin are one model."""
        return str(self.folder.resolve())

    def file(self, name: str) -> Path:
        """Where a small file beside the weights lies, such as tokenizer.json, if there is one."""
        return self.folder / name

    def small_names(self) -> list[str]:
        """The names of the plain files beside the weights that `file` finds, sorted."""
        return [name for name in file_names(self.folder, "") if os.path.isfile(self.file(name))]

    @property
    def converted(self) -> bool:
        """Whether the weights are read otherwise than they are stored in the folder: made of pickles, or from FP8."""
        return bool(self._fp8) or any(tensor.file.parent != self.folder for tensor in self._stored.values())

    @property
    def _text_config(self) -> dict:
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else {}

    def _config(self) -> dict:
        if os.path.isfile(self.folder / "config.json"):
            return read_json(self.folder / "config.json")
        raise CheckpointError("there is no config.json", where=str(self.folder), todo="Give the folder of a transformers model.")

    def _refuse_whole_numbers(self) -> None:
        if self.dtype not in dtypes.FLOATS:
            raise CheckpointError(f"most weights are stored as {self.dtype}, not as floating point numbers", where=str(self.folder),
                                  todo="Merge a float32, float16 or bfloat16 checkpoint.")

    def known(self, name: str) -> TensorInfo:
        """The header entry of a tensor; CheckpointError with the nearest name when there is none."""
        if name not in self.info:
            raise CheckpointError(f"there is no tensor {name!r}", where=self.name, todo=nearest(name, self.info))
        return self.info[name]


def read_tokens(path: Path) -> tuple[dict[str, int] | None, dict[str, int]]:
    """Token → id as a tokenizer.json says (None: there is none), added tokens included; and those that were added."""
    tokenizer = read_json(path)
    if not isinstance(tokenizer.get("model"), dict):
        return None, {}
    vocab = tokenizer["model"].get("vocab")
    if isinstance(vocab, list):  # unigram: [[token, score], …]
        vocab = {str(entry[0]): i for i, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    added = tokenizer.get("added_tokens")
    added = {str(token["content"]): token["id"] for token in (added if isinstance(added, list) else ())
             if isinstance(token, dict) and {"content", "id"} <= token.keys()}
    return ({**vocab, **added}, added) if isinstance(vocab, dict) else (None, {})


def sampled(config: dict, tensors: Mapping[str, TensorInfo], files: Files) -> str:
    """SHA-256 over a config, headers and up to 4 KiB inside every tensor."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tensor.shape}".encode())
        middle = tensor.numel // 2
        digest.update(files.tensor(tensor, middle, min(tensor.numel, middle + 2048)))
    return digest.hexdigest()


def file_marks(files: Iterable[Path]) -> dict[Path, tuple[int, int, int]]:
    """File → its size in bytes, time in ns and inode."""
    return {file: ((stat := os.stat(file)).st_size, stat.st_mtime_ns, stat.st_ino) for file in files}


def resized(config: dict, rows: int) -> dict:
    """A config with another vocabulary size, where it keeps it: at the top or in `text_config`."""
    inner = config.get("text_config")
    if isinstance(inner, dict) and "vocab_size" in inner and "vocab_size" not in config:
        return {**config, "text_config": {**inner, "vocab_size": rows}}
    return {**config, "vocab_size": rows}


def untied(config: dict) -> dict:
    """A config that says in every place that the head is a matrix of its own."""
    inner = config.get("text_config")
    both = {"text_config": {**inner, "tie_word_embeddings": False}} if isinstance(inner, dict) else {}
    return {**config, **both, "tie_word_embeddings": False}

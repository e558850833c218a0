"""Pickled weights (`pytorch_model.bin`) rewritten once as safetensors, in the person's cache folder, and opened from there.

A pickle can run code when it is loaded, so only torch's own restricted reader (`weights_only`) ever sees one, and only here.
Price: the weights lie on the disk twice, and torch is imported the first time; later the copy is found by its stamp.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusion.caching import cache_folder
from fusion.errors import CheckpointError, OutputError, ResourceError
from fusion.files import INDEX, PICKLES, file_names, read_index

PICKLE_INDEX = "pytorch_model.bin.index.json"
_LEFTOVERS = {"training_args.bin", "optimizer.bin", "scheduler.bin", "random_states.bin"}  # what trainers leave beside a model
_TAIL_BYTES = 1 << 20  # a zip ends with its directory, which holds a checksum of every tensor
_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
          "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_SAFE = "Get it as safetensors, or from the people who made it."


def pickled_files(folder: Path) -> list[Path]:
    """The pickles that hold a model's weights when no safetensors do, else []; CheckpointError when it is not clear which."""
    whole = [name for name in file_names(folder, ".safetensors") if not name.startswith("adapter")]
    if whole or os.path.isfile(folder / INDEX):
        return []
    named = sorted(set(read_index(folder / PICKLE_INDEX).values()))
    found = file_names(folder, *PICKLES)
    lone = [name for name in found if name.endswith(".bin") and name not in _LEFTOVERS and not name.startswith("adapter")]
    files = ["pytorch_model.bin"] if "pytorch_model.bin" in found else named or lone
    if not files and found and not found[0].startswith("adapter"):
        raise CheckpointError(f"only a training state ({found[0]}), not a saved model", where=str(folder),
                              todo="Save the model with save_pretrained and give that folder.")
    if len(files) > 1 and not named:
        raise CheckpointError(f"{len(files)} pickles without {PICKLE_INDEX}", where=str(folder),
                              todo="Add the index that belongs to the shards.")
    gone = next((name for name in files if not os.path.isfile(folder / name)), None)
    if gone is not None:
        raise CheckpointError(f"the index names {gone}, which is missing", where=str(folder), todo="Download the missing shard.")
    return [folder / name for name in files]


def converted(files: list[Path]) -> Path:
    """The folder with the tensors of these pickles as safetensors, one shard per pickle; made when it is not there yet.

    Whole or not at all, by one process at a time. CheckpointError for a pickle that holds anything but plain tensors,
    OutputError or ResourceError when the cache folder cannot take it.
    """
    root = cache_folder() / "converted"
    mark = _stamp(files)
    done = root / mark
    if done.is_dir():
        return done
    with _disk(root), _alone(root, mark):
        if done.is_dir():  # another process made it meanwhile
            return done
        partial = root / f".{mark}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        try:
            _convert(files, partial)
            os.rename(partial, done)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return done


def _stamp(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat()
        with open(path, "rb") as file:
            file.seek(max(0, stat.st_size - _TAIL_BYTES))
            digest.update(f"{path.name}|{stat.st_size}|{stat.st_mtime_ns}|".encode() + file.read())
    return digest.hexdigest()[:32]


@contextmanager
def _disk(root: Path) -> Iterator[None]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OutputError(f"the cache folder cannot be written ({error.strerror})", where=str(root),
                          todo="Set FUSECHAT_CACHE to a folder you may write to.") from error


@contextmanager
def _alone(root: Path, mark: str) -> Iterator[None]:
    with open(root / f".{mark}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the system when the process dies
        yield


def _convert(files: list[Path], out: Path) -> None:
    where: dict[str, str] = {}
    for number, path in enumerate(files, 1):
        tensors = _load(path)
        twice = next((name for name in tensors if name in where), None)
        if twice is not None:
            raise CheckpointError(f"{twice} is stored in two files", where=path.name)
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        _write(out / file, tensors)
        where |= dict.fromkeys(tensors, file)
    if len(files) > 1:
        (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _load(path: Path) -> dict:
    """Name → torch tensor of one pickle, mapped from the file where its format allows it."""
    import torch

    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    try:
        if zipped and any(entry.compress_type != zipfile.ZIP_STORED for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError("it is compressed")  # torch never does that, a bomb does
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a hostile pickle can end in any of them
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise CheckpointError(f"the pickle holds more than plain weights, or is broken ({reason[0][:200]})", where=str(path),
                              todo=_SAFE) from error
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError("the pickle holds no table of tensors", where=str(path), todo=_SAFE)
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{name!r} is no tensor but {type(tensor).__name__}", where=str(path),
                                  todo="Save the model with save_pretrained and give that folder.")
    _check(loaded, path)
    return loaded


def _check(tensors: dict, path: Path) -> None:
    """Refuse tensors of other kinds, and names that share their bytes so often that a small file would fill the disk."""
    import torch

    odd = next((name for name, tensor in tensors.items() if tensor.layout != torch.strided or tensor.device.type != "cpu"
                or str(tensor.dtype).removeprefix("torch.") not in _TYPES
                or tensor.nbytes > tensor.untyped_storage().nbytes()), None)
    if odd is not None:
        tensor = tensors[odd]
        raise CheckpointError(f"{odd} of shape {list(tensor.shape)} and type {tensor.dtype} is no plain tensor", where=str(path),
                              todo=_SAFE)
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > 8 * path.stat().st_size:
        raise CheckpointError(f"its tensors claim {total} bytes, the file has {path.stat().st_size}", where=str(path), todo=_SAFE)


def _write(path: Path, tensors: dict) -> None:
    """Write one safetensors file, tensor by tensor; tensors that share their bytes are written once each."""
    import torch

    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        code = _TYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    if offset + len(text) > shutil.disk_usage(path.parent).free:
        raise ResourceError(f"converting the pickles takes {offset} bytes, which the disk has not free", where=str(path.parent),
                            todo="Free some space, or set FUSECHAT_CACHE to another disk.")
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())

"""The one door by which weights come into memory as a model of transformers: chat, teachers, training and evaluation.

    model, tokenizer = load_model(checkpoint, "float32"), tokenizer_of(checkpoint)

A matrix that is missing, misshapen or left over is refused here: transformers would fill it with random numbers or drop it,
and say so only in its log. None of a checkpoint's code is run, and nothing is downloaded. Price: weights that no folder holds
as they are read (an adapter's, converted ones) stand in memory as float32 while the model is made.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusion.adapter_settings import CONFIG as ADAPTER
from fusion.anatomy import main_stack
from fusion.checkpoint import Checkpoint
from fusion.dtypes import FLOATS
from fusion.errors import CheckpointError, FusionError, ResourceError
from fusion.files import INDEX, WHOLE
from fusion.naming import other_sense, stated_depth, unread
from fusion.side_files import copied

# transformers switches settings of the whole process (default dtype, weight initialisation) while it loads a model, so two that
# are loaded at once spoil each other.
LOADING = threading.Lock()

_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_SAID = {"ignore_mismatched_sizes": True, "output_loading_info": True}  # what is wrong is said here, in words
TORCH_NAMES = {"BF16": "bfloat16", "F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "I32": "int32",
                "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}


def load_model(checkpoint: Checkpoint, dtype: Any = "auto") -> Any:
    """The causal language model of a checkpoint, on the CPU; `dtype` is torch's or its name, "auto" as stored.

    CheckpointError for weights that do not belong together, ResourceError when the memory is too small.
    """
    if stored_as_read(checkpoint):
        with _border(checkpoint.folder, checkpoint.name):
            return _of_folder(checkpoint.folder, dtype, checkpoint.name)
    tensors = tensors_of(checkpoint)
    with small_files(checkpoint) as folder:
        return build_model(tensors, folder, checkpoint_dtype(checkpoint) if dtype == "auto" else dtype, checkpoint.name)


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint, with the chat template that belongs to it; CheckpointError when it cannot be loaded."""
    with small_files(checkpoint) as folder:
        return tokenizer_in(folder, checkpoint.name)


def tokenizer_in(folder: Path, name: str) -> Any:
    """The tokenizer of a folder; `name` is what people call its model."""
    from transformers import AutoTokenizer

    with _border(folder, name):
        return AutoTokenizer.from_pretrained(folder, **_LOCAL)


def build_model(tensors: Mapping[str, Any], folder: Path, dtype: Any, name: str) -> Any:
    """The model that `folder` describes, of torch tensors by name: they take the way that loading from a folder takes.

    Raises as `load_model` does.
    """
    with _border(folder, name):
        return _of_tensors(tensors, folder, dtype, name)


def stored_as_read(checkpoint: Checkpoint) -> bool:
    """Whether transformers reads this very model from the checkpoint's folder: no adapter (it would take one that lies beside
    the model), nothing converted, known file names."""
    if type(checkpoint) is not Checkpoint or checkpoint.converted or os.path.isfile(checkpoint.folder / ADAPTER):
        return False
    return os.path.isfile(checkpoint.folder / WHOLE) or os.path.isfile(checkpoint.folder / INDEX)


@contextmanager
def small_files(checkpoint: Checkpoint) -> Iterator[Path]:
    """A folder with the checkpoint's config, tokenizer and generation config: its own, or one that is made for a while."""
    if stored_as_read(checkpoint):
        yield checkpoint.folder
        return
    with tempfile.TemporaryDirectory(prefix="fusechat-") as scratch:
        folder = Path(scratch)
        for name, file in copied(checkpoint).items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
        (folder / "config.json").write_text(json.dumps(checkpoint.config))
        yield folder


def tensors_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Every tensor of a checkpoint as torch's: floats as float32, others as they are stored."""
    import torch

    def tensor(name: str) -> Any:
        its = checkpoint.info[name]
        if its.dtype in FLOATS:
            return torch.from_numpy(checkpoint[name])
        dtype = getattr(torch, TORCH_NAMES[its.dtype])
        data = bytearray(checkpoint.raw(name))
        return torch.frombuffer(data, dtype=dtype).reshape(its.shape) if data else torch.empty(its.shape, dtype=dtype)

    return {name: tensor(name) for name in checkpoint if checkpoint.info[name].dtype in (*FLOATS, *TORCH_NAMES)}


def checkpoint_dtype(checkpoint: Checkpoint) -> Any:
    """Torch's dtype that most of a checkpoint is stored with."""
    import torch

    return getattr(torch, TORCH_NAMES.get(checkpoint.dtype, "bfloat16"))


def _of_folder(folder: Path, dtype: Any, name: str) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, **_LOCAL)
    model, info = _door(config).from_pretrained(folder, config=config, use_safetensors=True, dtype=dtype, **_SAID, **_LOCAL)
    return _whole(model, info, name)


def _of_tensors(tensors: Mapping[str, Any], folder: Path, dtype: Any, name: str) -> Any:
    import torch
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder, **_LOCAL)
    with torch.device("meta"):  # only to learn the class, without weights
        kind = type(_door(config).from_config(config))
    model, info = kind.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype, **_SAID)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return _whole(model, info, name)


def _door(config: Any) -> Any:
    """The class of transformers that makes a model which writes text, for a config."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def _whole(model: Any, info: Mapping[str, Any], name: str) -> Any:
    """The model, unless transformers had to invent, cut or drop something."""
    misshapen = sorted(info["mismatched_keys"])
    lacking = sorted(info["missing_keys"] - {key for key, *_ in misshapen})
    depth, stack = stated_depth(model.config.to_dict()), main_stack(name for name, _ in model.named_parameters())[0]
    left = sorted(key for key in info["unexpected_keys"] if not unread(key, None, depth, stack) and not other_sense(key))
    said = [f"{len(lacking)} matrices are missing, first {lacking[0]}"] if lacking else []
    if misshapen:
        key, stored, wanted = misshapen[0]
        said.append(f"{len(misshapen)} matrices have another shape than the config says, first {key}: {list(stored)} instead of "
                    f"{list(wanted)}")
    if left:
        said.append(f"{len(left)} tensors belong to no matrix of a {type(model).__name__}, first {left[0]}")
    if said:  # transformers would go on with random numbers and say so only in its log
        raise CheckpointError("; ".join(said), where=name, todo="Download or merge the checkpoint again.")
    return model


@contextmanager
def _border(folder: Path, name: str) -> Iterator[None]:
    """One model at a time; what transformers raises in the house's words, without the path, which is nobody's business on a
    public page."""
    try:
        with LOADING:
            yield
    except FusionError:
        raise
    except Exception as error:  # transformers raises a dozen kinds for a bad folder
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise ResourceError("There is not enough memory to load this model", where=name,
                                todo="Close other models or choose a smaller one.") from error
        lines = str(error).replace(str(folder), name).strip().splitlines()
        found = f"This checkpoint cannot be loaded ({type(error).__name__}{': ' + lines[0] if lines else ''})"
        raise CheckpointError(found[:400], where=name,
                              todo="Check that config, tokenizer and safetensors files are whole.") from error

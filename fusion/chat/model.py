"""A chat model in memory: weights, tokenizer, and what a conversation needs to know. The border to transformers."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion.errors import CheckpointError, FusionError, ResourceError
from fusion.loading import LOADING

VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "tekken.json", "*.tiktoken")


@dataclass(eq=False)
class ChatModel:
    """A causal language model that is ready to answer; weights are shared between threads and never changed.

    `stop_ids` end an answer; `nbytes` is the memory of weights and buffers; `context` the longest sequence in tokens.
    """

    name: str
    model: Any
    tokenizer: Any
    stop_ids: frozenset[int]
    nbytes: int
    context: int | None
    _tokenizing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of the text; `special` adds the marks (such as BOS) that the tokenizer sets by itself."""
        with self._tokenizing:  # fast tokenizers refuse to be borrowed by two threads
            return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """Text of the token ids without special tokens."""
        with self._tokenizing:
            return self.tokenizer.decode(ids, skip_special_tokens=True)


def load(folder: str | Path, name: str | None = None) -> ChatModel:
    """Load a checkpoint folder: safetensors only, local files only, none of its code is run.

    On a CPU the weights become float32; on a GPU they keep their dtype. Raises CheckpointError, ResourceError.
    """
    folder = Path(folder)
    name = name or folder.name
    _weight_files(folder, name)
    _check_vocabulary(folder, name)
    try:
        with LOADING:
            return _load(folder, name)
    except FusionError:
        raise
    except Exception as error:  # the one border: transformers raises a dozen kinds for a bad folder
        raise _explain(error, folder, name) from error


def _load(folder: Path, name: str) -> ChatModel:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    on_gpu = torch.cuda.is_available()
    options = {"local_files_only": True, "trust_remote_code": False}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True, dtype="auto" if on_gpu else torch.float32, output_loading_info=True, **options)
    _refuse_gaps(info, name)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return from_parts(model.to("cuda") if on_gpu else model, tokenizer, name)


def from_tensors(tensors: Mapping[str, Any], dtype: str, shape_of: Path, donor: Path, name: str) -> ChatModel:
    """Make a ChatModel of torch tensors by name; they take the way that loading them from a folder would take.

    `shape_of` is the folder with the model's config, `donor` the one with tokenizer and generation config. On a CPU the
    weights become float32; on a GPU they get `dtype`. Raises CheckpointError, ResourceError.
    """
    try:
        with LOADING:
            return _from_tensors(tensors, dtype, shape_of, donor, name)
    except FusionError:
        raise
    except Exception as error:
        raise _explain(error, shape_of, name) from error


def _from_tensors(tensors: Mapping[str, Any], dtype: str, shape_of: Path, donor: Path, name: str) -> ChatModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    on_gpu = torch.cuda.is_available()
    options = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(shape_of, **options)
    with torch.device("meta"):  # only to learn the class, without weights
        kind = type(AutoModelForCausalLM.from_config(config))
    model, info = kind.from_pretrained(None, config=config, state_dict=dict(tensors), output_loading_info=True,
                                       dtype=getattr(torch, dtype) if on_gpu else torch.float32)
    _refuse_gaps(info, name)
    if (donor / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(donor, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(donor, **options)
    return from_parts(model.to("cuda") if on_gpu else model, tokenizer, name)


def _refuse_gaps(info: dict, name: str) -> None:
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:  # transformers would fill them with random numbers and say so only in the log
        raise CheckpointError(f"{len(lacking)} matrices are missing or have the wrong shape, first {lacking[0]}",
                              where=name, todo="Download or merge the checkpoint again.")


def from_parts(model: Any, tokenizer: Any, name: str) -> ChatModel:
    """Make a ChatModel of parts in memory; takes the model over: eval mode, its generation config cleared."""
    from transformers import GenerationConfig

    config = model.config.get_text_config()
    # Rotary models state the length in the config; 0 or a missing value means that nothing limits it.
    context = getattr(config, "max_position_embeddings", None) or None
    stop_ids = _stop_ids(model, tokenizer, config)
    # A checkpoint's generation config may bring top_k, repetition_penalty, suppressed tokens …, and `generate` takes
    # every option that is left at None from it. Compared models must sample alike: only an empty one may stand here.
    model.generation_config = GenerationConfig()
    return ChatModel(name, model.eval(), tokenizer, stop_ids, _nbytes(model), context)


def expected_bytes(folder: str | Path) -> int:
    """Memory that `load` will take, in bytes, from the file headers alone; raises CheckpointError."""
    import torch
    from safetensors import SafetensorError, safe_open

    folder, total, on_gpu = Path(folder), 0, torch.cuda.is_available()
    try:
        for file in _weight_files(folder, folder.name):
            if on_gpu:
                total += file.stat().st_size
                continue
            with safe_open(file, "pt") as tensors:
                shapes = (tensors.get_slice(key).get_shape() for key in list(tensors.keys()))
                total += sum(4 * torch.Size(shape).numel() for shape in shapes)
    except (SafetensorError, OSError) as error:
        raise _explain(error, folder, folder.name) from error
    return total


def _weight_files(folder: Path, name: str) -> list[Path]:
    if not (folder / "config.json").is_file():
        raise CheckpointError("There is no config.json here", where=name, todo="Choose a whole checkpoint.")
    # Some checkpoints bring the same weights once more under another name, which transformers leaves alone too.
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError("There are no safetensors weights here", where=name,
                              todo="Convert the checkpoint to safetensors; pickled weights are never opened.")
    return files


def _check_vocabulary(folder: Path, name: str) -> None:
    # Without these files transformers makes up an empty tokenizer, and the model answers nonsense.
    if not any(file for pattern in VOCABULARIES for file in folder.glob(pattern)):
        raise CheckpointError("There is no tokenizer here", where=name,
                              todo="Add tokenizer.json and tokenizer_config.json of the model it was made from.")


def _stop_ids(model: Any, tokenizer: Any, config: Any) -> frozenset[int]:
    """The union of all marks that may end an answer, since the parts of a merge often disagree about them."""
    named = (tokenizer.eos_token_id, config.eos_token_id, getattr(model.generation_config, "eos_token_id", None),
             _turn_end(tokenizer))
    ids = {i for value in named for i in (value if isinstance(value, list | tuple) else (value,))}
    return frozenset(i for i in ids if isinstance(i, int) and 0 <= i < config.vocab_size)


def _turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template sets right after an assistant's words, if there is one."""
    mark = "answer-ends-here"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}], tokenize=False)
    except Exception:  # no template, or one that cannot be rendered: `render` says so when it is used
        return None
    _, found, rest = text.rpartition(mark)
    ids = tokenizer(rest.strip(), add_special_tokens=False)["input_ids"] if found else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def _nbytes(model: Any) -> int:
    """Bytes of all weights and buffers, tied ones counted once."""
    stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
              for t in (*model.parameters(), *model.buffers())}
    return sum(stores.values())


def _explain(error: Exception, folder: Path, name: str) -> FusionError:
    """A foreign exception in the house's words, without the path, which is nobody's business on a public page."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ResourceError("There is not enough memory to load this model", where=name,
                             todo="Close other models or choose a smaller one.")
    lines = str(error).replace(str(folder), name).strip().splitlines()
    found = f"This checkpoint cannot be loaded ({type(error).__name__}{': ' + lines[0] if lines else ''})"
    return CheckpointError(found, where=name, todo="Check that config, tokenizer and safetensors files are whole.")

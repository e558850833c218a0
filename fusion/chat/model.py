"""A chat model in memory: weights, tokenizer, and what a conversation needs to know. The border to transformers."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fusion.chat.ending import TextEnd, text_end, turn_end
from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError
from fusion.loading import build_model, load_model, tokenizer_in, tokenizer_of
from fusion.sources import open_checkpoint
from fusion.template import ChatTemplate

_LENGTHS = ("max_position_embeddings", "max_seq_len", "seq_length", "context_length")
_FRAMING = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "tekken.json", "*.tiktoken")


@dataclass(eq=False)
class ChatModel:
    """A causal language model that is ready to answer; weights are shared between threads and never changed.

    `stop_ids` end an answer, or `end` where words do; `nbytes` is the memory of weights and buffers; `context` the longest
    sequence in tokens; `template` None: it brings none.
    """

    name: str
    model: Any
    tokenizer: Any
    stop_ids: frozenset[int]
    nbytes: int
    context: int | None
    template: ChatTemplate | None = None
    end: TextEnd | None = None
    _tokenizing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of the text; `special` adds the marks (such as BOS) that the tokenizer sets by itself."""
        with self._tokenizing:  # fast tokenizers refuse to be borrowed by two threads
            return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """Text of the token ids as the model wrote it: without the marks that frame every text, with all others.

        Marks of thoughts and channels are special tokens in many vocabularies.
        """
        framing = {getattr(self.tokenizer, f"{name}_token_id", None) for name in _FRAMING}
        with self._tokenizing:
            return self.tokenizer.decode([i for i in ids if i not in framing], skip_special_tokens=False)


def load(model: Checkpoint | str | Path, name: str | None = None) -> ChatModel:
    """Load an open checkpoint, the folder of one (a Path: safetensors only), or one that is named as everywhere (text: a folder,
    "base+adapter", a model of the Hub); none of its code is run.

    On a CPU the weights become float32; on a GPU they keep their dtype. Raises what `open_checkpoint` and `load_model` raise.
    """
    import torch

    checkpoint = model if isinstance(model, Checkpoint) else _open(model, name)
    _check_vocabulary(checkpoint)
    on_gpu = torch.cuda.is_available()
    loaded = load_model(checkpoint, "auto" if on_gpu else torch.float32)
    return from_parts(loaded.to("cuda") if on_gpu else loaded, tokenizer_of(checkpoint), name or checkpoint.name)


def _open(ref: str | Path, name: str | None) -> Checkpoint:
    """The checkpoint that `ref` names; errors name it as people do, not by its path."""
    path, shown = str(ref), name or Path(ref).name
    try:
        return Checkpoint(ref, shown) if isinstance(ref, Path) else open_checkpoint(ref, name)
    except CheckpointError as error:
        where = shown if error.where in (None, path) else error.where
        raise CheckpointError(error.found.replace(path, shown), where=where, todo=error.todo) from error


def from_tensors(tensors: Mapping[str, Any], dtype: str, folder: Path, name: str) -> ChatModel:
    """Make a ChatModel of torch tensors by name; they take the way that loading them from a folder would take.

    `folder` holds the model's config, tokenizer and generation config. On a CPU the weights become float32; on a GPU they get
    `dtype`. Raises CheckpointError, ResourceError.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    model = build_model(tensors, folder, getattr(torch, dtype) if on_gpu else torch.float32, name)
    return from_parts(model.to("cuda") if on_gpu else model, tokenizer_in(folder, name), name)


def from_parts(model: Any, tokenizer: Any, name: str) -> ChatModel:
    """Make a ChatModel of parts in memory; takes the model over: eval mode, its generation config cleared."""
    from transformers import GenerationConfig

    config = model.config.get_text_config()
    # Rotary models state the length in the config; 0 or a missing value means that nothing limits it.
    context = next((length for name in _LENGTHS if (length := getattr(config, name, None))), None)
    template = _template(tokenizer, name)
    stop_ids = _stop_ids(model, tokenizer, config, template)
    # A checkpoint's generation config may bring top_k, repetition_penalty, suppressed tokens …, and `generate` takes
    # every option that is left at None from it. Compared models must sample alike: only an empty one may stand here.
    model.generation_config = GenerationConfig()
    return ChatModel(name, model.eval(), tokenizer, stop_ids, _nbytes(model), context, template, text_end(template))


def _template(tokenizer: Any, name: str) -> ChatTemplate | None:
    """The chat template: the only one, or of several "default", else the first."""
    text = tokenizer.chat_template
    if isinstance(text, Mapping):
        text = text.get("default") or next(iter(text.values()), None)
    return ChatTemplate(tokenizer, text, where=name) if text else None


def expected_bytes(model: Checkpoint | str | Path) -> int:
    """Memory that `load` will take, in bytes, from the file headers alone; raises CheckpointError."""
    import torch

    with nullcontext(model) if isinstance(model, Checkpoint) else closing(_open(Path(model), None)) as checkpoint:
        return checkpoint.nbytes if torch.cuda.is_available() else sum(4 * tensor.numel for tensor in checkpoint.info.values())


def _check_vocabulary(checkpoint: Checkpoint) -> None:
    # Without these files transformers makes up an empty tokenizer, and the model answers nonsense.
    if not any(fnmatch(file, pattern) for file in checkpoint.small_names() for pattern in VOCABULARIES):
        raise CheckpointError("There is no tokenizer here", where=checkpoint.name,
                              todo="Add tokenizer.json and tokenizer_config.json of the model it was made from.")


def _stop_ids(model: Any, tokenizer: Any, config: Any, template: ChatTemplate | None) -> frozenset[int]:
    """The union of all marks that may end an answer, since the parts of a merge often disagree about them."""
    configs = (config, model.config, model.generation_config)  # those of models that see name it outside of the text's
    named = (tokenizer.eos_token_id, turn_end(template), *(getattr(its, "eos_token_id", None) for its in configs))
    ids = {i for value in named for i in (value if isinstance(value, list | tuple) else (value,))}
    return frozenset(i for i in ids if isinstance(i, int) and 0 <= i < config.vocab_size)


def _nbytes(model: Any) -> int:
    """Bytes of all weights and buffers, tied ones counted once."""
    stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
              for t in (*model.parameters(), *model.buffers())}
    return sum(stores.values())

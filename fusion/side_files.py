"""The small files that belong to a model beside config and weights: which go with it into a merge, and which are left out.

    copied(model)                     # {"tokenizer.json": Path(…), "additional_chat_templates/tools.jinja": Path(…), …}
    left_out(model, model.config)     # ["generation_config.json is a link that leads out of the folder, …"]

They are known by name, as transformers and mistral-common read them. No link is followed out of the model's folder but into the
Hub's own cache, and code is never copied. Price: one look into a folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from fusion.checkpoint import Checkpoint
from fusion.files import read_json

MAX_BYTES, MAX_FILES = 200_000_000, 200  # of one file; of all
TEMPLATES = "additional_chat_templates"
_TOKENIZER = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"  # every kind
    r"|vocab\.(json|txt|bpe)|merges\.txt|encoder\.json|bpe\.codes|normalizer\.json"  # byte pairs, word pieces
    r"|tokenizer\.model(\.v\d\w*)?|(spiece|spm|sentencepiece|sentencepiece\.bpe|tiktoken|ice_text)\.model"  # SentencePiece
    r"|tekken\.json|[\w-][\w.-]*\.tiktoken")
_OTHER = re.compile(rf"chat_template\.(jinja|json)|{TEMPLATES}/[\w-][\w.-]*\.jinja|generation_config\.json"
                    r"|(\w+_)?(pre)?processor_config\.json|audio_tokenizer_config\.json")
_NAMING_CODE = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_CLASS = re.compile(r"([\w-][\w.-]*)\.\w+")


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name says what the tokens are."""
    return bool(_TOKENIZER.fullmatch(name))


def is_side_file(name: str) -> bool:
    """Whether a file of this name, its path within the folder, belongs to a model beside config and weights."""
    return is_tokenizer_file(name) or bool(_OTHER.fullmatch(name))


def copied(model: Checkpoint) -> dict[str, Path]:
    """Name → place of every side file of a model that goes with it."""
    return {name: file for name, file in _there(model) if not _why_not(name, file)}


def left_out(model: Checkpoint, config: Mapping[str, object]) -> list[str]:
    """What does not go with a model whose config is `config`, in words: side files that lie elsewhere, and code."""
    found = [why for name, file in _there(model) if (why := _why_not(name, file))]
    named = [config.get("auto_map"), *(read_json(model.file(file)).get("auto_map") for file in _NAMING_CODE)]
    code = sorted({name for auto_map in named for name in _code(auto_map)})
    if code:
        found.append(f"Its files name code ({', '.join(code[:5])}{' …' if len(code) > 5 else ''}), which is never copied. If you "
                     "trust it, lay it beside the result's config.json.")
    return found


def has_tokenizer(model: Checkpoint) -> bool:
    """Whether some file of a model that goes with it says what the tokens are."""
    settings = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    return any(is_tokenizer_file(name) and name not in settings for name in copied(model))


def _there(model: Checkpoint) -> Iterator[tuple[str, Path]]:
    names = [name for name in model.small_names() if is_side_file(name)]
    folder = model.file(TEMPLATES)
    if os.path.isdir(folder):
        with os.scandir(folder) as entries:
            names += sorted(f"{TEMPLATES}/{entry.name}" for entry in entries)[:MAX_FILES]
    for name in names[:MAX_FILES]:
        file = model.file(name)
        if is_side_file(name) and os.path.isfile(file):
            yield name, file


def _why_not(name: str, file: Path) -> str:
    """Why a side file does not go with its model, in words; "" where it does."""
    root = os.path.realpath(file.parents[name.count("/")])
    homes = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":  # the Hub's cache: names are links to contents
        homes.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    if os.path.commonpath([root, real := os.path.realpath(file)]) not in homes and os.path.dirname(real) not in homes:
        return f"{name} is a link that leads out of the folder, so it is not copied. Put the file itself there."
    if os.path.getsize(file) > MAX_BYTES:
        return f"{name} has more than {MAX_BYTES // 1_000_000} MB, so it is not copied."
    return ""


def _code(auto_map: object) -> Iterator[str]:
    """The files of code beside a config that its `auto_map` names; what lies in another repository is named by it."""
    for entry in auto_map.values() if isinstance(auto_map, dict) else ():
        for reference in entry if isinstance(entry, (list, tuple)) else (entry,):
            found = _CLASS.fullmatch(reference) if isinstance(reference, str) and "--" not in reference else None
            if found:
                yield f"{found[1]}.py"

"""The small files of a base with an adapter in it: whose tokens, whose chat template.

An adapter that was trained with other tokens or another template is only right with them. Trainers lay the whole tokenizer
beside every adapter, also where it is the base's: it counts where the adapter brings the embedding, or where it only adds tokens
that the base has rows for. Price: two tokenizers are read, once, when somebody asks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from fusion.adapter_parts import embedding_of
from fusion.checkpoint import Checkpoint, read_tokens
from fusion.files import file_names, read_json
from fusion.header import TensorInfo
from fusion.side_files import TEMPLATES, is_tokenizer_file

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", TEMPLATES)


class AdapterFiles:
    """Where the small files of `base` with the adapter of `folder` lie; `info` are its tensors, `new_table` says that the
    adapter brings the embedding."""

    def __init__(self, base: Checkpoint, folder: Path, info: Mapping[str, TensorInfo], new_table: bool):
        self._base, self._folder, self._info, self._new_table = base, folder, info, new_table

    def file(self, name: str) -> Path:
        """Where the file of this name lies, if there is one."""
        return self._folder / name if self._is_own(name) else self._base.file(name)

    def names(self) -> list[str]:
        """The names of all files that `file` finds, sorted."""
        found = {*self._base.small_names(), *file_names(self._folder, "")}
        return sorted(name for name in found if os.path.isfile(self.file(name)))

    def _is_own(self, name: str) -> bool:
        if name.startswith(_TEMPLATE_FILES):
            return self._own_template
        if not is_tokenizer_file(name):
            return False
        return self._own_tokens or (name == "tokenizer_config.json" and self._template_in_settings)

    @cached_property
    def _template_in_settings(self) -> bool:
        """Whether the template stands in the settings alone, so that these must be the adapter's."""
        return not os.path.isfile(self._folder / "chat_template.jinja") \
            and bool(read_json(self._folder / "tokenizer_config.json").get("chat_template"))

    @cached_property
    def _own_template(self) -> bool:
        return self._template_in_settings or os.path.isfile(self._folder / "chat_template.jinja")

    @cached_property
    def _own_tokens(self) -> bool:
        names = file_names(self._folder, "")
        if not any(is_tokenizer_file(name) and name not in _SETTINGS for name in names):
            return False
        return self._new_table or self._only_adds()

    def _only_adds(self) -> bool:
        mine, base, table = read_tokens(self._folder / "tokenizer.json")[0], self._base.vocabulary, embedding_of(self._base)
        if not mine or not base or table is None or mine == base:
            return False
        return mine.items() >= base.items() and max(mine.values()) < self._info[table].shape[0]

"""What an adapter's folder says of it: its kind, its base, the scale of every matrix, and where its weights are.

Price: one small JSON file. What would change the meaning of the numbers and is not known here is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from fusion.errors import CheckpointError
from fusion.files import file_names, read_json
from fusion.pickles import converted

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_UNKNOWN = ("use_qalora", "layer_replication", "target_parameters", "alora_invocation_tokens", "use_bdlora", "kasa_config",
            "monteclora_config", "arrow_config", "trainable_token_indices", "lora_bias")  # they change what the numbers mean
_MOVED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")  # these start from base weights of their own
SAVE_AGAIN = "Save the adapter again."
MERGE_IT = "Merge it into its base with peft's merge_and_unload and give that folder."


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own; some trainers lay the base's config beside it."""
    if not os.path.isfile(folder / CONFIG):
        return False
    weights = file_names(folder, ".safetensors", ".bin", ".pt", ".pth")
    return not os.path.isfile(folder / "config.json") or all(name.startswith(("adapter", "training_args")) for name in weights)


def wanted_base(folder: Path) -> str:
    """The base that an adapter says it was made for; "" when it does not say."""
    said = read_json(folder / CONFIG).get("base_model_name_or_path")
    return said if isinstance(said, str) else ""


def wants_text(folder: Path) -> str:
    """What to do about a base that does not fit."""
    base = wanted_base(folder)
    return f"The adapter was made for {base}." if base else "Give the base that the adapter was made for."


def read_settings(folder: Path) -> dict:
    """The adapter's settings; CheckpointError for another kind than LoRA, or one with parts that are not known here."""
    settings, where = read_json(folder / CONFIG), str(folder)
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"the adapter is of type {kind!r}; only LORA is known here", where=where, todo=MERGE_IT)
    odd = next((key for key in _UNKNOWN if settings.get(key)), None)
    start = settings.get("init_lora_weights")
    if odd is None and isinstance(start, str) and start.lower().startswith(_MOVED_BASE):
        odd = "init_lora_weights"
    if odd is not None:
        raise CheckpointError(f"the adapter uses {odd} = {settings[odd]!r}, which is not known here", where=where, todo=MERGE_IT)
    return settings


def trains_whole(settings: Mapping[str, object], module: str) -> bool:
    """Whether a module is one that the settings keep and train whole."""
    names = settings.get("modules_to_save")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return any(module == name or module.endswith(f".{name}") or f".{name}." in f".{module}." for name in names)


def weights_file(folder: Path) -> Path:
    """The safetensors file of the adapter, converted when it is a pickle; CheckpointError when there is none."""
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / "adapter_model.bin").is_file():
        return converted([folder / "adapter_model.bin"]) / "model.safetensors"
    raise CheckpointError(f"there is no {WEIGHTS}", where=str(folder), todo="Give the folder that the adapter was saved in.")


def scale_of(settings: Mapping[str, object], module: str, rank: int, where: str) -> float:
    """alpha ÷ rank, or alpha ÷ √rank when rank-stabilised; a pattern that the module's name ends with gives its own alpha."""
    patterns, alpha = settings.get("alpha_pattern"), settings.get("lora_alpha")
    for pattern, its in (patterns.items() if isinstance(patterns, dict) else ()):
        if _matches(pattern, module, where):
            alpha = its
            break
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9 or not rank:
        raise CheckpointError(f"lora_alpha is {alpha!r} at rank {rank}", where=where, todo=SAVE_AGAIN)
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _matches(pattern: str, module: str, where: str) -> bool:
    """Whether a pattern (a regular expression without repeated groups, which could take for ever) ends the module's name."""
    try:
        if len(re.findall(r"[*+{]", pattern)) > 2 or re.search(r"\)[*+?{]", pattern):
            raise ValueError("too involved")
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except (re.error, ValueError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"the alpha_pattern {pattern[:80]!r} cannot be used ({error})", where=where, todo=MERGE_IT) from error

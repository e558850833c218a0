"""What a config says of its model, in words that do not depend on the version of transformers that wrote it.

    differences(pivot.config, target.config)       # [Difference("rope_theta", 10000, 1000000)]
    stop_tokens(target)                            # {"config.json": (151645,), "generation_config.json": (151643, 151645)}

Bookkeeping, settings of training and of sampling are left out, and so is what shapes and tokenizer say better; rotary positions
are written out with their defaults, however they are kept. Defaults as in transformers 5 (modeling_rope_utils.py and the models'
configuration files); the table is long enough for models that write text.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError
from fusion.files import read_json

_THETA = {  # base of the rotary positions where a config names none; 10000 for all others
    "apertus": 12e6, "bitnet": 5e5, "cohere": 5e5, "csm": 5e5, "cwm": 1e6, "emu3_text_model": 1e6, "ernie4_5": 5e5,
    "ernie4_5_moe": 5e5, "exaone": 5e5, "flex_olmo": 5e5, "gemma3_text": 1e6, "gemma3n_text": 1e6, "gpt_oss": 15e4, "helium": 1e5,
    "lfm2": 1e6, "lfm2_moe": 1e6, "llama4_text": 5e5, "longcat_flash": 1e7, "minimax": 1e6, "minimax_m2": 5e6, "mixtral": 1e6,
    "mllama_text_model": 5e5, "olmo3": 5e5, "phimoe": 1e6, "qwen2_vl_text": 1e6, "qwen2_5_vl_text": 1e6, "qwen2_5_omni_text": 1e6,
    "qwen3_vl_text": 5e5, "qwen3_vl_moe_text": 5e5, "smollm3": 2e6, "solar_open": 1e6}
_PART = {  # share of a head's numbers that is turned; all for others
    "bamba": .5, "persimmon": .5, "glm": .5, "glm4": .5, "glm4_moe": .5, "gpt_neox": .25, "nemotron": .5, "phi": .5,
    "qwen3_next": .25, "recurrent_gemma": .5, "stablelm": .25}
_LOCAL = {"gemma3_text", "gemma3n_text", "olmo3"}  # scaling is not for layers with a sliding window
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_pct", "rotary_emb_base",
         "rope_local_base_freq", "original_max_position_embeddings")
_NOT_SAID = re.compile(
    r"_.*|architectures|auto_map|model_type|\w*transformers_version|transformers\.js_config|torch_dtype|unsloth_\w+|use_cache"
    r"|cache_implementation|pad_token_id|bos_token_id|eos_token_id|unk_token_id|sep_token_id|decoder_start_token_id|vocab_size"
    r"|tie_word_embeddings|attn_implementation|use_flash_attn|gradient_checkpointing|pretraining_tp|initializer_\w+|init_\w+"
    r"|\w*dropout\w*|\w+_pdrop|router_aux_loss_coef|router_jitter_noise|output_\w+|return_dict\w*|torchscript|use_bfloat16"
    r"|pruned_heads|chunk_size_feed_forward|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params"
    r"|is_(encoder_)?decoder|add_cross_attention|cross_attention_hidden_size|tie_encoder_decoder|tf_legacy_loss|prefix"
    r"|temperature|top_k|top_p|typical_p|do_sample|(max|min)_(length|new_tokens)|num_beam\w*|num_return_sequences|early_stopping"
    r"|\w+_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids|suppress_tokens|begin_suppress_tokens"
    r"|forced_(bos|eos)_token_id|remove_invalid_values|exponential_decay_length_penalty|tokenizer_class|is_composition")
_SHORT, _DEEPEST = 4, 20
_SAME = 1e-6  # relative: 1e-6 kept as float32 and written out again is the same setting


@dataclass(frozen=True)
class Difference:
    """One setting that differs: its dotted path, and both values as plain data (None where it is not set)."""

    setting: str
    first: object
    second: object


def differences(first: Mapping[str, object], second: Mapping[str, object]) -> list[Difference]:
    """The settings in which two configs differ, the first config's first."""
    mine, theirs = settings(first), settings(second)
    found = [Difference(key, mine.get(key), theirs.get(key)) for key in dict.fromkeys([*mine, *theirs])]
    return [one for one in found if not _equal(one.first, one.second)]


def told(here: Mapping[str, object], there: Mapping[str, object]) -> list[Difference]:
    """The differences in which both configs say something, if only null: what one leaves out may be its model's own default."""
    mine, theirs = _text(here), _text(there)
    return [one for one in differences(here, there) if one.setting != "dtype"
            and (one.first is not None or one.setting in mine) and (one.second is not None or one.setting in theirs)]


def in_words(one: Difference) -> str:
    """A difference between a model (`first`) and the pivot (`second`) on one short line, however long the values are."""
    here, there = one.first, one.second
    if isinstance(here, list) and isinstance(there, list) and max(len(here), len(there)) > _SHORT:
        if len(here) != len(there):
            return f"{one.setting} has {len(here)} entries here and {len(there)} in the pivot"
        odd = [i for i, pair in enumerate(zip(here, there, strict=True)) if not _equal(*pair)]
        return (f"{one.setting} differs in {len(odd)} of {len(here)} entries, first in number {odd[0]} "
                f"({_shown(here[odd[0]])} here, {_shown(there[odd[0]])} in the pivot)")
    return f"{one.setting} is {_shown(here)} here and {_shown(there)} in the pivot"


def _shown(value: object) -> str:
    if isinstance(value, list) and len(value) > _SHORT:
        return f"a list of {len(value)}"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def settings(config: Mapping[str, object]) -> dict[str, object]:
    """What matters in a config as one flat table: dotted path → value; the text model's settings stand at the top."""
    text = _text(config)
    found = flat({key: value for key, value in text.items() if key not in _ROPE})
    found = {key: value for key, value in found.items() if value is not None and not key.endswith(".dtype")
             and not any(map(_NOT_SAID.fullmatch, key.split(".")))}
    dtype = text.get("dtype", text.get("torch_dtype"))
    return {**found, **({"dtype": dtype} if isinstance(dtype, str) else {}), **_rope(text)}


def _text(config: Mapping[str, object]) -> dict[str, object]:
    """What a config says of the part that writes text, beside what it says of the others."""
    inner = config.get("text_config")
    text = {key: value for key, value in {**config, **(inner if isinstance(inner, dict) else {})}.items() if key != "text_config"}
    return {**text, **_windows(text)}


def flat(value: object, path: str = "") -> dict[str, object]:
    """Nested tables as one: dotted path → value; lists stay whole unless they hold tables, and what lies very deep is left out."""
    if path.count(".") > _DEEPEST:
        return {}
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        parts = enumerate(value, 1)
    else:
        return {path: value}
    return {key: inner for name, one in parts for key, inner in flat(one, f"{path}.{name}" if path else str(name)).items()}


def stop_tokens(model: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The ids that end a reply, by the file that names them; without one of its own generation goes by the config's."""
    inner = model.config.get("text_config")
    said = model.config.get("eos_token_id")
    said = inner.get("eos_token_id") if said is None and isinstance(inner, dict) else said
    try:
        generation = read_json(model.file("generation_config.json")).get("eos_token_id")
    except CheckpointError:  # whoever loads the model is told
        generation = None
    return {"config.json": _ids(said), "generation_config.json": _ids(said if generation is None else generation)}


def _ids(value: object) -> tuple[int, ...]:
    return tuple(sorted({one for one in (value if isinstance(value, list) else [value]) if type(one) is int}))


def _windows(text: Mapping[str, object]) -> dict[str, object]:
    """Settings of sliding windows: none where they are switched off, the kind of every layer where a pattern gives it."""
    kind, every, layers = text.get("model_type"), text.get("sliding_window_pattern"), text.get("num_hidden_layers")
    off = text.get("use_sliding_window", not (isinstance(kind, str) and kind.startswith("qwen"))) is False
    found: dict[str, object] = {"sliding_window": None, "max_window_layers": None, "use_sliding_window": None} if off else {}
    if type(every) is int and every > 0 and type(layers) is int and 0 < layers < 10_000:
        found |= {"sliding_window_pattern": None}
        if text.get("layer_types") is None:
            found["layer_types"] = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    kinds = text.get("layer_types")
    return {**found, **({"layer_types": None} if isinstance(kinds, list) and set(map(str, kinds)) == {"full_attention"} else {})}


def _rope(text: Mapping[str, object]) -> dict[str, object]:
    """Rotary positions, defaults filled in; where kinds of layers differ in them, a row for each."""
    kept = text.get("rope_parameters")
    kept = kept if isinstance(kept, dict) else text.get("rope_scaling")
    kept = kept if isinstance(kept, dict) else {}
    nested = {kind: its for kind, its in kept.items() if isinstance(its, dict)}
    if not nested:
        nested = {"": kept}
        kind = str(text.get("model_type"))
        if kind in _LOCAL or "rope_local_base_freq" in text:
            local = {"rope_theta": text.get("rope_local_base_freq", 1e4 if kind != "olmo3" else None)}
            nested = {"full_attention": kept, "sliding_attention": local}
    rows = {kind: _written_out(its, text) for kind, its in nested.items()}
    if all(its == next(iter(rows.values())) for its in rows.values()):
        rows = {"": next(iter(rows.values()))}
    return {f"{key} ({kind})" if kind else key: value for kind, its in rows.items() for key, value in its.items()}


def _written_out(said: Mapping[str, object], text: Mapping[str, object]) -> dict[str, object]:
    """The rotary positions of one kind of layers; numbers that no version of transformers reads are left out."""
    def number(*values: object) -> float | None:
        return next((float(value) for value in values if _is_number(value)), None)

    model, kind = str(text.get("model_type")), str(said.get("rope_type", said.get("type")) or "default")
    kind = {"su": "longrope", "mrope": "default"}.get(kind, kind)
    found: dict[str, object] = {
        "rope_type": kind, "rope_theta": number(said.get("rope_theta"), text.get("rope_theta"), text.get("rotary_emb_base"),
                                                _THETA.get(model), 1e4),
        "partial_rotary_factor": number(said.get("partial_rotary_factor"), text.get("partial_rotary_factor"),
                                        text.get("rotary_pct"), _PART.get(model), 1.0)}
    length = number(text.get("max_position_embeddings"))
    before = number(text.get("original_max_position_embeddings"), said.get("original_max_position_embeddings"), length)
    factor = number(said.get("factor"), length / before if length and before else None, 1.0)
    if kind == "default" or (factor == 1 and kind in ("linear", "yarn", "llama3")):
        return {**found, "rope_type": "default", **_list(said, "mrope_section")}
    found["rope_factor"] = factor
    if kind in ("yarn", "llama3", "longrope"):
        found["rope_original_length"] = before
    if kind == "yarn":
        found |= {"rope_beta_fast": number(said.get("beta_fast") or 32), "rope_beta_slow": number(said.get("beta_slow") or 1),
                  "rope_attention_factor": number(said.get("attention_factor"), _yarn(factor, said)),
                  "rope_truncate": said.get("truncate", True)}
    if kind == "llama3":
        found |= {f"rope_{name}": number(said.get(name)) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "longrope":
        natural = math.sqrt(1 + math.log(factor) / math.log(before)) if factor > 1 and before and before > 1 else 1.0
        found |= {"rope_attention_factor": number(said.get("attention_factor"), natural),
                  **_list(said, "short_factor"), **_list(said, "long_factor")}
    return {**found, **_list(said, "mrope_section")}


def _list(said: Mapping[str, object], name: str) -> dict[str, object]:
    return {f"rope_{name}": said[name]} if isinstance(said.get(name), list) else {}


def _yarn(factor: float, said: Mapping[str, object]) -> float:
    """What YaRN multiplies attention by (arXiv 2309.00071, eq. 22); two scales are divided."""
    def scale(by: object) -> float:
        return 0.1 * float(by) * math.log(factor) + 1 if factor > 1 else 1.0  # type: ignore[arg-type]

    over, under = said.get("mscale"), said.get("mscale_all_dim")
    both = _is_number(over) and _is_number(under) and over and under and scale(under)
    return scale(over) / scale(under) if both else scale(1)


def _is_number(value: object) -> bool:
    """Whether a value is a number that a float can hold."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _equal(one: object, other: object) -> bool:
    if one is None or other is None:  # what is not said is off
        return one is other or one is False or other is False
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if _is_number(one) and _is_number(other):
        return one == other or abs(one - other) <= _SAME * max(abs(one), abs(other))
    return one == other

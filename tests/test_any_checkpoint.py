"""Merges of checkpoints as people have them: pickled, FP8, adapters, other vocabularies; loaded again by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from fusion import Recipe, finish, merge
from fusion.sources import open_checkpoint
from tests.conftest import load_tensors
from tests.test_adapters import LORA

BLOCK = 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSECHAT_CACHE", str(tmp_path / "cache"))


def merged(pivot: object, *targets: object, out: Path, **options) -> Path:
    return finish(merge(Recipe(str(pivot), tuple(map(str, targets)), **options), out)).folder


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def loaded(folder: Path) -> transformers.PreTrainedModel:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    return model


def to_fp8(source: Path, folder: Path) -> Path:
    """The checkpoint as DeepSeek stores them: projections in FP8 with a scale per block."""
    shutil.copytree(source, folder)
    tensors = {}
    for name, value in load_tensors(folder).items():
        if "proj" not in name:
            tensors[name] = value
            continue
        rows, columns = (-(-size // BLOCK) for size in value.shape)
        scale = torch.stack([torch.stack([part.abs().max().float() / 448 for part in band.split(BLOCK, 1)])
                             for band in value.split(BLOCK)]).reshape(rows, columns)
        spread = scale.repeat_interleave(BLOCK, 0)[:len(value)].repeat_interleave(BLOCK, 1)[:, :value.shape[1]]
        tensors |= {name: (value.float() / spread).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_tokens(source: Path, folder: Path, *marks: str) -> Path:
    """The checkpoint after tokens were added as its users do it, padded to a multiple of 32 rows."""
    model, tokenizer = (auto.from_pretrained(source) for auto in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer))
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    model.resize_token_embeddings(320 + 32, mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_pickled_target_merges_to_the_same_bytes(family, tmp_path):
    pivot, first, second = family()
    pickled = tmp_path / "target-a"
    shutil.copytree(first, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(load_tensors(first), pickled / "pytorch_model.bin")
    both = [merged(pivot, target, second, out=tmp_path / name) for name, target in (("one", first), ("two", pickled))]
    assert weights(both[0]) == weights(both[1])


def test_fp8_checkpoints_merge_to_bfloat16(family, tmp_path):
    folders = [to_fp8(folder, tmp_path / f"fp8-{i}") for i, folder in enumerate(family())]
    result = merged(*folders, out=tmp_path / "out")
    assert "quantization_config" not in json.loads((result / "config.json").read_text())
    assert loaded(result).dtype == torch.bfloat16
    plain = load_tensors(merged(*family(), out=tmp_path / "plain"))
    for name, value in load_tensors(result).items():
        assert value.dtype == torch.bfloat16 and torch.allclose(value.float(), plain[name].float(), rtol=0.15, atol=0.03), name


def test_an_adapter_merges_like_the_model_it_makes(family, tmp_path):
    pivot, _, second = family()
    lora, rng = tmp_path / "lora", np.random.default_rng(0)
    parts = {f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_{part}.weight": rng.standard_normal(shape, np.float32) / 9
             for layer in (0, 1) for part, shape in (("A", (4, 32)), ("B", (48, 4)))}
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({**LORA, "r": 4}))
    save_arrays(parts, lora / "adapter_model.safetensors")
    whole = tmp_path / "whole"
    shutil.copytree(pivot, whole)
    model = open_checkpoint(f"{pivot}+{lora}")
    save_arrays({name: model[name] for name in model}, whole / "model.safetensors")
    names = {"names": ("a", "b")}
    both = [merged(pivot, target, second, out=tmp_path / out, **names) for out, target in (("1", f"{pivot}+{lora}"), ("2", whole))]
    assert weights(both[0]) == weights(both[1])
    loaded(both[0])


@pytest.mark.parametrize("mode", ["pivot", "common", "union"])
def test_models_of_other_vocabularies_merge_and_talk(family, tmp_path, mode):
    pivot, first, second = family()
    one, two = with_tokens(first, tmp_path / "one", "<|tool|>"), with_tokens(second, tmp_path / "two", "<|think|>", "<|tool|>")
    result = merged(pivot, one, two, out=tmp_path / "out", vocabulary=mode)
    tokenizer = transformers.AutoTokenizer.from_pretrained(result)
    text = "how are <|tool|> you <|im_end|> ñ"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and ("<|tool|>" in tokenizer.convert_ids_to_tokens(ids)) == (mode == "union")
    model = loaded(result)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 320
    before, after = (load_tensors(folder)["model.embed_tokens.weight"].float() for folder in (pivot, result))
    assert not torch.equal(before[:286], after[:286]) and torch.equal(before[290:], after[290:])

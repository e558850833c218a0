"""Packed dialogues: which row each goes into, and models that would let them see each other."""

from __future__ import annotations

from random import Random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fusion import Checkpoint, RecipeError
from fusion.progress import finish
from fusion.train import Training, estimate
from fusion.train.packing import leak, pack, refuse_leaks
from fusion.train.trainer import train
from tests.conftest import save_family, tiny_tokenizer
from tests.test_heads import SMALL
from tests.test_train import FAST, examples

KEEP = {"llama": {}, "mistral": {"sliding_window": 8}, "qwen2": {}, "gemma2": {"head_dim": 8}, "gpt_neox": {},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, "falcon": {"alibi": True}, "cohere": {}}
LEAK = {"bloom": {"n_layer": 2, "n_head": 4}, "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4}, "mamba": {"state_size": 8},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "recurrent_gemma": {"lru_width": 32, "head_dim": 8},
        "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}, "rwkv": {"attention_hidden_size": 32},
        "lfm2": {"layer_types": ["conv", "full_attention"]}}


def made(kind: str, **extra):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, "initializer_range": 0.2, **extra}))


@pytest.mark.parametrize("kind", KEEP)
def test_dialogues_are_kept_apart(kind):
    model = made(kind, **KEEP[kind])
    assert leak(model, model) < 1e-5 and model.training
    refuse_leaks(model, model)


@pytest.mark.parametrize("kind", LEAK)
def test_a_state_that_leaks_is_seen(kind):
    model = made(kind, **LEAK[kind])
    with pytest.raises(RecipeError, match=rf"{type(model).__name__} does not keep packed dialogues apart.*Leave `pack` out"):
        refuse_leaks(model, model)
    with pytest.raises(RecipeError):
        refuse_leaks(model, model, exact=False)


def test_a_training_that_would_leak_is_refused_before_its_first_step(tmp_path):
    made("bloom", **LEAK["bloom"], vocab_size=320).save_pretrained(tmp_path / "pivot")
    tiny_tokenizer().save_pretrained(tmp_path / "pivot")
    settings = Training(**{**vars(FAST), "pack": True, "max_tokens": 60})
    steps = []
    with pytest.raises(RecipeError, match="BloomForCausalLM does not keep"):
        finish(train(tmp_path / "pivot", examples(), tmp_path / "out", settings), steps.append)
    assert not steps and not (tmp_path / "out").exists()
    finish(train(tmp_path / "pivot", examples(), tmp_path / "alone", FAST))


def first_fit(lengths: list[int], room: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        into = next((row for row in rows if sum(lengths[j] for j in row) + lengths[i] <= room), None)
        rows.append([i]) if into is None else into.append(i)
    return rows


def test_rows_are_those_of_first_fit():
    for seed in range(60):
        rng = Random(seed)
        lengths = [rng.randint(1, rng.choice([5, 50])) for _ in range(rng.randint(0, 70))]
        assert pack(lengths, 50) == first_fit(lengths, 50)
    assert len(pack([60] * 20_000, 2048)) == -(-20_000 // 34)


@pytest.mark.parametrize(("lengths", "changes", "steps"), [
    ([60] * 5000, {"pack": True}, 111), ([60] * 5000, {}, 939), ([2000, 40, 40, 1900, 100, 100], {"pack": True}, 3),
    ([60] * 5, {"pack": True, "max_steps": 7}, 7)])
def test_steps_are_counted_as_they_will_be(tmp_path, lengths, changes, steps):
    pivot = Checkpoint(save_family(tmp_path, targets=0, dtype="float32")[0])
    assert estimate(pivot, lengths, Training(**changes)).steps == steps


def test_a_packed_batch_is_one_row(tmp_path):
    pivot = Checkpoint(save_family(tmp_path, targets=0, dtype="float32")[0])
    one, many = (estimate(pivot, [60] * 500, Training(pack=True, batch=batch)) for batch in (1, 64))
    assert one == many and one.memory_bytes > estimate(pivot, [60] * 500, Training(batch=4)).memory_bytes


def test_the_trainer_takes_the_steps_that_were_predicted(tmp_path):
    folder, data = save_family(tmp_path, targets=0, dtype="float32")[0], examples(11)
    lengths = [len(example.ids) for example in data]
    for changes in ({"pack": True, "max_tokens": 30, "accumulate": 2}, {"batch": 2, "accumulate": 3}, {"batch": 4, "epochs": 1.5}):
        settings = Training(**{**vars(FAST), "max_steps": -1, "epochs": 1.0, **changes})
        result = finish(train(folder, data, tmp_path / str(len(changes)) / str(settings.batch), settings))
        assert result.history[-1]["step"] == estimate(Checkpoint(folder), lengths, settings).steps

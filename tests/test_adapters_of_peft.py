"""fusion.adapters against peft alive: adapters as today's peft saves them answer as the trained model does, or are refused."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from fusion import chat
from fusion.adapters import Adapted
from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError, FusionError
from fusion.evaluate.models import load
from fusion.loading import load_model, stored_as_read, tokenizer_of
from fusion.merge import merge
from fusion.preflight import preflight
from fusion.progress import finish
from fusion.recipe import Recipe
from fusion.sources import open_checkpoint
from tests.conftest import TEMPLATE, load_tensors, tiny_tokenizer
from tests.test_alike import CONFIGS, made, saved

X = torch.arange(4, 40)[None]
OTHER = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory, family):
    """`base(kind)`: the folder of a base model; "gemma" ties its head by its class, without a word in the config."""
    def make(kind):
        if kind == "llama":
            return family()[0]
        torch.manual_seed(3)
        config = transformers.GemmaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
                                          num_attention_heads=4, num_key_value_heads=2) if kind == "gemma" else CONFIGS[kind]()
        return saved(tmp_path_factory.mktemp(kind) / kind, made(config), False)
    return lru_cache(make)


def trained(base, folder, tokens=(), template=None, **settings):
    """An adapter by peft, its weights drawn; returns the live model."""
    torch.manual_seed(1)
    auto = transformers.AutoModelForCausalLM if "gemma3" not in base.name else transformers.AutoModelForImageTextToText
    model, tokenizer = auto.from_pretrained(base, dtype=torch.float32), transformers.AutoTokenizer.from_pretrained(base)
    if tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
        model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size + 1))
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **settings))
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if template:
        tokenizer.chat_template = template
    if tokens or template:
        tokenizer.save_pretrained(folder)
    return model.eval()


def difference(ref, live) -> float:
    """The largest difference of logits between a model of ours and a live one."""
    with torch.inference_mode():
        return float((load(str(ref), "its").model.cpu()(input_ids=X).logits - live(input_ids=X).logits).abs().max())


EMBEDDING = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
RIGHT = {
    "tied, embedding trained": ("gemma", {}, EMBEDDING),
    "tied, both trained as one": ("gemma", {}, {**EMBEDDING, "ensure_weight_tying": True}),
    "tied, new tokens, embedding trained": ("gemma", {"tokens": ("<|new|>",)}, EMBEDDING),
    "tied, new tokens": ("gemma", {"tokens": ("<|new|>",)}, {"target_modules": ["q_proj"]}),
    "tied, an adapter in the embedding": ("gemma", {}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied, an adapter in both as one": ("gemma", {}, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied, new tokens, an adapter in the embedding": ("gemma", {"tokens": ("<|new|>",)}, {"target_modules": ["embed_tokens"]}),
    "a head of another name": ("neox", {}, {"target_modules": ["query_key_value"], "modules_to_save": ["lm_head"]}),
    "new tokens, both trained": ("llama", {"tokens": ("<|new|>",)},
                                 {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "routers trained": ("mixtral", {}, {"target_modules": ["q_proj"], "modules_to_save": ["gate"]}),
    "experts trained": ("mixtral", {}, {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}),
    "a model that sees": ("gemma3", {}, {"target_modules": r".*language_model.*\.(q_proj|down_proj)"}),
    "patterns that begin with the name in memory": ("gemma3", {}, {
        "target_modules": r".*language_model.*\.q_proj",
        "alpha_pattern": {r"^model\.language_model\.layers\.1\.self_attn\.q_proj": 64}}),
}


@pytest.mark.parametrize("case", RIGHT)
def test_the_base_with_an_adapter_answers_as_peft_alive(base, tmp_path, case):
    kind, more, settings = RIGHT[case]
    live = trained(base(kind), tmp_path / "lora", **more, **settings)
    ref = f"{base(kind)}+{tmp_path / 'lora'}"
    assert difference(ref, live) < 1e-4
    if "tokens" not in more:
        assert difference(base(kind), live) > 0.01  # it does something


def test_a_conversation_takes_a_base_with_an_adapter_by_its_name(base, tmp_path):
    live = trained(base("llama"), tmp_path / "lora", ("<|new|>",), OTHER, target_modules=["q_proj"])
    model = chat.load(f"{base('llama')}+{tmp_path / 'lora'}")
    assert len(model.encode("<|new|>")) == 1 and model.template.text == OTHER
    with torch.inference_mode():
        assert torch.allclose(model.model.cpu()(input_ids=X).logits, live(input_ids=X).logits, atol=1e-4)


def test_a_merge_of_a_tied_model_with_a_trained_embedding_is_untied_and_answers_alike(base, tmp_path):
    live = trained(base("gemma"), tmp_path / "lora", **EMBEDDING)
    ref = f"{base('gemma')}+{tmp_path / 'lora'}"
    model = open_checkpoint(ref)
    assert not model.tied and model.config["tie_word_embeddings"] is False
    finish(merge(Recipe(ref, (ref,), ("its",), method="linear", dtype="float32"), tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert difference(tmp_path / "out", live) < 1e-4


REFUSED = {"target_parameters": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
           "trainable_token_indices": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5]})}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_is_not_known_is_refused_by_the_word_of_the_setting(base, tmp_path, setting):
    kind, settings = REFUSED[setting]
    trained(base(kind), tmp_path / "lora", **settings)
    with pytest.raises(CheckpointError, match=rf"{setting}.*merge_and_unload"):
        open_checkpoint(f"{base(kind)}+{tmp_path / 'lora'}")


def test_more_tokens_in_the_embedding_alone_are_refused_before_anything_is_read(base, tmp_path):
    trained(base("llama"), tmp_path / "lora", ("<|new|>",), target_modules=["embed_tokens"])
    with pytest.raises(CheckpointError, match="brings the embedding with other tokens than the base, without the head"):
        open_checkpoint(f"{base('llama')}+{tmp_path / 'lora'}")


def test_a_head_that_classifies_is_named_by_its_setting(base, tmp_path):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base("llama"), num_labels=2)
    get_peft_model(model, LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(FusionError, match=r"modules_to_save: base_model.model.score.weight .*merge_and_unload"):
        open_checkpoint(f"{base('llama')}+{tmp_path / 'lora'}")


# ── tokens and template ──────────────────────────────────────────────────────────────────────────────────────────────


def test_new_tokens_and_template_are_those_of_the_adapter_everywhere(base, tmp_path):
    trained(base("llama"), tmp_path / "lora", ("<|new|>",), OTHER, target_modules=["q_proj"],
            modules_to_save=["embed_tokens", "lm_head"])
    model = open_checkpoint(f"{base('llama')}+{tmp_path / 'lora'}")
    assert "<|new|>" in model.vocabulary and model.chat_template == OTHER and model.vocab_size == 321
    tokenizer = tokenizer_of(model)
    assert tokenizer.chat_template == OTHER and len(tokenizer("<|new|>")["input_ids"]) == 1
    finish(merge(Recipe(f"{base('llama')}+{tmp_path / 'lora'}", (str(base("llama")),), ("b",), method="linear", vocabulary="pivot"),
                 tmp_path / "out"))
    assert Checkpoint(tmp_path / "out").chat_template == OTHER and "<|new|>" in Checkpoint(tmp_path / "out").vocabulary


@pytest.mark.parametrize("where", ["a file", "the settings"])
def test_a_template_alone_is_taken_and_the_tokens_stay_the_bases(base, tmp_path, where):
    trained(base("llama"), tmp_path / "lora", (), OTHER, target_modules=["q_proj"])
    if where == "the settings":  # as tokenizers were saved before templates had a file
        (tmp_path / "lora" / "chat_template.jinja").unlink()
        settings = json.loads((tmp_path / "lora" / "tokenizer_config.json").read_text())
        (tmp_path / "lora" / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": OTHER}))
    model = open_checkpoint(f"{base('llama')}+{tmp_path / 'lora'}")
    assert Checkpoint(base("llama")).chat_template == TEMPLATE and model.chat_template == OTHER
    assert tokenizer_of(model).chat_template == OTHER
    assert model.file("tokenizer.json").parent == base("llama")
    assert preflight(Checkpoint(base("llama")), [model]).level != "bad"


@pytest.mark.parametrize(("count", "own"), [(1, True), (60, False)])
def test_tokens_that_the_base_has_rows_for_are_the_adapters_others_are_not(base, tmp_path, count, own):
    trained(base("llama"), tmp_path / "lora", target_modules=["q_proj"])
    tokenizer = tiny_tokenizer().__class__.from_pretrained(base("llama"))  # at most 300 tokens, 320 rows
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|new {i}|>" for i in range(count)]})
    tokenizer.save_pretrained(tmp_path / "lora")
    model = open_checkpoint(f"{base('llama')}+{tmp_path / 'lora'}")
    assert ("<|new 0|>" in model.vocabulary) == own


# ── habits of trainers ───────────────────────────────────────────────────────────────────────────────────────────────


def rewritten(folder, change):
    """The adapter's tensors, changed."""
    file = folder / "adapter_model.safetensors"
    tensors = change(load_file(file))
    save_file(tensors, file)
    return tensors


HABITS = {
    "no outer names": lambda tensors: {name.removeprefix("base_model.model."): value for name, value in tensors.items()},
    "a name of its own": lambda tensors: {name.replace("lora_A.", "lora_A.mine.").replace("lora_B.", "lora_B.mine."): value
                                          for name, value in tensors.items()},
    "a head that judges": lambda tensors: {**tensors, "v_head.summary.weight": torch.ones(1, 32)},
    "outer names of a wrapper": lambda tensors: {name.replace("base_model.model.", "base_model.model._orig_mod."): value
                                                 for name, value in tensors.items()},
}


@pytest.mark.parametrize("habit", HABITS)
def test_adapters_as_trainers_leave_them(base, tmp_path, habit):
    live = trained(base("llama"), tmp_path / "lora", target_modules=["q_proj", "down_proj"])
    rewritten(tmp_path / "lora", HABITS[habit])
    assert difference(f"{base('llama')}+{tmp_path / 'lora'}", live) < 1e-4


def test_an_adapter_beside_the_bases_config_is_an_adapter(base, tmp_path):
    trained(base("llama"), tmp_path / "lora", target_modules=["q_proj"])
    shutil.copy(base("llama") / "config.json", tmp_path / "lora" / "config.json")
    with pytest.raises(CheckpointError, match="this is an adapter, not a whole model"):
        open_checkpoint(str(tmp_path / "lora"))
    assert isinstance(open_checkpoint(f"{base('llama')}+{tmp_path / 'lora'}"), Adapted)


def test_a_whole_model_with_a_left_over_adapter_is_the_whole_model_for_all(base, tmp_path):
    whole = tmp_path / "whole"
    trained(base("llama"), tmp_path / "lora", target_modules=["q_proj"])
    shutil.copytree(base("llama"), whole)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "lora" / name, whole / name)
    model, name = open_checkpoint(str(whole)), "model.layers.0.self_attn.q_proj.weight"
    assert not stored_as_read(model)
    assert torch.equal(load_model(model, "float32").state_dict()[name], torch.from_numpy(model[name]))
    assert np.array_equal(model[name], load_tensors(base("llama"))[name].float().numpy())


# ── DoRA ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_norms_of_a_matrix_are_taken_once(base, tmp_path, monkeypatch):
    live = trained(base("llama"), tmp_path / "lora", target_modules=["q_proj", "up_proj"], use_dora=True)
    taken, real = [], Adapted._read_norms
    monkeypatch.setattr(Adapted, "_read_norms", lambda self, name: taken.append(name) or real(self, name))
    model = open_checkpoint(f"{base('llama')}+{tmp_path / 'lora'}")
    for _ in range(2):
        for name, tensor in model.info.items():
            for start in range(0, tensor.numel, 100):
                model.read(name, start, min(start + 100, tensor.numel), np.empty(100, np.float32))
    assert len(taken) == len(set(taken)) == 4
    assert difference(f"{base('llama')}+{tmp_path / 'lora'}", live) < 1e-4

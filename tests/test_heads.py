"""The head of a model at some positions, in slices: the same logits and gradients as those of everything."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fusion.distill import heads
from fusion.distill.heads import Head

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.4, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 0}
SPLIT = {  # what each does after its head
    "llama": {}, "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, "phi": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.0625}, "granite": {"logits_scaling": 8.0}, "mixtral": {"num_local_experts": 4},
    "recurrent_gemma": {"logits_soft_cap": 3.0, "lru_width": 32, "head_dim": 8}, "mamba": {"state_size": 8}}
PLACES = torch.tensor([1, 2, 3, 7, 8, 13, 14, 20, 25, 26, 27, 28, 29, 34])  # of 3 rows of 12 tokens


def made(kind: str, **extra):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **extra})).eval()


def of_all(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[PLACES]


@pytest.fixture(autouse=True)
def short_slices(monkeypatch):
    monkeypatch.setattr(heads, "SLICE_LOGITS", 97 * 5)


@pytest.mark.parametrize("kind", [*SPLIT, "bert"])
def test_logits_and_gradients_are_those_of_all_positions(kind):
    model, ids = made(kind, **SPLIT.get(kind, {"is_decoder": True})), torch.arange(36).reshape(3, 12) * 7 % 90 + 3
    head, seen = Head(model), []

    def use(logits: torch.Tensor, part: slice) -> torch.Tensor:
        seen.append((len(logits), part.start))
        return logits

    whole = of_all(model, ids)
    assert torch.allclose(torch.cat(head(PLACES, use, input_ids=ids, use_cache=False)), whole, rtol=0, atol=1e-6)
    assert seen == [(5, 0), (5, 5), (4, 10)] and head.whole == (kind == "bert")  # whose head is not the model's own
    whole.float().logsumexp(1).sum().backward()
    wanted = {name: its.grad.clone() for name, its in model.named_parameters() if its.grad is not None}
    model.zero_grad()
    sum(head(PLACES, lambda logits, part: logits.float().logsumexp(1).sum(), input_ids=ids, use_cache=False)).backward()
    for name, its in model.named_parameters():
        if name in wanted:
            assert (its.grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-9, name


def test_a_model_that_does_something_unknown_gives_its_full_logits():
    model, ids = made("llama"), torch.arange(36).reshape(3, 12) + 3

    class Odd(type(model)):
        def forward(self, *given, **inputs):
            found = super().forward(*given, **inputs)
            found.logits = found.logits.sin()
            return found

    model.__class__ = Odd
    head = Head(model)
    found = torch.cat(head(PLACES, lambda logits, part: logits, input_ids=ids, use_cache=False))
    assert head.whole and torch.equal(found, of_all(model, ids))


def test_no_logits_of_all_positions_are_made():
    model, widths = made("llama"), []
    model.lm_head.register_forward_hook(lambda module, given, result: widths.append(result.numel() // 97))
    ids = torch.arange(36).reshape(3, 12) + 3
    Head(model)(PLACES, lambda logits, part: len(logits), input_ids=ids, use_cache=False)
    assert sorted(widths) == [1, 1, 4, 5, 5]  # the model's own answer for one place, the same compared, three slices


def test_a_batch_without_labels_has_one_empty_slice():
    nothing = torch.zeros(0, dtype=torch.long)
    found = Head(made("llama"))(nothing, lambda logits, part: logits.shape, input_ids=torch.ones(1, 4, dtype=torch.long))
    assert found == [(0, 97)]


def test_processes_that_gather_a_head_together_have_as_many_slices(monkeypatch):
    head = torch.nn.Linear(4, 97)
    assert [(part.start, part.stop) for part in heads._parts(12, 97, head)] == [(0, 5), (5, 10), (10, 12)]
    head.weight.ds_id = 1  # DeepSpeed's mark of a parameter that lies in pieces
    monkeypatch.setattr(heads, "_most", lambda number, device: number + 2)
    assert [(part.start, part.stop) for part in heads._parts(7, 97, head)] == [(0, 5), (5, 7), (7, 7), (7, 7)]

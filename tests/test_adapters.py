"""fusion.adapters: LoRA merged while reading. The formulas were compared with peft's own merge, which agrees to rounding."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fusion.adapters import Adapted
from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError, FusionError, MismatchError
from fusion.sources import open_checkpoint
from tests.conftest import save_checkpoint

Q, UP, EMBED, HEAD = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight",
                      "lm_head.weight")
BASE = {EMBED: np.arange(15, dtype=np.float32).reshape(5, 3), Q: np.arange(6, dtype=np.float32).reshape(2, 3),
        UP: np.ones((3, 3), np.float32), HEAD: np.ones((5, 3), np.float32),
        "model.layers.1.mlp.up_proj.bias": np.zeros(3, np.float32)}
A, B = np.array([[1, 0, 2]], np.float32), np.array([[3], [5]], np.float32)  # rank 1 for q_proj: B·A = [[3, 0, 6], [5, 0, 10]]
SQUARE = np.array([[1, 2, 3]], np.float32), np.array([[1], [0], [2]], np.float32)
LORA = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "base_model_name_or_path": "org/base"}


def key(tensor: str, part: str) -> str:
    return f"base_model.model.{tensor.removesuffix('.weight')}.{part}"


def pair(tensor: str = Q, down: np.ndarray = A, up: np.ndarray = B) -> dict[str, np.ndarray]:
    return {key(tensor, "lora_A.weight"): down, key(tensor, "lora_B.weight"): up}


def save_adapter(folder: Path, tensors: dict[str, np.ndarray], **settings) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**LORA, **settings}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def opened(tmp_path):
    def open_it(tensors: dict[str, np.ndarray], base: dict | None = None, config: dict | None = None, **settings) -> Adapted:
        save_checkpoint(tmp_path / "base", base or BASE, config=config)
        save_adapter(tmp_path / "lora", tensors, **settings)
        return open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'lora'}")
    return open_it


def test_a_matrix_becomes_w_plus_scale_times_b_a(opened):
    model = opened(pair())
    assert model[Q].tolist() == [[0 + 6, 1, 2 + 12], [3 + 10, 4, 5 + 20]]  # scale = 2 ÷ 1
    assert all(np.array_equal(model[name], value) for name, value in BASE.items() if name != Q)
    assert (model.name, set(model), model.plain(Q), model.plain(UP)) == ("base+lora", set(BASE), False, True)


@pytest.mark.parametrize(("settings", "scale"), [
    ({"lora_alpha": 16}, 4), ({"lora_alpha": 16, "use_rslora": True}, 8),
    ({"alpha_pattern": {"q_proj": 20}}, 5), ({"alpha_pattern": {"up_proj": 20, "model.layers.0.self_attn.q_proj": 8}}, 2),
    ({"alpha_pattern": {r"^model\.layers\.\d+\.self_attn.q_proj": 8}}, 2), ({"alpha_pattern": {"proj": 20}}, 0.5),
    ({"rank_pattern": {"q_proj": 4}, "r": 1}, 0.5),
])
def test_the_scale_is_alpha_by_the_rank_of_the_matrix(opened, settings, scale):
    down, up = np.eye(4, 3, dtype=np.float32), np.ones((2, 4), np.float32)
    assert np.array_equal(opened(pair(Q, down, up), **settings)[Q], BASE[Q] + scale * (up @ down))


@pytest.mark.parametrize("flag", [True, False])
def test_a_square_matrix_is_turned_when_the_settings_say_so(opened, flag):
    delta = SQUARE[1] @ SQUARE[0]
    assert np.array_equal(opened(pair(UP, *SQUARE), fan_in_fan_out=flag)[UP], 1 + 2 * (delta.T if flag else delta))


def test_a_matrix_stored_the_other_way_round_is_seen(opened):
    base = {**BASE, Q: BASE[Q].T.copy()}
    assert np.array_equal(opened(pair(), base)[Q], base[Q] + 2 * (B @ A).T)


def test_the_embedding_can_have_an_adapter(opened):
    down, up = np.arange(5, dtype=np.float32)[None], np.ones((3, 1), np.float32)
    model = opened({key(EMBED, "lora_embedding_A"): down, key(EMBED, "lora_embedding_B"): up})
    assert np.array_equal(model[EMBED], BASE[EMBED] + 2 * np.arange(5, dtype=np.float32)[:, None])


def test_dora_scales_every_row_to_its_magnitude(opened):
    model = opened({**pair(), key(Q, "lora_magnitude_vector"): np.array([2, 10], np.float32)}, use_dora=True)
    wanted = BASE[Q] + 2 * (B @ A)
    wanted *= np.array([[2], [10]]) / np.linalg.norm(wanted, axis=1, keepdims=True)
    assert np.allclose(model[Q], wanted, rtol=1e-6)
    assert np.allclose(np.linalg.norm(model[Q], axis=1), [2, 10], rtol=1e-6)


def test_whole_tensors_and_biases_replace_the_bases(opened):
    head, bias = np.full((5, 3), 7, np.float32), np.full(3, 9, np.float32)
    model = opened({"base_model.model.lm_head.weight": head, "base_model.model.model.layers.1.mlp.up_proj.bias": bias}, bias="all")
    assert np.array_equal(model[HEAD], head) and np.array_equal(model["model.layers.1.mlp.up_proj.bias"], bias)
    assert model.plain(HEAD) and np.array_equal(np.frombuffer(model.raw(HEAD), np.float32).reshape(5, 3), head)


def test_an_embedding_saved_beside_its_adapter_comes_first(opened):
    whole = {f"base_model.model.{EMBED.replace('.weight', '.base_layer.weight')}": 10 * BASE[EMBED]}
    down, up = np.ones((1, 5), np.float32), np.ones((3, 1), np.float32)
    model = opened({**whole, key(EMBED, "lora_embedding_A"): down, key(EMBED, "lora_embedding_B"): up})
    assert np.array_equal(model[EMBED], 10 * BASE[EMBED] + 2)


def test_more_tokens_bring_their_tokenizer(opened, tmp_path):
    table = np.ones((7, 3), np.float32)
    model = opened({"base_model.model.model.embed_tokens.weight": table, "base_model.model.lm_head.weight": table})
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    (tmp_path / "lora" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    assert (model.info[EMBED].shape, model.vocab_size, model.vocabulary) == ((7, 3), 7, {"a": 0, "b": 1})


TIED = {name: value for name, value in BASE.items() if name != HEAD}


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_with_an_adapter_is_a_matrix_of_its_own(opened, stored):
    base = {**TIED, HEAD: BASE[EMBED]} if stored else TIED
    model = opened(pair(HEAD, A, np.ones((5, 1), np.float32)), base, {"tie_word_embeddings": True})
    assert np.array_equal(model[HEAD], BASE[EMBED] + 2 * A) and np.array_equal(model[EMBED], BASE[EMBED])
    assert not model.tied and not model.tied_copies


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("one", [False, True])
def test_a_tied_head_follows_an_embedding_with_an_adapter_only_where_both_were_trained_as_one(opened, stored, one):
    down, up = np.ones((1, 5), np.float32), np.ones((3, 1), np.float32)
    parts = {key(EMBED, "lora_embedding_A"): down, key(EMBED, "lora_embedding_B"): up}
    base = {**TIED, HEAD: BASE[EMBED]} if stored else TIED
    model = opened(parts, base, {"tie_word_embeddings": True}, ensure_weight_tying=one)
    assert np.array_equal(model[EMBED], BASE[EMBED] + 2) and model.tied == one
    assert model.tied_copies == ({HEAD} if stored and one else set())
    assert one or np.array_equal(model[HEAD], BASE[EMBED])


def test_outer_names_may_differ(opened):
    base = {name.removeprefix("model."): value for name, value in BASE.items()}
    assert opened(pair(), base)["layers.0.self_attn.q_proj.weight"][0].tolist() == [6, 1, 14]


def test_an_old_adapter_is_a_pickle(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSECHAT_CACHE", str(tmp_path / "cache"))
    save_checkpoint(tmp_path / "base", BASE)
    folder = save_adapter(tmp_path / "lora", {})
    (folder / "adapter_model.safetensors").unlink()
    torch.save({name: torch.from_numpy(value) for name, value in pair().items()}, folder / "adapter_model.bin")
    assert open_checkpoint(f"{tmp_path / 'base'}+{folder}")[Q][0].tolist() == [6, 1, 14]


def big(tmp_path: Path, use_dora: bool) -> Adapted:
    rng = np.random.default_rng(0)
    def numbers(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)
    name = tmp_path / f"big-{use_dora}"
    if not name.exists():
        save_checkpoint(name / "base", {Q: numbers(300, 170)}, "bfloat16")
        extra = {key(Q, "lora_magnitude_vector"): numbers(300)} if use_dora else {}
        save_adapter(name / "lora", {**pair(Q, numbers(7, 170), numbers(300, 7)), **extra}, use_dora=use_dora)
    return Adapted(Checkpoint(name / "base"), name / "lora")


@pytest.mark.parametrize("use_dora", [False, True])
@given(span=st.tuples(st.integers(0, 51_000), st.integers(0, 51_000)).map(sorted))
def test_any_part_has_the_very_bytes_of_the_whole(tmp_path_factory, use_dora, span):
    model = big(tmp_path_factory.getbasetemp(), use_dora)
    part = model.read(Q, *span, np.empty(51_000, np.float32))
    assert part.tobytes() == model[Q].reshape(-1)[slice(*span)].tobytes()


def test_threads_read_the_same(tmp_path):
    model, wrong = big(tmp_path, True), []
    wanted = big(tmp_path, True)[Q]
    threads = [threading.Thread(target=lambda: wrong.append(not np.array_equal(model[Q], wanted))) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == [False] * 4


def test_the_adapter_is_part_of_every_mark(tmp_path):
    base = Checkpoint(save_checkpoint(tmp_path / "base", BASE))
    one, two = (Adapted(base, save_adapter(tmp_path / f"{value}", pair(Q, A * value))) for value in (1, 2))
    for mark in ("fingerprint", "stamp", "origin"):
        assert len({getattr(model, mark) for model in (base, one, two)}) == 3, mark


def test_an_adapter_alone_says_what_base_it_wants(tmp_path):
    folder = save_adapter(tmp_path / "lora", pair())
    with pytest.raises(CheckpointError, match=r"an adapter, not a whole model.*Write BASE\+.*it was made for org/base"):
        open_checkpoint(folder)
    nameless = save_adapter(tmp_path / "nameless", pair(), base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="a base that it does not name"):
        open_checkpoint(nameless)


@pytest.mark.parametrize(("tensors", "settings", "words"), [
    (pair("model.layers.0.self_attn.k_proj.weight"), {},
     "belongs to no tensor of base. Did you mean 'model.layers.0.self_attn.q_proj"),
    (pair(Q, A, np.ones((4, 1), np.float32)), {},
     "shape [2, 3] in base, the adapter is for [4, 3]. The adapter was made for org/base"),
    (pair(Q, A, np.ones((2, 2), np.float32)), {}, "only matrices are known"),
    (pair("model.layers.1.mlp.up_proj.bias", A, np.ones((3, 1), np.float32)), {}, "belongs to no tensor"),
    ({key(Q, "lora_A.weight"): A}, {}, "one of the two matrices"),
    ({key(Q, "lora_A.weight"): A.astype(np.int8)}, {}, "is I8, which is not a weight dtype"),
    ({"base_model.model.model.layers.1.mlp.up_proj.bias": np.ones(4, np.float32)}, {}, "has shape [3] in base, [4] in the adapter"),
    (pair(), {"peft_type": "IA3"}, "the adapter is of type 'IA3'"),
    (pair(), {"peft_type": None}, "the adapter is of type None"),
    (pair(), {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
    (pair(), {"layer_replication": [[0, 2]]}, "layer_replication = [[0, 2]]"),
    (pair(), {"lora_alpha": "x"}, "lora_alpha is 'x'"),
    (pair(), {"lora_alpha": float("nan")}, "lora_alpha is nan"),
    (pair(), {"lora_alpha": 10**400}, "lora_alpha is 1000"),
    (pair(), {"alpha_pattern": {"(a+)+": 1}}, "cannot be used (too involved)"),
    (pair(), {"alpha_pattern": {"[": 1}}, "cannot be used"),
    (pair(), {"use_dora": True}, "use_dora does not agree"),
    ({**pair(), key(Q, "lora_magnitude_vector"): np.ones(2, np.float32)}, {}, "use_dora does not agree"),
    ({**pair(), key(Q, "lora_magnitude_vector"): np.ones(3, np.float32)}, {"use_dora": True}, "DoRA on"),
    ({key(EMBED, "lora_embedding_A"): np.ones((1, 5), np.float32), key(EMBED, "lora_embedding_B"): np.ones((3, 1), np.float32),
      key(EMBED, "lora_magnitude_vector"): np.ones(5, np.float32)}, {"use_dora": True}, "DoRA on"),
])
def test_what_does_not_fit_or_is_not_lora_is_refused(opened, tensors, settings, words):
    with pytest.raises(FusionError) as caught:
        opened(tensors, **settings)
    assert words in str(caught.value)


def test_a_folder_without_weights_is_refused(tmp_path):
    save_checkpoint(tmp_path / "base", BASE)
    folder = save_adapter(tmp_path / "lora", pair())
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"there is no adapter_model\.safetensors"):
        open_checkpoint(f"{tmp_path / 'base'}+{folder}")
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        open_checkpoint(f"{tmp_path / 'base'}+{folder}")


def test_two_adapters_one_after_the_other(tmp_path):
    save_checkpoint(tmp_path / "base", BASE)
    one, two = save_adapter(tmp_path / "one", pair()), save_adapter(tmp_path / "two", pair(UP, *SQUARE))
    model = open_checkpoint(f"{tmp_path / 'base'}+{one}+{two}")
    assert model.name == "base+one+two" and model[Q][0].tolist() == [6, 1, 14] and model[UP][0].tolist() == [3, 5, 7]


def test_an_adapter_may_have_a_plus_in_its_name(tmp_path):
    save_checkpoint(tmp_path / "base", BASE)
    model = open_checkpoint(f"{tmp_path / 'base'}+{save_adapter(tmp_path / 'lora+v2', pair())}")
    assert model.name == "base+lora+v2" and model[Q][0].tolist() == [6, 1, 14]


def test_an_adapter_of_another_base_is_a_mismatch(opened):
    with pytest.raises(MismatchError):
        opened(pair("model.layers.7.self_attn.q_proj.weight"))

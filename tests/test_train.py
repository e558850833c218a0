"""Fusion training on a tiny model: the loss it minimises, λ = 1, packing, resuming, Stop and failures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fusion import Checkpoint, FusionError, OutputError, RecipeError
from fusion.distill.fused import Example
from fusion.progress import finish
from fusion.sources import open_checkpoint
from fusion.train import Estimate, Training, estimate, history
from fusion.train.history import append, earlier, unfinished_work
from fusion.train.packing import pack
from fusion.train.rows import ByLength, Collator
from fusion.train.trainer import train
from tests.conftest import load_tensors, save_checkpoint, save_family
from tests.test_adapters import pair, save_adapter

FAST = Training(learning_rate=1e-3, batch=2, accumulate=1, max_steps=3, schedule="constant", warmup=0.0)


@pytest.fixture(scope="module")
def pivot(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("pivot"), targets=0, dtype="float32")[0]


def examples(count: int = 6, seed: int = 0, k: int = 3) -> list[Example]:
    chance = np.random.default_rng(seed)
    made = []
    for i in range(count):
        length = 8 + i % 5
        labels = np.arange(4, length)
        made.append(Example(chance.integers(3, 300, length), labels, chance.integers(3, 300, (len(labels), k)).astype(np.int32),
                            chance.dirichlet(np.ones(k), len(labels)).astype(np.float32)))
    return made


def dense_loss(model, data: list[Example], lm_weight: float) -> torch.Tensor:
    """The loss of a batch, example by example, with dense targets over the whole vocabulary."""
    total, count = torch.zeros(()), 0
    for example in data:
        logits = model(torch.from_numpy(example.ids)[None]).logits[0].float().log_softmax(-1)[example.labels - 1]
        target = torch.zeros_like(logits)
        for row, ids, chances in zip(target, example.target_ids, example.chances, strict=True):
            for i, chance in zip(ids, chances, strict=True):
                row[int(i)] += float(chance)
        gold = torch.from_numpy(example.ids[example.labels])
        clm = -logits.gather(1, gold[:, None]).sum()
        total, count = total + lm_weight * clm - (1 - lm_weight) * (target * logits).sum(), count + len(gold)
    return total / count


def test_the_first_loss_is_the_dense_one(pivot, tmp_path):
    data = examples(4)
    result = finish(train(pivot, data, tmp_path / "out", Training(lm_weight=0.6, batch=2, accumulate=2, max_steps=1)))
    model = AutoModelForCausalLM.from_pretrained(pivot)
    assert result.history[0]["loss"] == pytest.approx(dense_loss(model, data, 0.6).item(), abs=2e-4)
    parts = result.history[0]
    assert 0.6 * parts["clm"] + 0.4 * parts["fusion"] == pytest.approx(parts["loss"], abs=2e-4)


def test_a_target_is_a_checkpoint_like_the_pivot(pivot, tmp_path):
    notes = []
    result = finish(train(pivot, examples(), tmp_path / "out", FAST), notes.append)
    assert [progress.done for progress in notes] == [1, 2, 3] and "loss" in notes[-1].note
    before, after = Checkpoint(pivot), Checkpoint(result.folder)
    assert {name: tensor.shape for name, tensor in before.info.items()} == {n: t.shape for n, t in after.info.items()}
    assert before.dtype == after.dtype and after.vocabulary == before.vocabulary
    assert after.chat_template == before.chat_template
    assert any((before[name] != after[name]).any() for name in before)
    assert json.loads((result.folder / "training_history.json").read_text()) == list(result.history)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_loss_falls(pivot, tmp_path):
    result = finish(train(pivot, examples(2), tmp_path / "out", Training(
        learning_rate=3e-3, batch=2, accumulate=1, max_steps=25, schedule="constant", warmup=0.0)))
    assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"]


def test_lambda_one_ignores_the_targets(pivot, tmp_path):
    data = examples()
    other = [Example(e.ids, e.labels, e.target_ids[:, ::-1] * 0 + 5, e.chances) for e in data]
    folders = [finish(train(pivot, part, tmp_path / name, Training(**{**vars(FAST), "lm_weight": weight}))).folder
               for name, part, weight in (("a", data, 1.0), ("b", other, 1.0), ("c", data, 0.5))]
    tensors = [load_tensors(folder) for folder in folders]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert any(not torch.equal(tensors[0][name], tensors[2][name]) for name in tensors[0])


def test_the_same_seed_gives_the_same_weights(pivot, tmp_path):
    first, second = (load_tensors(finish(train(pivot, examples(), tmp_path / name, FAST)).folder) for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_packed_rows_give_the_same_loss(pivot, tmp_path):
    data = examples(4)
    plain = finish(train(pivot, data, tmp_path / "a", Training(batch=4, accumulate=1, max_steps=1)))
    packed = finish(train(pivot, data, tmp_path / "b", Training(batch=4, accumulate=1, max_steps=1, pack=True, max_tokens=60)))
    assert packed.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], abs=2e-4)


def test_packing_loses_nothing():
    data = examples(9)
    rows = pack([len(example.ids) for example in data], 20)
    assert sorted(i for row in rows for i in row) == list(range(9)) and len(rows) < 9
    assert all(sum(len(data[i].ids) for i in row) <= 20 for row in rows)
    batch = Collator()([[data[i] for i in row] for row in rows if len(row) > 1][:1])
    assert (batch["position_ids"] == 0).sum() == len(next(row for row in rows if len(row) > 1))


def test_a_stopped_training_goes_on_where_it_was(pivot, tmp_path):
    settings = Training(**{**vars(FAST), "max_steps": 6, "save_steps": 2})
    whole = load_tensors(finish(train(pivot, examples(), tmp_path / "whole", settings)).folder)
    work = train(pivot, examples(), tmp_path / "out", settings)
    while next(work).done < 3:
        pass
    work.close()
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.training").is_dir()
    with pytest.raises(RecipeError, match="other settings"):
        finish(train(pivot, examples(), tmp_path / "out", FAST, resume=True))
    steps = []
    again = train(pivot, examples(), tmp_path / "out", settings, resume=True)
    resumed = finish(again, lambda progress: steps.append(progress.done))
    assert steps[0] >= 3 and steps[-1] == 6
    tensors = load_tensors(resumed.folder)
    assert all(torch.allclose(tensors[name], whole[name], atol=1e-6) for name in whole)
    assert not (tmp_path / ".out.training").exists()


def test_the_curve_is_on_disk_while_training_runs_and_survives_a_stop(pivot, tmp_path):
    settings = Training(**{**vars(FAST), "max_steps": 6, "save_steps": 2})
    out = tmp_path / "out"
    assert history(out) == ()
    work = train(pivot, examples(), out, settings)
    while next(work).done < 3:
        pass
    assert [entry["step"] for entry in history(out)][:2] == [1, 2]
    work.close()
    before = {entry["step"]: entry for entry in history(out)}
    result = finish(train(pivot, examples(), out, settings, resume=True))
    assert [entry["step"] for entry in result.history] == [1, 2, 3, 4, 5, 6] and history(out) == result.history
    assert result.history[0] == before[1] and set(before[1]) == {"step", "loss", "clm", "fusion", "learning_rate"}


def test_a_half_written_line_of_the_curve_is_not_read(tmp_path):
    work = unfinished_work(tmp_path / "out")
    work.mkdir()
    for step in (1, 2, 3):
        append(work, {"step": step, "loss": 1.0 / step})
    with (work / "training_history.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [entry["step"] for entry in history(tmp_path / "out")] == [1, 2, 3]
    assert [entry["step"] for entry in earlier(work, 2)] == [1, 2] == [entry["step"] for entry in history(tmp_path / "out")]


def test_a_loss_that_is_no_number_ends_the_training(pivot, tmp_path):
    data = examples(2)
    data[1].chances[:] = np.nan
    with pytest.raises(FusionError, match="loss is nan at step 1"):
        finish(train(pivot, data, tmp_path / "out", FAST))
    assert not (tmp_path / "out").exists()


def test_lora_is_merged_into_the_target(pivot, tmp_path):
    result = finish(train(pivot, examples(), tmp_path / "out", Training(**{**vars(FAST), "lora_rank": 2})))
    before, after = Checkpoint(pivot), Checkpoint(result.folder)
    assert set(before.info) == set(after.info)
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed and all("_proj" in name for name in changed)


def test_an_adapter_is_added_to_the_stored_base_whatever_it_was_trained_on(pivot, tmp_path):
    """Nothing but the adapted matrices moves, and these by s·BA: the rounded base of a bfloat16 training is not saved."""
    settings = Training(**{**vars(FAST), "lora_rank": 2, "dtype": "bfloat16", "save_steps": 3})
    folder = finish(train(pivot, examples(), tmp_path / "out", settings)).folder
    before, after = load_tensors(pivot), load_tensors(folder)
    for name in before:
        moved = after[name] - before[name]
        assert after[name].dtype == torch.float32
        if "_proj" in name:  # of rank 2, but for what adding to float32 rounds
            assert torch.linalg.matrix_rank(moved, atol=1e-5) <= 2 and 0 < moved.abs().max() < 0.1, name
        else:
            assert not moved.any(), name
    rounded = before["model.layers.0.mlp.up_proj.weight"].bfloat16().float()
    assert (rounded - before["model.layers.0.mlp.up_proj.weight"]).abs().max() > 1e-4  # a rounded base would be seen


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_pivot_may_be_a_base_with_an_adapter(pivot, tmp_path, lora_rank):
    name = "model.layers.0.self_attn.q_proj.weight"
    lora = save_adapter(tmp_path / "lora", pair(name, np.ones((1, 32), np.float32), np.ones((32, 1), np.float32)))
    began = open_checkpoint(f"{pivot}+{lora}")
    gentle = Training(**{**vars(FAST), "lora_rank": lora_rank, "learning_rate": 1e-7, "max_steps": 1})
    after = Checkpoint(finish(train(began.origin, examples(), tmp_path / "out", gentle)).folder)
    assert (began[name] - Checkpoint(pivot)[name]).min() > 1 and set(after) == set(began)
    assert all(np.allclose(after[one], began[one], atol=1e-5) for one in began)
    assert after.vocabulary == began.vocabulary and after.chat_template == began.chat_template


def test_refusals(pivot, tmp_path):
    with pytest.raises(RecipeError, match=r"lm_weight.*\n.*batch"):
        Training(lm_weight=2, batch=0).check()
    with pytest.raises(RecipeError, match="no dialogue"):
        finish(train(pivot, [], tmp_path / "out", FAST))
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        finish(train(pivot, examples(), tmp_path / "out", FAST))


def test_the_estimate_grows_as_the_work_does(pivot):
    checkpoint = Checkpoint(pivot)
    short, long = (estimate(checkpoint, [length] * 32, FAST) for length in (100, 200))
    assert isinstance(short, Estimate) and long.tokens == 2 * short.tokens and long.memory_bytes > short.memory_bytes
    full, lora = (estimate(checkpoint, [100] * 32, Training(lora_rank=rank)) for rank in (0, 4))
    assert lora.memory_bytes < full.memory_bytes
    assert estimate(checkpoint, [100] * 32, Training(epochs=2, batch=4, accumulate=2)).steps == 8


def test_memory_counts_what_is_loaded_and_one_slice_of_logits(tmp_path):
    small, wide = (save_checkpoint(tmp_path / str(rows), {"model.embed_tokens.weight": np.zeros((rows, 64), np.float32),
                                                          "model.layers.0.mlp.up_proj.weight": np.zeros((64, 64), np.float32)},
                                   "bfloat16", {"vocab_size": rows, "hidden_size": 64, "intermediate_size": 64})
                   for rows in (1000, 100_000))
    one, other = Checkpoint(small), Checkpoint(wide)
    rank = 8 * (64 + 64) * 16
    held = [estimate(other, [100], Training(lora_rank=8, bf16=bf16)).memory_bytes for bf16 in (False, True)]
    assert other.parameters * 4 + rank < held[1] <= held[0]  # float32, whatever bf16 does with a product
    assert estimate(other, [100], Training()).memory_bytes > 4 * 4 * other.parameters
    longer, long = (estimate(one, [tokens], Training()).memory_bytes for tokens in (100_001, 100_000))
    shorter, short = (estimate(one, [tokens], Training()).memory_bytes for tokens in (101, 100))
    assert longer - long < shorter - short < 4 * 1000 * 4 * 8  # once a slice is full its logits grow no more
    assert estimate(other, [100_000], Training()).memory_bytes < 4 * 100_000 * 100_000 * 4  # all of them would take 160 GB


def test_batches_by_length_hold_similar_dialogues_and_change_with_the_epoch():
    lengths = np.random.default_rng(0).integers(5, 200, 1003)
    order = ByLength(lengths, 10, seed=3)
    first = list(order)
    assert sorted(first) == list(range(1003)) and list(order) == first
    spread = [np.ptp(lengths[first[at:at + 10]]) for at in range(0, 500, 10)]
    assert max(spread) < 20 and np.ptp([lengths[first[at]] for at in range(0, 500, 10)]) > 100  # short and long batches mixed
    order.set_epoch(1)
    assert list(order) != first and sorted(order) == list(range(1003))


def test_a_training_by_length_learns_every_row_once(pivot, tmp_path):
    seen: list[int] = []

    class Noted(list):
        def __getitem__(self, number):
            seen.append(number)
            return super().__getitem__(number)

    data = Noted(examples(8))
    finish(train(pivot, data, tmp_path / "out", Training(learning_rate=1e-3, batch=2, accumulate=1, epochs=1.0, by_length=True)))
    rows = seen[-8:]
    assert sorted(rows) == list(range(8))
    assert [len(list.__getitem__(data, a).ids) <= len(list.__getitem__(data, b).ids)
            for a, b in zip(rows[::2], rows[1::2], strict=True)] == [True] * 4

"""Dialogues, masks, fusion rules and losses: small enough to check by eye."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion import CheckpointError, MismatchError, RecipeError
from fusion.distill.dialogues import Dialogue, Report, checked, load, split_long
from fusion.distill.encoding import PLAIN, Encoder
from fusion.distill.fuse import Distributions, fuse, mixture_weights, unit_losses
from fusion.distill.losses import fusion_loss, sparse_divergence
from tests.conftest import tiny_tokenizer

# ── dialogues ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def share(*pairs: tuple[str, str]) -> dict:
    return {"conversations": [{"from": role, "value": text} for role, text in pairs]}


def reasons(record: object) -> tuple[Dialogue | None, list[str]]:
    report = Report()
    return checked(record, "here", report), list(report.reasons)


def test_both_styles_are_read():
    wanted = Dialogue((("Hi", "Hello"), ("Bye", "See you")), "Be kind", "here")
    turns = [("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "See you")]
    assert reasons(share(("system", "Be kind"), *turns)) == (wanted, [])
    openai = [{"role": {"human": "user", "gpt": "assistant"}[role], "content": text} for role, text in turns]
    assert reasons({"messages": [{"role": "system", "content": "Be kind"}, *openai]}) == (wanted, [])
    assert wanted.messages()[0] == {"role": "system", "content": "Be kind"} and len(wanted.messages()) == 5


@pytest.mark.parametrize(("record", "kept", "reason"), [
    ("text", False, "no messages"),
    ({"messages": [{"role": "user"}]}, False, "no messages"),
    (share(("alien", "Hi"), ("gpt", "Hello")), False, "unknown role"),
    (share(("gpt", "Welcome"), ("human", "Hi"), ("gpt", "Hello")), True, "first message that is not the user's"),
    (share(("human", "Hi"), ("human", "again"), ("gpt", "Hello")), False, "take turns"),
    (share(("human", "Hi"), ("gpt", "Hello"), ("human", "Bye")), True, "without an answer"),
    (share(("human", "Hi")), False, "nothing left"),
    (share(("human", "Hi"), ("gpt", " ")), False, "empty message"),
])
def test_what_does_not_fit_is_dropped_and_counted(record, kept, reason):
    dialogue, found = reasons(record)
    assert (dialogue is not None) == kept and any(reason in text for text in found)
    assert not kept or dialogue.turns == (("Hi", "Hello"),)


def test_files_of_all_kinds(tmp_path):
    good, bad = share(("human", "Hi"), ("gpt", "Hello")), {"text": "no"}
    (tmp_path / "a.json").write_text(json.dumps([good, bad]))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, (bad, good, good))))
    dialogues, report = load(str(tmp_path))
    assert (report.read, report.kept, len(dialogues)) == (5, 3, 3)
    assert dialogues[1].origin == "b.jsonl line 2"
    assert "2 × no messages" in str(report) and "a.json record 2" in str(report)
    assert len(load(str(tmp_path), limit=2)[0]) == 2
    (tmp_path / "c.json").write_text(json.dumps({"data": [good]}))
    assert len(load(str(tmp_path / "c.json"))[0]) == 1


def test_parquet(tmp_path):
    table = pyarrow.Table.from_pylist([share(("human", "Hi"), ("gpt", "Hello"))] * 3)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    dialogues, _ = load(str(tmp_path / "a.parquet"))
    assert len(dialogues) == 3 and dialogues[2].origin == "a.parquet row 3"


@pytest.mark.parametrize(("name", "content", "kind", "word"), [
    ("a.json", "[", CheckpointError, "JSON"), ("a.jsonl", '{"a":', CheckpointError, "line 1"),
    ("a.json", "[1, 2]", RecipeError, "none of its 2 records"), ("a.parquet", "no", CheckpointError, "Parquet")])
def test_broken_files_end_in_words(tmp_path, name, content, kind, word):
    (tmp_path / name).write_text(content)
    with pytest.raises(kind, match=word):
        load(str(tmp_path / name))
    with pytest.raises(CheckpointError, match="no such file"):
        load(str(tmp_path / "other.json"))


def test_long_dialogues_are_cut_before_a_user_turn():
    dialogue = Dialogue((("a", "bb"), ("c", "dd"), ("e", "f" * 20), ("g", "h")), "s", "x")
    report = Report()
    parts = split_long([dialogue], lambda part: sum(len(text) for turn in part.turns for text in turn), 6, report)
    assert [part.turns for part in parts] == [dialogue.turns[:2], dialogue.turns[2:3], dialogue.turns[3:]]
    assert all(part.system == "s" for part in parts) and parts[2].origin == "x turns 4–4"
    assert list(report.reasons.values()) == [1, 1] and "truncated" in str(report)
    assert split_long([dialogue], lambda part: 3, 6) == [dialogue]


# ── the learnt positions ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("template", [None, PLAIN])
def test_replies_and_end_tokens_are_learnt_and_nothing_else(template):
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer, template)
    dialogue = Dialogue((("how are you", "fine, and you?"), ("good", "día 🙂")), "Be kind", "x")
    encoded = encoder.encode(dialogue)
    encoder.check(dialogue, encoded)
    by_turn = [tokenizer.decode(encoded.targets[encoded.turn == turn]).strip() for turn in (0, 1)]
    assert by_turn == ["fine, and you?<|im_end|>", "día 🙂<|im_end|>"]
    assert encoded.ends.sum() == 2 and encoded.reached[encoded.turn == 0][-1] == len("fine, and you?")
    assert encoder.length(dialogue) == len(encoded.ids)


def test_cut_dialogues_keep_what_is_left():
    dialogue = Dialogue((("how are you", "fine, and you? " * 5),), "", "x")
    whole = Encoder(tiny_tokenizer()).encode(dialogue)
    cut = Encoder(tiny_tokenizer(), max_tokens=len(whole.ids) - 9)
    encoded = cut.encode(dialogue)
    cut.check(dialogue, encoded)
    assert len(encoded.ids) == len(whole.ids) - 9 and not encoded.ends.any() and len(encoded.labels)


def test_a_wrong_mask_is_noticed():
    encoder, dialogue = Encoder(tiny_tokenizer()), Dialogue((("how", "are you today"),), "", "x")
    encoded = encoder.encode(dialogue)
    encoded.labels[:] = np.maximum(encoded.labels - 1, 0)
    with pytest.raises(MismatchError, match="decode to"):
        encoder.check(dialogue, encoded)


def test_a_template_that_changes_replies_is_refused():
    shout = "{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}"
    with pytest.raises(MismatchError, match="as it is"):
        Encoder(tiny_tokenizer(), shout).encode(Dialogue((("how", "are you"),), "", "x"))
    with pytest.raises(CheckpointError, match="cannot be rendered"):
        Encoder(tiny_tokenizer(), "{{ nothing.there.at_all }}").encode(Dialogue((("how", "are you"),), "", "x"))


def test_templates_without_a_place_for_a_system_prompt():
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN
    encoded = Encoder(tiny_tokenizer(), strict).encode(Dialogue((("how", "are you"),), "Be kind", "x"))
    assert "Be kind\n\nhow" in encoded.text


# ── fusion ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def spread(*rows: dict[int, float], nats=None) -> Distributions:
    """Distributions by hand: one {id: probability} a position, {} = none."""
    width = max(len(row) for row in rows) or 1
    ids = np.array([[*row, *[-1] * (width - len(row))] for row in rows], np.int32)
    chances = np.array([[*row.values(), *[0] * (width - len(row))] for row in rows])
    with np.errstate(divide="ignore"):
        return Distributions(ids, np.log(chances).astype(np.float32), np.zeros(len(rows)) if nats is None else np.array(nats))


def as_dicts(ids: np.ndarray, chances: np.ndarray) -> list[dict[int, float]]:
    return [{int(i): round(float(p), 6) for i, p in zip(*row, strict=True) if i >= 0 and p > 0}
            for row in zip(ids, chances, strict=True)]


def test_mince_takes_the_better_model_and_the_first_of_equals():
    models = [spread({1: 1}, {2: 1}, {3: 1}), spread({5: 0.5, 6: 0.5}, {7: 1}, {})]
    ids, chances, choice = fuse(models, np.array([[1.2, 0.4, 9.0], [0.9, 0.4, 0.1]]))
    assert choice.tolist() == [1, 0, 0]  # the third: the better model has nothing there
    assert as_dicts(ids, chances) == [{5: 0.5, 6: 0.5}, {2: 1}, {3: 1}]


def test_avgce_by_hand():
    assert mixture_weights([1.2, 0.9]) == pytest.approx([0.47368, 0.52632], abs=1e-5)
    models = [spread({1: 0.6, 2: 0.4}), spread({2: 1.0})]
    ids, chances, choice = fuse(models, np.array([[1.2], [0.9]]), "avgce")
    assert as_dicts(ids, chances) == [{2: pytest.approx(0.4 * 0.47368 + 0.52632, abs=1e-5),
                                       1: pytest.approx(0.6 * 0.47368, abs=1e-5)}]
    assert choice.tolist() == [1]
    ids, chances, _ = fuse([spread({1: 1}), spread({})], np.array([[1.2], [0.1]]), "avgce")
    assert as_dicts(ids, chances) == [{1: 1}]


@given(st.integers(0, 2 ** 32 - 1), st.sampled_from(["mince", "avgce"]))
def test_fused_distributions_sum_to_one(seed, rule):
    chance = np.random.default_rng(seed)
    models = [spread(*[dict(zip(chance.permutation(9)[:4].tolist(), chance.dirichlet(np.ones(4)), strict=True)) for _ in range(3)])
              for _ in range(3)]
    ids, chances, _ = fuse(models, chance.random((3, 3)) * 3, rule)
    assert chances.sum(axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    assert all(len(set(row[row >= 0].tolist())) == (row >= 0).sum() for row in ids)


def test_losses_are_compared_per_character():
    losses = unit_losses([1.0, 3.0, 2.0], [2, 2, 1], np.array([0, 0, 2]), 3)
    assert losses[[0, 2]] == pytest.approx([1.0, 2.0]) and np.isnan(losses[1])


# ── losses ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def case(seed: int = 0, positions: int = 4, vocabulary: int = 11, k: int = 3):
    torch.manual_seed(seed)
    logits = torch.randn(positions, vocabulary, requires_grad=True)
    ids = torch.stack([torch.randperm(vocabulary)[:k] for _ in range(positions)])
    return logits, ids, torch.rand(positions, k).softmax(dim=1)


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_sparse_equals_dense(kind):
    logits, ids, chances = case()
    dense = torch.zeros_like(logits).scatter(1, ids, chances)
    wanted = -(dense * logits.log_softmax(1)).sum(1)
    if kind == "kl":
        wanted = wanted + torch.special.xlogy(dense, dense).sum(1)
    found = sparse_divergence(logits, ids, chances, kind)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert torch.allclose(*(torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (found, wanted)), atol=1e-6)


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_the_tail_is_one_outcome_of_a_coarser_partition(kind):
    """Dense autograd over {kept tokens, any other}: empty places anywhere, no tail, all tail, a student that is sure."""
    torch.manual_seed(3)
    logits = (torch.randn(7, 11, dtype=torch.float64) * 3).requires_grad_()
    with torch.no_grad():
        logits[6, 2] += 60.0  # 1 − q is 0 in float32 there
    ids = torch.stack([torch.randperm(11)[:4] for _ in range(7)])
    ids[1, 2:], ids[2], ids[3, 0], ids[6, 0] = -1, -1, -1, 2
    mass = torch.tensor([0.3, 0.6, 0.0, 0.5, 1.0, 0.999, 0.7], dtype=torch.float64)
    chances = torch.where(ids < 0, 0, torch.rand(7, 4, dtype=torch.float64))
    chances = chances / chances.sum(1, keepdim=True).clamp_min(1e-9) * mass[:, None]
    q, wanted = logits.softmax(1), []
    for row in range(7):
        known = [int(i) for i in ids[row] if i >= 0]
        parts = [(chances[row, k], q[row, int(i)]) for k, i in enumerate(ids[row]) if i >= 0]
        if known and mass[row] < 1:
            parts.append((1 - mass[row], q[row, [i for i in range(11) if i not in known]].sum()))
        entropy = sum(torch.special.xlogy(p, p) for p, _ in parts) if kind == "kl" else 0
        wanted.append(sum((-p * its.log() for p, its in parts), logits[row].sum() * 0) + entropy)
    found = sparse_divergence(logits, ids, chances, kind)
    assert torch.allclose(found.double(), torch.stack(wanted), rtol=1e-5, atol=1e-5)
    mine, theirs = (torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (found, torch.stack(wanted)))
    assert torch.allclose(mine, theirs, atol=1e-6)


def test_a_target_that_names_every_token_has_no_tail():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = sparse_divergence(logits, torch.arange(3).expand(2, 3), torch.tensor([[0.5, 0.2, 0.2], [0.5, 0.3, 0.2]]))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_a_teacher_that_is_sure_of_the_gold_label_teaches_plain_fine_tuning():
    logits, _, _ = case()
    gold = torch.tensor([1, 2, 3, 4])
    sure = gold[:, None], torch.ones(4, 1)
    plain = torch.nn.functional.cross_entropy(logits, gold)
    for lm_weight in (0.0, 0.5, 0.9, 1.0):
        assert torch.allclose(fusion_loss(logits, gold, *sure, lm_weight)[0], plain, atol=1e-6)
    padded = torch.cat([sure[0], torch.full((4, 2), -1)], 1), torch.cat([sure[1], torch.zeros(4, 2)], 1)
    assert torch.allclose(fusion_loss(logits, gold, *padded, 0.0)[0], plain, atol=1e-6)


def test_a_student_that_is_the_teacher_has_no_divergence():
    logits = torch.randn(3, 5, requires_grad=True)
    chances = logits.detach().softmax(1)
    loss = sparse_divergence(logits, torch.arange(5).expand(3, 5), chances, "kl").sum()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-6


def test_lambda_one_is_plain_fine_tuning_whatever_the_targets():
    logits, ids, chances = case()
    gold = torch.tensor([1, 2, 3, 4])
    loss, clm, fused = fusion_loss(logits, gold, ids, chances * float("nan"), 1.0)
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits, gold), rtol=1e-6)
    assert torch.equal(loss, clm) and fused == 0


def test_accumulated_parts_make_the_loss_of_the_whole_batch():
    logits, ids, chances = case(positions=6)
    gold = torch.tensor([1, 2, 3, 4, 5, 6])
    whole = fusion_loss(logits, gold, ids, chances, 0.7)[0]
    parts = [fusion_loss(logits[part], gold[part], ids[part], chances[part], 0.7, count=6)[0]
             for part in (slice(0, 1), slice(1, 6))]
    assert torch.allclose(sum(parts), whole, atol=1e-6)


def test_no_labels_give_no_loss_and_no_nan():
    logits = torch.randn(0, 5, requires_grad=True)
    loss, _, _ = fusion_loss(logits, torch.zeros(0, dtype=torch.long), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert loss.item() == 0 and torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()

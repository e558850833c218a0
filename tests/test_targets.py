"""Teacher passes, their store, and fused targets of the demo models, whose tokenizers differ."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch

from fusion import Checkpoint, CheckpointError, RecipeError, demo
from fusion.demo.dialogues import conversation
from fusion.demo.family import RECIPES
from fusion.distill.carrying import link_labels
from fusion.distill.dialogues import Dialogue, Report, checked
from fusion.distill.encoding import Encoded
from fusion.distill.spelling import Vocabulary, end_tokens, pair_counts, vocabulary_table
from fusion.distill.store import Rows, Store
from fusion.distill.targets import Blend, fuse_dialogue
from fusion.distill.teacher import LocalTeacher, batches, represent
from fusion.progress import finish
from tests.test_adapters import key, save_adapter


@pytest.fixture(scope="module")
def dialogues():
    rng = Random(5)
    made = [checked({"messages": conversation(RECIPES["pivot"].mixture, rng)}, f"made {i}", Report()) for i in range(12)]
    return [dialogue for dialogue in made if dialogue is not None]


@pytest.fixture(scope="module")
def teachers():
    return {name: LocalTeacher(str(demo.FOLDER / name), dtype="float32") for name in ("pivot", "source-qwen", "source-neox")}


@pytest.fixture(scope="module")
def stores(dialogues, teachers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return {name: list(finish(represent(teacher, dialogues, folder / name, shard_dialogues=5)))
            for name, teacher in teachers.items()}


# ── teachers and their store ─────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_are_what_the_model_says(dialogues, teachers, stores):
    teacher, dialogue = teachers["source-qwen"], dialogues[3]
    encoded, rows = teacher.encoder.encode(dialogue), stores["source-qwen"][3]
    with torch.inference_mode():
        logits = teacher.model(torch.from_numpy(encoded.ids)[None]).logits[0].log_softmax(-1)
    expected = logits[encoded.labels - 1]
    assert rows.nats == pytest.approx(-expected.gather(1, torch.from_numpy(encoded.targets)[:, None])[:, 0].numpy(), abs=1e-4)
    values, ids = expected.topk(10, dim=1)
    assert (rows.ids == ids.numpy()).mean() > 0.99 and np.abs(rows.logprobs - values.numpy()).max() < 0.02


def test_a_stopped_run_goes_on_at_the_first_missing_shard(dialogues, teachers, tmp_path, monkeypatch):
    teacher = teachers["pivot"]
    work = represent(teacher, dialogues, tmp_path / "a", shard_dialogues=4, batch_tokens=10)
    while not (tmp_path / "a" / "rows-00000.safetensors").exists():
        next(work)
    work.close()
    kept = (tmp_path / "a" / "rows-00000.safetensors").stat().st_mtime_ns
    finish(represent(teacher, dialogues, tmp_path / "a", shard_dialogues=4))
    assert (tmp_path / "a" / "rows-00000.safetensors").stat().st_mtime_ns == kept
    whole = finish(represent(teacher, dialogues, tmp_path / "b", shard_dialogues=4))
    assert len(list(whole)) == len(dialogues)
    assert not list(tmp_path.rglob("*.partial"))


def test_an_adapter_is_part_of_the_teacher(dialogues, teachers, tmp_path):
    name, base = "model.layers.0.self_attn.q_proj", demo.FOLDER / "pivot"
    rows, columns = Checkpoint(base).info[f"{name}.weight"].shape
    chance = np.random.default_rng(0)
    down, up = (chance.normal(0, 0.5, shape).astype(np.float32) for shape in ((1, columns), (rows, 1)))
    adapter = save_adapter(tmp_path / "adapter", {key(name, "lora_A"): down, key(name, "lora_B"): up})
    teacher = LocalTeacher(f"{base}+{adapter}", dtype="float32")
    encoded = teacher.encoder.encode(dialogues[0])
    plain, adapted = (its.rows([encoded], 5)[0].nats for its in (teachers["pivot"], teacher))
    assert np.abs(plain - adapted).max() > 1e-3 and teacher.mark != teachers["pivot"].mark
    weight = teacher.model.state_dict()[f"{name}.weight"].numpy()
    assert weight == pytest.approx(Checkpoint(base)[f"{name}.weight"] + 2 * up @ down, abs=1e-5)


def test_another_plan_is_not_mixed_in(dialogues, teachers, tmp_path):
    finish(represent(teachers["pivot"], dialogues[:2], tmp_path / "a"))
    with pytest.raises(CheckpointError, match="another model, data or setting"):
        finish(represent(teachers["pivot"], dialogues[:2], tmp_path / "a", top_k=5))
    with pytest.raises(CheckpointError, match="another model, data or setting"):
        finish(represent(teachers["source-qwen"], dialogues[:2], tmp_path / "a"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="not made by this program"):
        finish(represent(teachers["pivot"], dialogues[:2], tmp_path / "c"))


def test_a_broken_shard_is_named(tmp_path):
    store = Store(tmp_path / "a", {}, [1])
    store.write(0, [Rows(np.zeros((2, 1)), np.zeros((2, 1)), np.ones(2))])
    assert store.read(0)[0].nats.tolist() == [1, 1] and not store.missing()
    (tmp_path / "a" / "rows-00000.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="rows-00000"):
        store.read(0)


def test_stores_that_kept_another_number_are_read(tmp_path):
    """Before 0.5 a store also held the log-sum-exp of every label, which nothing read."""
    from safetensors.numpy import load_file, save_file

    store = Store(tmp_path / "a", {}, [1])
    store.write(0, [Rows(np.array([[3, 4]]), np.log([[0.5, 0.25]]), np.array([0.7]))])
    file = tmp_path / "a" / "rows-00000.safetensors"
    arrays = load_file(file)
    assert set(arrays) == {"starts", "ids", "logprobs", "nats"}
    save_file({**arrays, "logsumexp": np.ones(1, np.float32)}, file)
    (rows,) = store.read(0)
    assert rows.ids.tolist() == [[3, 4]] and np.exp(rows.logprobs) == pytest.approx(np.array([[0.5, 0.25]]), abs=1e-3)


def test_batches_hold_their_tokens():
    lengths = [3, 9, 1, 4, 20]
    groups = list(batches(lengths, 10))
    assert sorted(i for group in groups for i in group) == [0, 1, 2, 3, 4]
    assert all(len(group) == 1 or max(lengths[i] for i in group) * len(group) <= 10 for group in groups)


# ── alignment of labels ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_labels_that_correspond_have_read_the_same_text(dialogues, teachers):
    pivot, source = teachers["pivot"].encoder, teachers["source-neox"].encoder
    shares = []
    for dialogue in dialogues:
        mine, theirs = pivot.encode(dialogue), source.encode(dialogue)
        link = link_labels(mine, theirs)
        for i, j in enumerate(link.usable):
            if j >= 0:
                assert (mine.turn[i], mine.reached[i]) == (theirs.turn[j], theirs.reached[j])
        shares.append((link.usable >= 0).mean())
    assert np.mean(shares) > 0.5


def test_warp_agrees_with_offsets_on_equal_texts(dialogues, teachers):
    encoders = [teachers[name].encoder for name in ("pivot", "source-qwen")]
    words = tuple(map(Vocabulary, encoders))
    same = total = 0
    for dialogue in dialogues:
        mine, theirs = (encoder.encode(dialogue) for encoder in encoders)
        exact, warped = link_labels(mine, theirs), link_labels(mine, theirs, words, "warp")
        same += (exact.usable == warped.usable).sum()
        total += len(exact)
        assert exact.usable[0] == warped.usable[0] == 0
    assert same / total > 0.9


def test_a_model_aligned_with_itself_gives_itself(dialogues, teachers, stores):
    encoder = teachers["pivot"].encoder
    words = Vocabulary(encoder)
    for dialogue, rows in zip(dialogues, stores["pivot"], strict=True):
        encoded = encoder.encode(dialogue)
        table = vocabulary_table(words, words, Blend(), set(rows.ids.ravel().tolist()), end_tokens(encoded, encoded))
        fused = fuse_dialogue((encoded, rows), [(encoded, rows, table)], Blend(with_pivot=False))
        assert (fused.links[0].usable == np.arange(len(encoded.labels))).all()
        assert (fused.choice == 1).all() and fused.losses[0] == pytest.approx(fused.losses[1])


# ── fused targets ────────────────────────────────────────────────────────────────────────────────────────────────────────


def tables(teachers, stores, dialogues, blend: Blend, name: str):
    encoders = teachers["pivot"].encoder, teachers[name].encoder
    words = tuple(map(Vocabulary, encoders))
    pairs = [tuple(encoder.encode(dialogue) for encoder in encoders) for dialogue in dialogues]
    ends = {key: value for pair in pairs for key, value in end_tokens(*pair).items()}
    seen = {int(i) for rows in stores[name] for i in rows.ids.ravel()}
    return pairs, vocabulary_table(*words, blend, seen, ends, pair_counts(pairs, words)), words


@pytest.mark.parametrize("blend", [
    Blend(), Blend(level="turn"), Blend(level="token"), Blend(mapping="spelling"), Blend(rule="avgce"),
    Blend(mapping="statistics"), Blend(mapping="mined"), Blend(tail="renormalise"), Blend(tail="renormalise", rule="avgce"),
    Blend(tail="renormalise", alignment="warp", mapping="fusechat", fallback="gold", per_character=False)],
    ids=lambda blend: f"{blend}"[6:60])
def test_fused_targets_are_distributions(dialogues, teachers, stores, blend):
    pairs, table, words = tables(teachers, stores, dialogues, blend.check(), "source-qwen")
    chosen = set()
    for (mine, theirs), own, rows in zip(pairs, stores["pivot"], stores["source-qwen"], strict=True):
        fused = fuse_dialogue((mine, own), [(theirs, rows, table)], blend, [words])
        total = fused.chances.sum(axis=1)
        assert (total <= 1 + 1e-6).all() and len(total) == len(mine.labels)
        assert blend.tail == "bucket" or ((np.abs(total - 1) < 1e-4) | (total == 0)).all()
        assert (total > 0).all() or blend.fallback == "gold"
        chosen |= set(fused.choice.tolist())
    assert chosen == {0, 1}  # each model is better somewhere


def test_mince_follows_the_losses(dialogues, teachers, stores):
    pairs, table, _ = tables(teachers, stores, dialogues, Blend(), "source-qwen")
    for (mine, theirs), own, rows in zip(pairs, stores["pivot"], stores["source-qwen"], strict=True):
        fused = fuse_dialogue((mine, own), [(theirs, rows, table)], Blend())
        better = int(rows.nats.sum() < own.nats.sum())  # the same characters in both
        usable = (fused.links[0].usable >= 0) & (table[rows.ids[np.maximum(fused.links[0].usable, 0)]] >= 0).any(axis=1)
        assert (fused.choice[usable] == better).all() and (fused.choice[~usable] == 0).all()


def test_a_tokenizer_begins_a_text_as_it_writes_it(teachers):
    encoder = teachers["pivot"].encoder
    words = Vocabulary(encoder)
    ids = encoder.tokenizer("The old bridge", add_special_tokens=False)["input_ids"]
    spelt = words.of(ids)
    assert words.begin("".join(spelt)) == ids[0] and words.begin("".join(spelt[1:])) == ids[1] and spelt[1].startswith(" ")
    assert words.begin("") == words.begin("\udcc3") == -1


def encoded(reached, ends) -> Encoded:
    """One reply whose labels have the ids 1, 2 … and are predicted after so many characters."""
    count = len(reached)
    return Encoded("", np.arange(count + 1), np.arange(1, count + 1), np.zeros(count, np.int32), np.array(reached),
                   np.array(ends, bool))


@pytest.mark.parametrize(("reached", "expected"), [([0, 2, 8], {7: .5, 9: .3, 2: .2}), ([0, 2, 6, 8], {7: .5, 9: .3, 2: .2}),
                                                   ([0, 2, 5, 8], {7: .5, 2: .5})])
def test_a_label_that_the_source_cuts_gets_the_chance_of_its_pieces(reached, expected):
    """The source writes characters 2 to 5 as token 2, at 0.5, which is token 9 for the pivot, and 5 to 8 as token 3, at 0.4.

    The pivot's second label, its token 2, ends with the second piece, within it, or with the first: then that is the label.
    """
    count = len(reached)
    pivot, source = encoded(reached, [0] * (count - 1) + [1]), encoded([0, 2, 5, 8], [0, 0, 0, 1])
    ids, chances = np.array([[1, 7, -1], [7, 2, -1], [3, 7, -1], [4, 7, -1]]), np.array([[.9, .1], [.5, .5], [.6, .4], [.9, .1]])
    logprobs = np.pad(np.log(chances), ((0, 0), (0, 1)), constant_values=-np.inf)
    rows = Rows(ids, logprobs, -np.log(np.array([.9, .5, .4, .9])))
    own = Rows(np.ones((count, 1), int), np.zeros((count, 1)), np.full(count, 5.0))
    table = np.array([0, 1, 9, 3, 4, 5, 6, 7])
    fused = fuse_dialogue((pivot, own), [(source, rows, table)], Blend(mapping="spelling"))
    said = zip(fused.ids[1].tolist(), fused.chances[1].tolist(), strict=True)
    assert {token: chance for token, chance in said if token >= 0} == pytest.approx(expected)


def test_token_losses_add_up_to_the_reply():
    """The pivot reads "going" in one token, the source in two: its loss there is the sum of both."""
    pivot, source = encoded([0, 2, 8], [0, 0, 1]), encoded([0, 2, 5, 8], [0, 0, 0, 1])
    rows = Rows(np.zeros((4, 1), np.int32), np.zeros((4, 1)), np.array([1.0, 2.0, 4.0, 8.0]))
    own = Rows(np.zeros((3, 1), np.int32), np.zeros((3, 1)), np.array([1.0, 6.5, 8.0]))
    fused = fuse_dialogue((pivot, own), [(source, rows, np.array([3]))], Blend(level="token"))
    assert fused.choice.tolist() == [0, 1, 0]  # equal, 6 < 6.5, equal: the first of equals
    assert fused.links[0].usable.tolist() == [0, 1, 3]
    assert fused.losses[:, 0] == pytest.approx([15.5 / 3, 15 / 3])  # for the same text, which has three tokens of the pivot


def test_every_character_of_a_reply_is_counted_once(teachers):
    """Nats per character divide by the reply's length, whether or not its end is learnt, and though a token begins before it."""
    from fusion.distill.encoding import Encoder

    tokenizer = teachers["source-neox"].encoder.tokenizer
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"  # no end token
    reply = "Photosynthesis runs on light."
    encoded = Encoder(tokenizer, template).encode(Dialogue((("What is it?", reply),)))
    assert not encoded.ends.any() and encoded.reached[0] == -1 and encoded.letters.sum() == len(reply)
    cut = Encoder(tokenizer, template, max_tokens=len(encoded.ids) - 3).encode(Dialogue((("What is it?", reply),)))
    assert cut.letters.tolist() == encoded.letters[:len(cut.labels)].tolist() and cut.letters.sum() < len(reply)
    ended = teachers["pivot"].encoder.encode(Dialogue((("What is it?", reply), ("And?", "It is 好."))))
    assert [ended.letters[ended.turn == turn].sum() for turn in (0, 1)] == [len(reply), len("It is 好.")]
    assert ended.letters[ended.ends].tolist() == [0, 0]


def test_unknown_words_are_refused():
    with pytest.raises(RecipeError, match="mince"):
        Blend(rule="minse").check()
    with pytest.raises(RecipeError, match=r"unknown tail 'buckets'.*bucket"):
        Blend(tail="buckets").check()


def test_a_teacher_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(CheckpointError):
        LocalTeacher(str(tmp_path / "nothing"))
    assert Dialogue((("a", "b"),)).messages()

"""fusion.vocabulary: one vocabulary for models that have several, row by row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from fusion import finish, measure, vocabulary
from fusion.checkpoint import Checkpoint
from fusion.errors import CheckpointError, MismatchError, RecipeError
from fusion.tokens import SAMPLES
from fusion.vocabulary import Remapped, Rows, unify, unlike, with_rows
from tests.conftest import save_checkpoint

EMBED, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(*words: str, marks: tuple[str, ...] = ("<end>",), first: tuple[str, ...] = ()) -> Tokenizer:
    """Byte-level BPE that knows every byte and these words (as merges of their letters)."""
    vocab, merges = {token: i for i, token in enumerate((*first, *(token for token in BYTES if token not in first)))}, []
    for word in words:
        left = word[0]
        for letter in word[1:]:
            if left + letter not in vocab:
                vocab[left + letter] = len(vocab)
                merges.append((left, letter))
            left += letter
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(marks))
    return tokenizer


def metaspace(*words: str) -> Tokenizer:
    """BPE with ▁ for spaces and <0x..> for bytes, as SentencePiece models have it."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocab, merges = {token: i for i, token in enumerate(tokens)}, []
    for word in words:
        left = word[0]
        for letter in word[1:]:
            if left + letter not in vocab:
                vocab[left + letter] = len(vocab)
                merges.append((left, letter))
            left += letter
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def make(folder: Path, tokenizer: Tokenizer, offset: float = 0, rows: int = 0, tied: bool = False, **config) -> Checkpoint:
    """A model whose row i of the embedding is [i, i] + offset, of the head its negative."""
    size = rows or tokenizer.get_vocab_size()
    table = np.arange(size, dtype=np.float32)[:, None] + np.full((1, 2), offset, np.float32)
    tensors = {EMBED: table, UP: np.ones((2, 2), np.float32) + offset, **({} if tied else {HEAD: -table})}
    save_checkpoint(folder, tensors, config={"vocab_size": size, "tie_word_embeddings": tied, **config})
    tokenizer.save(str(folder / "tokenizer.json"))
    return Checkpoint(folder)


def values(model: Checkpoint, name: str = EMBED) -> list[float]:
    return model[name][:, 0].tolist()


@pytest.mark.parametrize("mode", ["", "pivot", "common", "union"])
def test_equal_vocabularies_are_left_alone(tmp_path, mode):
    pivot, target = make(tmp_path / "p", byte_level("go")), make(tmp_path / "t", byte_level("go"), 5)
    assert unify(pivot, [target], mode) == (pivot, (target,), {})


def test_different_vocabularies_are_refused_unless_a_mode_is_chosen(tmp_path):
    pivot, target = make(tmp_path / "p", byte_level("abc", "go")), make(tmp_path / "t", byte_level("go", "xyz"), 5)
    with pytest.raises(MismatchError) as caught:
        unify(pivot, [target], "")
    assert "2 missing ('ab', 'abc'), 2 new ('xy', 'xyz'), 1 at other ids ('go')" in str(caught.value).replace(", '<end>'", "")
    assert "pivot, common or union" in caught.value.todo


def test_an_unknown_mode_is_refused(tmp_path):
    pivot = make(tmp_path / "p", byte_level())
    with pytest.raises(RecipeError, match=r"unknown vocabulary 'unoin'\. Did you mean 'union'"):
        unify(pivot, [pivot], "unoin")


def test_pivot_puts_every_row_where_the_pivots_token_is(tmp_path):
    pivot = make(tmp_path / "p", byte_level("ab", "cd", "ef"))  # ids 256, 257, 258, <end> 259
    target = make(tmp_path / "t", byte_level("ef", "xy", "ab"), 0.5)  # ids 256, 257, 258, <end> 259
    same, (view,), files = unify(pivot, [target], "pivot")
    assert same is pivot and files == {"tokenizer.json": (tmp_path / "p" / "tokenizer.json").read_bytes()}
    assert values(view)[:256] == [i + 0.5 for i in range(256)]
    assert values(view)[256:] == [258.5, 257, 256.5, 259.5]  # "cd" is the pivot's own row: nothing moves there
    assert values(view, HEAD)[256:] == [-258.5, -257, -256.5, -259.5]
    assert view.vocabulary == pivot.vocabulary and view.name == "t"
    assert (view.plain(UP), view.plain(EMBED), np.array_equal(view[UP], target[UP])) == (True, False, True)


def test_pivot_leaves_a_target_of_its_own_vocabulary_alone(tmp_path):
    pivot, same, other = (make(tmp_path / name, byte_level(word)) for name, word in (("p", "ab"), ("s", "ab"), ("o", "cd")))
    _, views, _ = unify(pivot, [same, other], "pivot")
    assert views[0] is same and views[1] is not other


def test_common_moves_only_rows_of_tokens_that_all_share(tmp_path):
    pivot = make(tmp_path / "p", byte_level("ab", "cd"))
    one, two = make(tmp_path / "1", byte_level("cd", "ab"), 0.5), make(tmp_path / "2", byte_level("cd", "xy"), 0.25)
    _, (first, second), _ = unify(pivot, [one, two], "common")
    assert values(first)[256:] == [256, 256.5, 258.5] and values(second)[256:] == [256, 256.25, 258.25]


def test_union_appends_tokens_and_takes_their_rows_from_the_models_that_have_them(tmp_path):
    pivot = make(tmp_path / "p", byte_level("ab"))  # "ab" 256, <end> 257
    one = make(tmp_path / "1", byte_level("ab", "Ġhi"), 0.5)  # "ab" 256, "Ġh" 257, "Ġhi" 258, <end> 259
    two = make(tmp_path / "2", byte_level("Ġh", marks=("<end>", "<turn>")), 0.25)  # "Ġh" 256, <end> 257, <turn> 258
    base, (first, second), files = unify(pivot, [one, two], "union")
    added = {" h": 258, " hi": 259, "<turn>": 260}
    assert base.vocabulary == {**pivot.vocabulary, **added} == first.vocabulary
    assert {base.info[name].shape for name in (EMBED, HEAD)} == {(261, 2)} and base.config["vocab_size"] == 261
    both = (257.5 + 256.25) / 2  # " h" in the model that lacks it
    assert values(base) == [*map(float, range(258)), both, 258.5, 258.25]
    assert values(first)[256:] == [256.5, 259.5, 257.5, 258.5, 258.25]
    assert values(second)[256:] == [256, 257.25, 256.25, 258.5, 258.25]  # "ab" is the pivot's row
    assert values(base, HEAD)[258:] == [-both, -258.5, -258.25]
    listed = {token["content"]: token for token in json.loads(files["tokenizer.json"])["added_tokens"]}
    assert {text: listed[text]["id"] for text in added} == added
    assert listed["<turn>"]["special"] and not listed[" hi"]["special"]


def test_the_united_tokenizer_loads_and_gives_texts_back(tmp_path):
    pivot = make(tmp_path / "p", byte_level("Ġthe", "ing"))
    target = make(tmp_path / "t", byte_level("Ġgoing", "Ñĩ", marks=("<a>", "<b>")))
    united, _, files = unify(pivot, [target], "union")
    new = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert new.get_vocab() == united.vocabulary
    for text in (*SAMPLES, "I am going <a> home <end>"):
        assert new.decode(new.encode(text).ids, skip_special_tokens=False) == text
    assert new.encode(" going<b>").tokens == [" going", "<b>"]


def test_spaces_written_in_two_ways_are_the_same_token(tmp_path):
    pivot, target = make(tmp_path / "p", byte_level("Ġgo")), make(tmp_path / "t", metaspace("▁go", "be"), 0.5)
    _, (view,), _ = unify(pivot, [target], "pivot")
    wanted = target.vocabulary
    assert values(view)[pivot.vocabulary["Ġgo"]] == wanted["▁go"] + 0.5
    assert values(view)[pivot.vocabulary["Ġ"]] == wanted["▁"] + 0.5
    assert values(view)[pivot.vocabulary["a"]] == wanted["a"] + 0.5
    assert values(view)[pivot.vocabulary["<end>"]] == pivot.vocabulary["<end>"]
    united, (view,), _ = unify(pivot, [target], "union")
    assert values(view)[united.vocabulary["be"]] == wanted["be"] + 0.5
    united, (view,), _ = unify(target, [pivot], "union")
    assert values(view)[united.vocabulary["<end>"]] == pivot.vocabulary["<end>"]


@pytest.mark.parametrize(("rows", "extra", "wanted"), [
    (0, 1, 258 + 1), (288, 2, 288), (288, 31, 320), (260, 3, 264), (258, 40, 298)])
def test_padding_is_used_first_and_kept(tmp_path, rows, extra, wanted):
    pivot = make(tmp_path / "p", byte_level("ab"), rows=rows)  # 258 tokens
    target = make(tmp_path / "t", byte_level("ab", marks=("<end>", *(f"<{i}>" for i in range(extra)))), 0.5, rows=512)
    united, (view,), _ = unify(pivot, [target], "union")
    assert united.info[EMBED].shape == view.info[EMBED].shape == (wanted, 2) and united.vocab_size == view.vocab_size == wanted
    have = pivot.info[EMBED].shape[0]
    assert values(united)[258 + extra:] == values(view)[258 + extra:] == [min(i, have - 1) for i in range(258 + extra, wanted)]


def test_padding_alone_is_no_obstacle(tmp_path):
    pivot, target = make(tmp_path / "p", byte_level("ab"), rows=320), make(tmp_path / "t", byte_level("ab"), 0.5, rows=258)
    _, (view,), _ = unify(pivot, [target], "pivot")
    assert values(view) == [*(i + 0.5 for i in range(258)), *map(float, range(258, 320))]


@pytest.mark.parametrize("mode", ["pivot", "common", "union"])
def test_unified_models_can_be_measured(tmp_path, mode):
    pivot = make(tmp_path / "p", byte_level("ab", "cd"), tied=True)
    one, two = (make(tmp_path / words[0], byte_level(*words), 0.5, tied=True) for words in (("cd", "xyz"), ("xy",)))
    pivot, targets, _ = unify(pivot, [one, two], mode)
    variation = finish(measure(pivot, targets))
    rows = pivot.info[EMBED].shape[0]
    assert variation.shapes[variation.names.index(EMBED)] == (rows, 2) and pivot.tied


def test_the_first_row_after_a_rebuilt_one_is_itself(tmp_path):
    model = make(tmp_path / "m", byte_level("ab"))
    view = Remapped(model, Rows((model, model), np.zeros(3, np.int64), np.array([-1, 0, 1]), {0: ((0, 4), (1, 8))}), {})
    assert values(view) == [6, 0, 1]


def test_positions_are_no_tokens(tmp_path):
    folder = tmp_path / "m"
    table = np.zeros((258, 2), np.float32)
    tensors = {"transformer.wte.weight": table, "transformer.wpe.weight": table}
    for name, tokenizer in (("p", byte_level("ab")), ("t", byte_level("xy"))):
        save_checkpoint(folder / name, tensors, config={"vocab_size": 258})
        tokenizer.save(str(folder / name / "tokenizer.json"))
    _, (view,), _ = unify(Checkpoint(folder / "p"), [Checkpoint(folder / "t")], "pivot")
    assert view.tables == {"transformer.wte.weight"} and view.plain("transformer.wpe.weight")


@given(span=st.tuples(st.integers(0, 518), st.integers(0, 518)).map(sorted))
def test_any_part_equals_the_part_of_the_whole(tmp_path_factory, span):
    folder = tmp_path_factory.getbasetemp() / "vocabulary-parts"
    if not folder.exists():
        make(folder / "p", byte_level("ab"))
        make(folder / "t", byte_level("Ġhi", first=("z", "y", "x")), 0.5)
    pivot, (view,), _ = unify(Checkpoint(folder / "p"), [Checkpoint(folder / "t")], "union")
    for model in (pivot, view):
        whole = model[EMBED].reshape(-1)
        assert len(whole) >= 518
        assert np.array_equal(model.read(EMBED, *span, np.empty(520, np.float32)), whole[slice(*span)])


# ── tokens beyond the last row, rows beyond the last token ───────────────────────────────────────────────────────────

def test_a_token_without_a_row_counts_as_one_that_the_model_lacks(tmp_path):
    words, marks = byte_level("ab"), byte_level("ab", marks=("<end>", "<pad>"))
    pivot, equal = make(tmp_path / "p", words), make(tmp_path / "e", marks, 0.5, rows=258)  # <pad> 258 has no row
    assert unify(pivot, [equal], "union") == (pivot, (equal,), {}) and unlike(pivot, equal) is None
    assert with_rows(equal) == pivot.vocabulary and 258 in equal.vocabulary.values()


def test_union_gives_a_token_of_the_pivot_without_a_row_the_row_of_a_target(tmp_path):
    pivot = make(tmp_path / "p", byte_level("ab", marks=("<end>", "<pad>")), rows=258)  # <end> 257, <pad> 258 without a row
    target = make(tmp_path / "t", byte_level("ab", marks=("<end>", "<turn>", "<pad>")), 0.5)  # <turn> 258, <pad> 259
    base, (view,), files = unify(pivot, [target], "union")
    assert base.vocabulary["<pad>"] == 258 and base.vocabulary["<turn>"] == 259 and base.info[EMBED].shape == (260, 2)
    assert values(base)[256:] == [256, 257, 259.5, 258.5] and values(view)[256:] == [256.5, 257.5, 259.5, 258.5]
    listed = [token["content"] for token in json.loads(files["tokenizer.json"])["added_tokens"]]
    assert listed == ["<end>", "<pad>", "<turn>"]


@pytest.mark.parametrize("mode", ["pivot", "common"])
def test_the_pivots_own_rows_stay_where_its_tokenizer_has_more_tokens(tmp_path, mode):
    pivot = make(tmp_path / "p", byte_level("ab", marks=("<end>", "<pad>")), rows=258)
    _, (view,), _ = unify(pivot, [make(tmp_path / "t", byte_level("ab", "cd", marks=("<end>", "<pad>")), 0.5)], mode)
    assert view.info[EMBED].shape == (258, 2) and values(view)[255:] == [255.5, 256.5, 258.5]


@pytest.mark.parametrize(("rows", "other"), [(258, 320), (320, 258), (300, 384)])
def test_equal_tokens_in_tables_of_other_sizes_are_merged(tmp_path, rows, other):
    pivot, target = (make(tmp_path / name, byte_level("ab"), offset, rows=count)
                     for name, offset, count in (("p", 0, rows), ("t", 0.5, other)))
    for mode in ("pivot", "union"):
        base, (view,), _ = unify(pivot, [target], mode)
        assert base is pivot and view.info[EMBED].shape == (rows, 2)
        assert values(view) == [*(i + 0.5 for i in range(258)), *map(float, range(258, rows))]


# ── what cannot be united ────────────────────────────────────────────────────────────────────────────────────────────

def test_a_model_without_tokenizer_is_refused(tmp_path):
    pivot, target = make(tmp_path / "p", byte_level()), make(tmp_path / "t", byte_level("ab"))
    (target.folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"t: there is no tokenizer\.json"):
        unify(pivot, [target], "union")


@pytest.mark.parametrize(("change", "words"), [
    ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": 5}}, "cannot be used"),
    ({"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}}, "the id of token 'a' is 'x'"),
    ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "the id of token 'a' is -1"),
    ({"model": {"type": "BPE", "vocab": {"a": 10**6}, "merges": []}}, "257 rows for 1000001 tokens"),
], ids=str)
def test_a_broken_tokenizer_is_refused(tmp_path, change, words):
    pivot, target = make(tmp_path / "p", byte_level(marks=("<end>", "<more>"))), make(tmp_path / "t", byte_level())
    file = pivot.folder / "tokenizer.json" if words == "cannot be used" else target.folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises((CheckpointError, MismatchError), match=words):
        unify(Checkpoint(pivot.folder), [Checkpoint(target.folder)], "union")


SPOILT = [
    (lambda file: {**file, "decoder": None}, "would come back as|would not be written"),
    (lambda file: {**file, "normalizer": {"type": "Lowercase"}}, "would come back as 'the quick brown"),
    (lambda file: {**file, "added_tokens": file["added_tokens"][:-1]}, "would not have the id"),
    (lambda file: {**file, "model": {**file["model"], "vocab": {
        **file["model"]["vocab"], "a": BYTES.index("b"), "b": BYTES.index("a")}}}, "token '[ab]' would move from"),
]


@pytest.mark.parametrize(("spoil", "words"), SPOILT)
def test_a_united_tokenizer_that_fails_its_self_test_is_refused(tmp_path, monkeypatch, spoil, words):
    pivot, target = make(tmp_path / "p", byte_level("ab")), make(tmp_path / "t", byte_level("Ġhi"), 0.5)
    extended = vocabulary.extended

    def spoilt(*given) -> dict[str, bytes]:
        return {"tokenizer.json": json.dumps(spoil(json.loads(extended(*given)["tokenizer.json"]))).encode()}

    monkeypatch.setattr(vocabulary, "extended", spoilt)
    with pytest.raises(MismatchError, match=words):
        unify(pivot, [target], "union")

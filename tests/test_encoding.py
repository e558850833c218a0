"""Which tokens of a dialogue are learnt: replies and the tokens that end them, whatever the template and the tokenizer do."""

from __future__ import annotations

import json
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fusion import CheckpointError, MismatchError
from fusion.distill.dialogues import Dialogue, Report, split_long
from fusion.distill.encoding import PLAIN, Encoded, Encoder
from fusion.distill.teacher import LoadedTeacher, limit_in, limit_of
from fusion.pairwise.data import longest, record_of, shown_to_all, stored_dialogues
from fusion.template import ChatTemplate

TEXTS = ["The answer is 42, said the assistant to the user.", "how are you today? GPT4 Correct Assistant: fine",
         "def f(x):\n    return x + 1\n\n", "User: café naïve Assistant: one two three  four   five"]
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
OPENCHAT = ("{{ bos_token }}{% for m in messages %}{{ 'GPT4 Correct ' + m['role'].title() + ': ' + m['content'] + '<|im_end|>' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}")
TRIMMED = CHATML.replace("+ m['content'] +", "+ (m['content'] | trim) +")
SPACED = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] | trim + ' ' + eos_token }}{% endfor %}"
TRACKED = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
           "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}")
TEMPLATES = {"chatml": CHATML, "openchat": OPENCHAT, "plain": PLAIN, "trimmed": TRIMMED, "spaced": SPACED, "tracked": TRACKED}
# Qwen3's: the thoughts of earlier replies are left out, the last reply is given an empty thought when it has none.
THINKING = ("{% for m in messages %}{% set said = m['content'].split('</think>')[-1].lstrip('\n') %}<|im_start|>{{ m['role'] }}\n"
            "{% if m['role'] == 'assistant' and loop.last %}<think>\n{{ m['content'].split('</think>')[0].split('<think>')[-1]"
            ".strip('\n') if '</think>' in m['content'] }}\n</think>\n\n{% endif %}{{ said }}<|im_end|>\n{% endfor %}")


@lru_cache
def made(kind: str):
    """A small tokenizer: byte-level, the same with trimmed offsets or NFC, or metaspace with byte fallback."""
    special = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>"]
    if kind == "metaspace":
        letters = sorted({sign for text in TEXTS for sign in text.replace(" ", "▁")} - {"\n"})
        names = [*special, *(f"<0x{i:02X}>" for i in range(256)), *letters]
        tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                               decoders.Strip(" ", 1, 0)])
        tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC() if kind == "nfc" else None
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=kind == "trimmed offsets")
        tokenizer.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
            vocab_size=340, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<s>",
                                                unk_token="<unk>")


KINDS = ("bytes", "trimmed offsets", "nfc", "metaspace")


def learnt(encoder: Encoder, encoded: Encoded, turn: int = 0) -> str:
    """What the learnt tokens of a reply say, its end token left out."""
    return encoder.tokenizer.decode(encoded.targets[(encoded.turn == turn) & ~encoded.ends])


def taught(encoder: Encoder, *turns: tuple[str, str], **more) -> Encoded:
    """A dialogue, encoded and checked."""
    dialogue = Dialogue(tuple(turns), **more)
    encoded = encoder.encode(dialogue)
    encoder.check(dialogue, encoded)
    assert not encoder.examine(dialogue)[1]
    return encoded


# ── the end of a reply ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_end_is_learnt_whatever_white_space_stands_before_it(template, kind):
    encoder = Encoder(made(kind), TEMPLATES[template])
    for tail in ("", "\n", "\n\n", " ", "  \n", "\u2028", "\xa0 "):
        encoded = taught(encoder, ("hi" + tail, "The answer is 42." + tail), ("so", "fine" + tail))
        assert encoded.turn[encoded.ends].tolist() == [0, 1], tail
        assert [learnt(encoder, encoded, turn).strip() for turn in (0, 1)] == ["The answer is 42.", "fine"]
        assert [encoded.letters[encoded.turn == turn].sum() for turn in (0, 1)] == [17, 4]
        assert encoded.letters[encoded.ends].tolist() == [0, 0] and encoded.reached[encoded.ends].tolist() == [17, 4]
        assert (encoded.targets[encoded.ends] == encoder.tokenizer.eos_token_id).all()
        assert (np.diff(encoded.labels[encoded.turn == 0]) == 1).all()


def test_a_template_that_ends_a_turn_where_the_next_begins():
    parting = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
               "{% if not loop.last %}{{ tail }}{% endif %}{% endfor %}")
    for tail, mark in (("'<|im_end|>'", "<|im_end|>"), ("'\n<|im_end|>\n'", "<|im_end|>"), ("''", "<|im_start|>")):
        encoder = Encoder(made("bytes"), parting.replace("tail", tail))
        encoded = taught(encoder, ("hi", "The answer"), ("so", "fine\n"))
        assert encoded.turn[encoded.ends].tolist() == [0, 1]
        assert encoder.tokenizer.convert_ids_to_tokens(encoded.targets[encoded.ends]) == [mark] * 2
        assert encoder.length(Dialogue((("hi", "The answer"),))) == len(taught(encoder, ("hi", "The answer")).ids)


def test_an_end_that_no_token_marks_is_counted():
    for begin in ("", "<s>"):  # what begins a turn does not end the one before
        template = f"{{% for m in messages %}}{begin}[{{{{ m['role'] }}}}] {{{{ m['content'] }}}}\n\n{{% endfor %}}"
        encoders = {"pivot": Encoder(made("bytes"), template)}
        report, dialogue = Report(), Dialogue((("hi", "fine"),), origin="line 7")
        assert shown_to_all(dialogue, encoders, report) == dialogue
        assert ["where to stop is not learnt" in reason for reason in report.reasons] == [True]
        assert not taught(encoders["pivot"], ("hi", "fine"), ("so", "two")).ends.any()


def test_a_model_that_reads_less_cuts_dialogues_for_all():
    encoders = {"long": Encoder(made("bytes"), CHATML, 4096), "short": Encoder(made("bytes"), CHATML, 40)}
    dialogue = Dialogue((("hi", "fine"),) * 4)
    whole = encoders["long"].length(dialogue)
    assert 40 < whole < 4096 and longest(dialogue, encoders, 4096) == whole + 4056
    parts = split_long([dialogue], lambda part: longest(part, encoders, 4096), 4096)
    assert [len(part.turns) for part in parts] == [2, 2] and all(encoders["short"].length(part) <= 40 for part in parts)


def test_an_added_token_that_is_not_special_may_end_a_turn():
    tokenizer = made("bytes").__class__(tokenizer_object=Tokenizer.from_str(made("bytes").backend_tokenizer.to_str()))
    tokenizer.add_tokens([AddedToken("<|stop|>", special=False, normalized=False)])
    encoded = taught(Encoder(tokenizer, CHATML.replace("<|im_end|>", "<|stop|>")), ("hi", "fine"))
    assert tokenizer.convert_ids_to_tokens(encoded.targets[encoded.ends]) == ["<|stop|>"]


# ── where a reply stands ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_short_replies_and_texts_of_headers_are_not_mixed_up(template, kind):
    encoder = Encoder(made(kind), TEMPLATES[template])
    for answer in ("A", "C", "1", "i", "a", "s", "assistant", "GPT4 Correct Assistant:", "user"):
        for asked in ("Assistant:", "assistant", "a", answer):
            encoded = taught(encoder, (asked, answer), (f"{asked} {answer}", answer))
            assert [learnt(encoder, encoded, turn).strip() for turn in (0, 1)] == [answer, answer]
            after = encoder.tokenizer.decode(encoded.ids[encoded.labels[-1] + 1:])
            assert encoded.ends.sum() == 2 and not after.strip()  # the last reply is the last one that is written


@pytest.mark.parametrize(("kind", "answer"), [
    ("trimmed offsets", "def f(x):\n    return x"), ("trimmed offsets", "a  b"), ("trimmed offsets", "- one\n  - two   three"),
    ("nfc", "cafe\u0301"), ("nfc", "nai\u0308ve re\u0301sume\u0301"), ("nfc", "e\u0301"), ("bytes", "cafe\u0301"),
    ("bytes", "one\u2028two\u0085three\x0cfour"), ("metaspace", "日本 😀"), ("metaspace", "a  b"), ("nfc", "  x\n y ")])
def test_odd_texts_are_learnt_as_they_are(kind, answer):
    encoder = Encoder(made(kind), CHATML)
    encoded = taught(encoder, ("hi", answer))
    normal = encoder.tokenizer.backend_tokenizer.normalizer if kind == "nfc" else None
    assert learnt(encoder, encoded).strip() == (normal.normalize_str(answer) if normal else answer).strip()
    assert encoded.ends.tolist()[-1] and encoded.letters.sum() == len(answer.strip())
    assert (np.diff(encoded.labels) == 1).all() and (np.diff(encoded.reached) >= 0).all()
    endless = Encoder(made(kind), "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n\n{% endfor %}")
    assert learnt(endless, taught(endless, ("hi", answer))).strip() == learnt(encoder, encoded).strip()


def test_templates_that_leave_out_thoughts():
    encoder = Encoder(made("bytes"), THINKING)
    assert learnt(encoder, taught(encoder, ("hi", "fine"), ("so", "two")), 1).strip() == "two"
    thought = "<think>\none\n</think>\n\ntwo"
    encoded = taught(encoder, ("hi", "fine"), ("so", thought))
    assert learnt(encoder, encoded, 1) == thought and encoded.ends.sum() == 2
    dialogue, report = Dialogue((("hi", thought), ("so", "three")), origin="line 3"), Report()
    (fault,) = encoder.examine(dialogue)[1].values()
    assert "does not show a reply as it is" in fault.reason and "'two'" in fault.example
    with pytest.raises(MismatchError, match="as it is"):
        encoder.encode(dialogue)
    shown = shown_to_all(dialogue, {"source": encoder}, report)
    assert shown == dialogue.without([0]) and "line 3 reply 1" in str(report) and "not learnt" in str(report)
    assert learnt(encoder, taught(encoder, *shown.turns, unlearnt=shown.unlearnt), 1) == "three"


@pytest.mark.parametrize(("template", "words"), [
    (CHATML.replace("m['content']", "m['content'] | upper"), "as it is"), (CHATML.replace("m['content']", "'x'"), "leaves out"),
    (CHATML.replace("m['content']", "m['content'] + m['content']"), "repeats"),
    (CHATML.replace("m['content']", "m['content'] | replace('a', 'b')"), "as it is"),
    ("{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}[end]{% endfor %}", "together with text of the chat")])
def test_what_a_template_changes_is_refused_in_words(template, words):
    tokenizer = made("bytes").__class__(tokenizer_object=Tokenizer.from_str(made("bytes").backend_tokenizer.to_str()))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_tokens([AddedToken("][", normalized=False), AddedToken("t[", normalized=False)] if "end]" in template else [])
    encoder, dialogue = Encoder(tokenizer, template), Dialogue((("hi", "how are a bat"),), origin="here")
    with pytest.raises(MismatchError, match=words):
        encoder.check(dialogue, encoder.encode(dialogue))
    assert words in encoder.examine(dialogue)[1][0].reason


def test_a_sign_without_a_token_is_named():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<e>": 1, "fine": 2, "hi": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<e>")
    encoder = Encoder(fast, "{% for m in messages %}{{ m['content'] + ' ' + eos_token + ' ' }}{% endfor %}")
    assert learnt(encoder, taught(encoder, ("hi", "fine"))) == "fine"
    assert "no token for" in encoder.examine(Dialogue((("hi", "fine ☃"),)))[1][0].reason


def test_a_reply_of_which_no_token_is_made_is_named():
    tokenizer = Tokenizer(models.WordLevel({"<e>": 0, "fine": 1, "hi": 2}))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Replace("\u200b", "")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = Encoder(transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>"),
                      "{% for m in messages %}{{ m['content'] + ' ' + eos_token + ' ' }}{% endfor %}")
    for signs in ("\u200b", "\u0301", "\u0301\u200b"):  # no width, no letter: its normalisation takes them away
        faults = encoder.examine(Dialogue((("hi", "fine"), ("hi", signs))))[1]
        assert {turn: fault.reason for turn, fault in faults.items()} == {1: "its tokenizer makes no token of a reply"}
    report = Report()
    assert shown_to_all(Dialogue((("hi", signs),)), {"pivot": encoder}, report) is None
    assert "pivot: its tokenizer makes no token of a reply (that reply is not learnt)" in report.reasons


def test_tokens_without_a_row_are_never_read():
    dialogue, report = Dialogue((("hi", "fine"),)), Report()
    rows = 1 + int(Encoder(made("bytes"), CHATML).encode(dialogue).ids.max())
    fits = Encoder(made("bytes"), CHATML, rows=rows)
    assert shown_to_all(dialogue, {"pivot": fits}, report) == dialogue and not report.reasons
    for fewer in (rows - 1, 3):
        short = Encoder(made("bytes"), CHATML, rows=fewer)
        with pytest.raises(MismatchError, match=f"beyond the {fewer} rows"):
            short.encode(dialogue)
        assert shown_to_all(dialogue, {"pivot": fits, "source": short}, report) is None
        assert f"source: its tokenizer writes tokens beyond the {fewer} rows of its embedding" in report.reasons


def test_a_dialogue_that_its_template_refuses_is_no_broken_template():
    picky = "{% if 'x' in messages[0]['content'] %}{{ raise_exception('no x') }}{% endif %}" + CHATML
    encoder, report = Encoder(made("bytes"), picky), Report()
    assert shown_to_all(Dialogue((("x", "fine"),)), {"pivot": encoder}, report) is None and "no x" in str(report)
    with pytest.raises(CheckpointError, match="cannot be rendered"):
        Encoder(made("bytes"), "{{ nothing.there.at_all }}").examine(Dialogue((("x", "fine"),)))
    for odd in (Dialogue((("x", "fine"),)), Dialogue((("a \ud83d", "fine"),)), Dialogue((("a", "fine \ude00"),))):
        assert longest(odd, {"pivot": encoder}, 9) == 0 and shown_to_all(odd, {"pivot": encoder}, report) is None
    assert "half of a surrogate pair" in str(report) and longest(Dialogue((("a", "fine"),)), {"pivot": encoder}, 9) > 0


# ── what a template asks for ─────────────────────────────────────────────────────────────────────────────────────────────

PARTS = CHATML.replace("m['content']", "m['content'][0]['text']")


@pytest.mark.parametrize(("template", "system"), [
    (CHATML, True), (PARTS, True), (CHATML.replace("+ m['content']", "+ m['content'] if m['role'] != 'system' else ''"), False),
    ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML, False),
    ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + PARTS, False),
    ("{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
     "<|im_end|>{% endfor %}", True)])
def test_a_template_is_filled_as_it_asks(template, system):
    encoder = Encoder(made("bytes"), template)
    encoded = taught(encoder, ("hi", "fine\n"), ("so", "two"), system="Be brief")
    assert encoded.ends.sum() == 2 and learnt(encoder, encoded).strip() == "fine"
    assert ("Be brief\n\nhi" in encoded.text) != system and encoded.text.count("Be brief") == 1


def test_a_tokenizer_with_several_templates():
    tokenizer = made("bytes").__class__(tokenizer_object=made("bytes").backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = {"tool_use": "no", "default": CHATML}
    assert Encoder(tokenizer).template == CHATML
    for none in ({"tool_use": CHATML}, None):
        tokenizer.chat_template = none
        with pytest.raises(CheckpointError, match="template: plain"):
            ChatTemplate(tokenizer)


# ── what is only read ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_turns_that_are_only_read(tmp_path):
    encoder = Encoder(made("bytes"), CHATML)
    turns = ("hi", "fine"), ("so", "two"), ("and", "three")
    whole, part = taught(encoder, *turns), taught(encoder, *turns, unlearnt=(0, 2))
    assert set(part.turn) == {1} and (part.labels == whole.labels[whole.turn == 1]).all() and (part.ids == whole.ids).all()
    for dialogue in (Dialogue(turns, "Be brief", "a", (0, 2)), Dialogue(turns, "", "b"), Dialogue((("\u2028", "\x85x"),), "", "c")):
        file = tmp_path / "d.jsonl"
        file.write_bytes((json.dumps(record_of(dialogue), ensure_ascii=False) + "\n").encode())
        assert stored_dialogues(file) == [dialogue]


def test_a_model_is_shown_no_more_than_it_reads():
    assert limit_of(transformers.GPT2Config(n_positions=12), 2048) == 12 == limit_of(transformers.GPT2Config(n_positions=12))
    assert limit_of(transformers.LlamaConfig(max_position_embeddings=99), 7) == 7
    assert limit_of(transformers.MambaConfig(), 7) == 7 and limit_of(transformers.MambaConfig()) is None
    for config, limit in (({"model_type": "gpt2", "n_positions": 12}, 12), ({"model_type": "llama"}, 2048),
                          ({"model_type": "of_nobody", "max_position_embeddings": 3}, 4096)):
        assert limit_in(SimpleNamespace(config=config), 4096) == limit
    model = SimpleNamespace(config=transformers.GPT2Config(n_positions=12), device="cpu")
    assert LoadedTeacher(model, made("bytes"), template=CHATML, max_tokens=4096).encoder.max_tokens == 12

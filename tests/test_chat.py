"""fusion.chat: sampling, prompts, the pool of models, streaming, export. Models are tiny and random."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fusion.chat import (
    ChatModel,
    Exchange,
    ModelPool,
    Reply,
    Request,
    Sampling,
    Transcript,
    conversation_jsonl,
    expected_bytes,
    fit,
    from_parts,
    load,
    render,
    stream,
)
from fusion.chat.sampling import GumbelSampler, processors
from fusion.errors import CheckpointError, RecipeError, ResourceError

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
DEAF = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
ASK = ({"role": "user", "content": "How are you?"},)


def tiny_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 300 tokens; ids 0 to 2 are <|endoftext|>, <|im_start|>, <|im_end|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["how are you today, user and assistant and system?"] * 4,
                                  trainers.BpeTrainer(vocab_size=300, special_tokens=marks, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>",
                                   extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    fast.chat_template = template
    return fast


def tiny_model(family: str = "llama", seed: int = 0, context: int = 256, spread: float = 0.2):
    """A random model of two layers; a wide `spread` of weights makes its scores far from equal."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    return model_class(config_class(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=context, initializer_range=spread,
        bos_token_id=None, eos_token_id=0, pad_token_id=None))


def tiny_chat(family: str = "llama", seed: int = 0, template: str | None = CHATML, endless: bool = False,
              **config) -> ChatModel:
    """A tiny ChatModel; an `endless` one knows no stop mark."""
    chat_model = from_parts(tiny_model(family, seed, **config), tiny_tokenizer(template), f"{family}-{seed}")
    return replace(chat_model, stop_ids=frozenset()) if endless else chat_model


def lend(chat_model: ChatModel, messages=ASK) -> Request:
    @contextmanager
    def lease() -> Iterator[ChatModel]:
        yield chat_model
    return Request(lease, messages)


def last(requests: list[Request], sampling: Sampling, stop: threading.Event | None = None) -> list[Reply]:
    *_, replies = stream(requests, sampling, stop or threading.Event())
    return replies


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("qwen2").save_pretrained(tmp_path / "q")
    tiny_tokenizer().save_pretrained(tmp_path / "q")
    return tmp_path / "q"


# ── sampling ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wrong", [
    {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": "hot"}, {"top_p": 0}, {"top_p": 1.1},
    {"max_new_tokens": 0}, {"max_new_tokens": 1.5}, {"max_new_tokens": 10**9}, {"seed": -1}, {"seed": True},
    {"system": None}])
def test_sampling_refuses_senseless_numbers(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong)).replace("system", "system prompt")):
        Sampling(**wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_plain_generate(family):
    chat_model = tiny_chat(family, seed=1)
    ids = torch.tensor([chat_model.encode(render(chat_model, ASK))])
    plain = chat_model.model.generate(ids, do_sample=False, max_new_tokens=40, eos_token_id=sorted(chat_model.stop_ids),
                                      pad_token_id=0)[0, ids.shape[1]:]
    [reply] = last([lend(chat_model)], Sampling(max_new_tokens=40))
    words = [i for i in plain.tolist() if i not in chat_model.stop_ids]
    assert reply.text == chat_model.decode(words).rstrip("\ufffd")
    assert reply.tokens == len(words) > 0


def test_equal_models_write_equal_text_at_the_same_time_and_the_seed_decides():
    twins = [tiny_chat("llama", seed=3) for _ in range(2)]
    other = tiny_chat("neox", seed=9)
    hot = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=40, seed=5)
    first, between, second = last([lend(twins[0]), lend(other), lend(twins[1])], hot)
    assert first.text == second.text and first.text != between.text
    [alone] = last([lend(twins[1])], hot)
    assert alone.text == first.text, "the answer depends on the other columns"
    assert last([lend(twins[0])], replace(hot, seed=6))[0].text != first.text


def test_gumbel_draws_from_the_softmax():
    scores = torch.tensor([[0.0, 1.0, 2.0, -1.0, float("-inf")]])
    sampler, draws = GumbelSampler(seed=1), 20_000
    counts = torch.bincount(sampler(None, scores.expand(draws, -1)).argmax(-1), minlength=5)
    expected = scores[0].softmax(-1) * draws
    chi2 = (((counts - expected) ** 2)[:4] / expected[:4]).sum()
    assert counts[4] == 0
    assert chi2 < 16.27, "the counts differ from softmax (p < 0.001 at 3 degrees of freedom)"


def test_temperature_and_top_p_come_before_the_noise():
    scores = torch.tensor([[3.0, 2.9, -2.0, -3.0]])
    kept = torch.stack([torch.tensor(0)] * 200)
    chain = processors(Sampling(temperature=2.0, top_p=0.5, seed=0))
    for i in range(200):
        out = scores.clone()
        for process in chain:
            out = process(None, out)
        kept[i] = out.argmax()
    # softmax(scores / 2) = .47, .45, .04, .03: the two likeliest are needed for a half, and no other may be drawn
    assert set(kept.tolist()) == {0, 1}


def test_a_checkpoint_cannot_smuggle_in_its_own_sampling():
    model = tiny_model()
    [free] = last([lend(from_parts(model, tiny_tokenizer(), "free"))], Sampling(max_new_tokens=30))
    model.generation_config = GenerationConfig(do_sample=True, repetition_penalty=9.0, min_new_tokens=25,
                                               suppress_tokens=list(range(3, 200)), temperature=3.0, top_k=2,
                                               eos_token_id=0)
    [bound] = last([lend(from_parts(model, tiny_tokenizer(), "bound"))], Sampling(max_new_tokens=30))
    assert bound.text == free.text and bound.tokens == free.tokens


# ── stopping ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stop_marks_are_the_union_of_all_who_name_one():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.config.eos_token_id = [7]
    model.generation_config.eos_token_id = [8, 9_999]
    # 0 is the tokenizer's, 2 the template's <|im_end|>; 9999 is no token
    assert from_parts(model, tokenizer, "m").stop_ids == {0, 2, 7, 8}


def test_finish_tells_stop_from_length():
    chat_model = tiny_chat(endless=True)
    [long] = last([lend(chat_model)], Sampling(max_new_tokens=12))
    assert (long.finish, long.tokens) == ("length", 12)
    ids = chat_model.encode(render(chat_model, ASK))
    plain = chat_model.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, pad_token_id=0)
    written = plain[0, len(ids):].tolist()
    mark, first = written[4], written.index(written[4])
    [short] = last([lend(replace(chat_model, stop_ids=frozenset({mark})))], Sampling(max_new_tokens=12))
    assert (short.finish, short.tokens) == ("stop", first)


def test_stop_ends_all_columns_within_half_a_second():
    stop = threading.Event()
    work = stream([lend(tiny_chat(seed=s, endless=True, context=100_000)) for s in (0, 1)],
                  Sampling(max_new_tokens=30_000), stop)
    for replies in work:
        if all(reply.tokens > 3 for reply in replies):
            break
    began = time.perf_counter()
    stop.set()
    *_, replies = work
    assert time.perf_counter() - began < 0.5
    assert [reply.finish for reply in replies] == ["stopped", "stopped"]
    assert all(0 < reply.tokens < 30_000 and reply.text for reply in replies)


def test_closing_the_generator_ends_the_workers():
    work = stream([lend(tiny_chat(endless=True, context=100_000))], Sampling(max_new_tokens=30_000), threading.Event())
    while not next(work)[0].tokens:
        pass
    work.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("chat-")]


def test_stop_does_not_wait_for_a_model_that_loads():
    release, stop = threading.Event(), threading.Event()

    @contextmanager
    def slow():
        release.wait(20)
        yield tiny_chat()
    work = stream([Request(slow, ASK)], Sampling(), stop)
    assert next(work)[0].status.startswith("loading")
    stop.set()
    began = time.perf_counter()
    *_, replies = work
    assert replies[0].finish == "stopped" and time.perf_counter() - began < 2
    release.set()


def test_time_for_loading_is_not_counted():
    @contextmanager
    def slow():
        time.sleep(0.7)
        yield chat_model
    chat_model = tiny_chat(endless=True)
    [reply] = last([Request(slow, ASK)], Sampling(max_new_tokens=5))
    assert 0 < reply.seconds < 0.7 and reply.tokens_per_s == pytest.approx(reply.tokens / reply.seconds)


# ── errors ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("error", "said"), [
    (CheckpointError("The file is cut short"), "cut short"), (MemoryError(), "not enough memory"),
    (KeyError("secret/path"), "KeyError")])
def test_a_failing_column_stops_nobody_else(error, said):
    @contextmanager
    def broken():
        raise error
        yield
    bad, good = last([Request(broken, ASK), lend(tiny_chat(endless=True))], Sampling(max_new_tokens=8))
    assert bad.finish == "error" and said in bad.error and "secret" not in bad.error
    assert good.finish == "length" and good.tokens == 8 and not good.error


def test_weights_that_are_not_numbers_end_in_an_error():
    chat_model = tiny_chat()
    with torch.no_grad():
        chat_model.model.lm_head.weight.fill_(float("nan"))
    [reply] = last([lend(chat_model)], Sampling(temperature=1.0))
    assert reply.finish == "error" and "NaN" in reply.error


# ── prompts ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_render_uses_the_models_own_template():
    text = render(tiny_chat(), ASK, "Be brief.")
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n"
                    "<|im_start|>assistant\n")


@pytest.mark.parametrize("template", [NO_SYSTEM, DEAF])
def test_a_template_without_system_role_gets_it_in_the_first_message(template):
    prompt = fit(tiny_chat(template=template), ASK, "Be brief.", 16)
    assert prompt.text.startswith("<|im_start|>user\nBe brief.\n\nHow are you?<|im_end|>")
    assert "no place for a system prompt" in prompt.notes[0]


def test_a_model_without_template_reads_plain_lines_and_says_so():
    messages = (*ASK, {"role": "assistant", "content": "Fine."}, {"role": "user", "content": "Good."})
    prompt = fit(tiny_chat(template=None), messages, "Be brief.", 16)
    assert prompt.text == "Be brief.\n\nUser: How are you?\nAssistant: Fine.\nUser: Good.\nAssistant:"
    assert "no chat template" in prompt.notes[0]


def test_a_broken_template_is_an_error_in_words():
    with pytest.raises(CheckpointError, match="template"):
        render(tiny_chat(template="{% for %}"), ASK)


def test_oldest_turns_are_dropped_when_the_context_overflows():
    messages = []
    for i in range(12):
        messages += [{"role": "user", "content": f"question {i} " + "?" * 20},
                     {"role": "assistant", "content": f"a{i}"}]
    chat_model = tiny_chat(context=256)
    prompt = fit(chat_model, [*messages, {"role": "user", "content": "the last"}], "Be brief.", 40)
    assert len(prompt.ids) + 40 <= 256 and prompt.room == 40
    assert "Be brief." in prompt.text and "the last" in prompt.text and "question 0 " not in prompt.text
    assert "question 11 " in prompt.text and "left out" in prompt.notes[-1]


def test_a_message_longer_than_the_context_is_refused():
    with pytest.raises(RecipeError, match="Shorten"):
        fit(tiny_chat(context=64), [{"role": "user", "content": "word " * 100}], "", 16)


def test_an_answer_cut_by_the_context_says_so():
    [reply] = last([lend(tiny_chat(endless=True, context=64))], Sampling(max_new_tokens=200))
    assert reply.finish == "length" and reply.tokens < 64 and "context of 64" in reply.notes[-1]


# ── text ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_character_of_several_tokens_never_appears_in_halves(monkeypatch):
    """The model is made to write an emoji and Chinese byte by byte; every flush is looked at."""
    monkeypatch.setattr("fusion.chat.streaming.FLUSH_S", 0.0)
    chat_model = tiny_chat(endless=True)
    wanted = "héllo 🌍 你好 ok"
    ids = [*chat_model.encode(wanted), 2]
    assert len(ids) > len(wanted) + 5, "the tokenizer does not split these characters"
    rounds = iter(ids)

    class Scripted(torch.nn.Module):
        device = torch.device("cpu")

        def generate(self, input_ids, streamer, **_):
            streamer.put(input_ids)
            for i in rounds:
                streamer.put(torch.tensor([i]))
                time.sleep(0.002)
            streamer.end()
    scripted = replace(chat_model, model=Scripted(), stop_ids=frozenset({2}))
    seen = [replies[0].text for replies in stream([lend(scripted)], Sampling(), threading.Event())]
    assert seen[-1] == wanted
    assert len(set(seen)) > 3, "it did not stream"
    for text in seen:
        assert "\ufffd" not in text and wanted.startswith(text)


# ── loading ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_load_reads_a_folder_and_its_size_is_foretold(folder):
    chat_model = load(folder, "mine")
    assert chat_model.name == "mine" and chat_model.context == 256 and chat_model.stop_ids == {0, 2}
    assert chat_model.model.dtype == torch.float32 or torch.cuda.is_available()
    assert expected_bytes(folder) <= chat_model.nbytes <= expected_bytes(folder) + 4096
    assert last([lend(chat_model)], Sampling(max_new_tokens=4))[0].finish in {"stop", "length"}


def test_pickled_weights_are_never_opened(folder):
    from safetensors.torch import load_file
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="only pickle weights"):
        load(folder)


def test_code_in_a_checkpoint_is_never_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert not (folder / "ran").exists() and str(folder) not in str(caught.value)


@pytest.mark.parametrize("damage", ["truncate", "no tokenizer", "lost matrix", "no config", "no folder"])
def test_a_damaged_folder_is_a_checkpoint_error(folder, damage):
    weights = folder / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "no tokenizer":
        for file in folder.glob("token*"):
            file.unlink()
    elif damage == "lost matrix":
        from safetensors.torch import load_file, save_file
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "no config":
        (folder / "config.json").unlink()
    with pytest.raises(CheckpointError):
        load(folder / "nothing" if damage == "no folder" else folder)


def test_importing_chat_does_not_import_torch():
    code = "import sys, fusion.chat; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


# ── pool ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def sized(nbytes: int) -> ChatModel:
    return ChatModel(f"{nbytes} bytes", None, None, frozenset(), nbytes, None)


def never() -> ChatModel:
    raise AssertionError("loaded again")


def test_the_least_recently_used_model_makes_room():
    pool = ModelPool(100)
    a, b = pool.get("a", lambda: sized(40)), pool.get("b", lambda: sized(40))
    assert pool.get("a", never) is a
    pool.get("c", lambda: sized(40))
    assert pool.used_bytes == 80 and pool.get("a", never) is a
    assert pool.get("b", lambda: sized(40)) is not b


def test_a_model_in_use_is_never_evicted():
    pool = ModelPool(100)
    with pool.lease("a", lambda: sized(60)), pytest.raises(ResourceError, match="in use"):
        pool.get("b", lambda: sized(60))
    assert pool.used_bytes == 60
    pool.get("b", lambda: sized(60))
    assert pool.used_bytes == 60


def test_a_model_larger_than_the_budget_is_refused_before_loading_and_costs_nobody_their_place():
    pool = ModelPool(100)
    pool.put("a", sized(90))
    with pytest.raises(ResourceError, match=r"0\.00 GB"):
        pool.get("b", never, nbytes=200)
    with pytest.raises(ResourceError):
        pool.get("b", lambda: sized(200))
    with pytest.raises(ResourceError):
        pool.put("c", sized(200))
    assert pool.get("a", never) and pool.used_bytes == 90


def test_room_is_kept_for_a_model_that_is_still_loading():
    pool, loading, release = ModelPool(100), threading.Event(), threading.Event()

    def slow():
        loading.set()
        release.wait(10)
        return sized(60)
    thread = threading.Thread(target=pool.get, args=("a", slow, 60))
    thread.start()
    assert loading.wait(10)
    with pytest.raises(ResourceError, match="in use"):
        pool.get("b", never, nbytes=60)
    release.set()
    thread.join()
    assert pool.used_bytes == 60


def test_one_load_serves_all_who_ask_at_once():
    pool, loads, got = ModelPool(100), [], []

    def loader():
        loads.append(1)
        time.sleep(0.1)
        return sized(10)
    threads = [threading.Thread(target=lambda: got.append(pool.get("a", loader))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1 and len({id(model) for model in got}) == 1 and len(got) == 6


def test_a_failed_load_leaves_no_trace_and_can_be_tried_again():
    pool = ModelPool(100)
    with pytest.raises(CheckpointError):
        pool.get("a", lambda: (_ for _ in ()).throw(CheckpointError("broken")), nbytes=50)
    assert pool.used_bytes == 0
    assert pool.get("a", lambda: sized(10)).nbytes == 10


def test_put_replaces_and_drop_forgets_but_not_under_a_lease():
    pool = ModelPool(100)
    pool.put("m", sized(30))
    with pool.lease("m", never) as old:
        pool.put("m", sized(40))
        assert pool.used_bytes == 70 and old.nbytes == 30
        assert pool.get("m", never).nbytes == 40
        pool.drop("m")
        assert pool.used_bytes == 30
    assert pool.used_bytes == 0


# ── export ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_jsonl_comes_back_as_it_went():
    sampling = Sampling(system="Be brief.", temperature=0.7, seed=4)
    reply = Reply("Bonjour\n“é”", 5, 1.23456, "length", prompt="<|user|>hi", notes=("cut",))
    asked = Exchange("hi\nthere", sampling, reply)
    failed = Exchange("again", sampling, Reply(finish="error", error="too large"))
    lines = conversation_jsonl([Transcript("Merge 1", "merge/1", (asked, failed), recipe="abc123"),
                                Transcript("Pivot", "demo/pivot", (asked,))],
                               created=datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)).splitlines()
    first, second = map(json.loads, lines)
    assert first["schema_version"] == 1 and first["created"] == "2026-01-02T03:04:05+00:00"
    assert (first["model"], first["key"], first["recipe"], second["recipe"]) == ("Merge 1", "merge/1", "abc123", None)
    assert first["messages"][:2] == [{"role": "user", "content": "hi\nthere"},
                                     {"role": "assistant", "content": "Bonjour\n“é”"}]
    turn = first["turns"][0]
    assert Sampling(**turn["sampling"]) == sampling
    assert (turn["rendered_prompt"], turn["finish_reason"], turn["tokens"], turn["seconds"], turn["notes"]) == (
        "<|user|>hi", "length", 5, 1.235, ["cut"])
    assert first["turns"][1]["error"] == "too large"

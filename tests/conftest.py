"""Small checkpoints for the tests: of a few numbers written out by hand, or of a few layers made by transformers."""

from __future__ import annotations

import json
import os
import signal
import threading
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import settings
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fusion import compiled

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # expected numbers are a processor's; =0 for what test_compiled does on a GPU
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # no test reaches the network; test_hub plays the Hub itself
settings.register_profile("house", max_examples=40, deadline=None)
settings.load_profile("house")

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 2, "tie_word_embeddings": False}
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
_SHAPE = {"vocab_size": 320, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {**_SHAPE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 64}
ARCHITECTURES = {
    "llama": ("Llama", _LLAMA),
    "llama-tied": ("Llama", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", _LLAMA),
    "gpt2": ("GPT2", {**_SHAPE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt-neox": ("GPTNeoX", _LLAMA),
    "mixtral": ("Mixtral", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


def save_checkpoint(folder: Path, tensors: dict[str, np.ndarray], dtype: str = "float32", config: dict | None = None,
                    shards: int = 1) -> Path:
    """Write arrays as a checkpoint; floats are stored as `dtype`, `config` is added to the smallest one."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    stored = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    stored = {name: value.to(getattr(torch, dtype)) if value.is_floating_point() else value for name, value in stored.items()}
    if shards == 1:
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(stored))}
    for file in set(weight_map.values()):
        save_file({name: value for name, value in stored.items() if weight_map[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def save_raw(folder: Path, header: dict | bytes, data: bytes = b"", length: int | None = None, config: dict | None = None) -> Path:
    """Write a safetensors file byte by byte: `header` may lie, `length` is the header length that the file claims."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(claimed.to_bytes(8, "little") + text + data)
    return folder


def hear_interrupts() -> None:
    """For a child before it starts: a shell makes what it runs in the background deaf to SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint as safetensors itself reads them."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its bytes; folders with none."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@lru_cache(maxsize=1)
def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["how are you today, user and assistant?"] * 4, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    return fast


def save_family(folder: Path, arch: str = "llama", targets: int = 2, dtype: str = "bfloat16") -> list[Path]:
    """Make a real pivot and its fine-tunes with transformers; returns their folders, the pivot first."""
    family, config = ARCHITECTURES[arch]
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}Config")(**config, initializer_range=0.2)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=getattr(torch, dtype))
    model.generation_config = transformers.GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=2)
    folders = [folder / "pivot", *(folder / f"target-{'abcdefgh'[j]}" for j in range(targets))]
    for j, its in enumerate(folders):
        model.save_pretrained(its)
        tiny_tokenizer().save_pretrained(its)
        torch.manual_seed(j + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02 * (j + 1))
    return folders


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """`family(arch)`: folders of a real pivot and two targets, made once; never write into them."""
    return lru_cache(lambda arch="llama": save_family(tmp_path_factory.mktemp(arch), arch))


@pytest.fixture(scope="session")
def browser():
    """One headless Chromium for all tests of the page."""
    from tests.browser import chromium

    with chromium() as started:
        yield started


@pytest.fixture(autouse=True)
def nothing_is_loaded_yet(monkeypatch):
    """Every test begins with numpy's loops, as a new process does, whatever loops the work of an earlier one has loaded."""
    monkeypatch.setattr(compiled, "_library", None)


@pytest.fixture(scope="session")
def library():
    """The compiled loops; built once, which takes most of a minute."""
    pytest.importorskip("numba")
    from fusion.compiled import library

    return library.find() or library.make()


@pytest.fixture
def hub_log(monkeypatch):
    """The Hub is a server of this test that has nothing; the list of what it is asked, with a token that must not leave."""
    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self):
            log.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *words):
            pass

    log: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Nothing) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_canary")
        yield log
        server.shutdown()

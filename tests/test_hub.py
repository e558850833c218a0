"""fusion.hub: models from the Hub, which a small server on this machine plays."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from fusion import hub, preflight
from fusion.errors import CheckpointError, ResourceError
from fusion.sources import open_checkpoint, peek
from tests.conftest import save_checkpoint, tiny_tokenizer
from tests.test_adapters import BASE, Q, pair, save_adapter

SHA, OLD = "a" * 40, "b" * 40
REVISIONS = {"main": SHA, SHA: SHA, "v1": OLD, OLD: OLD}


class Hub(BaseHTTPRequestHandler):
    """The endpoints that huggingface_hub asks: facts of a model, its tree, its files whole or in part."""

    repos: dict[str, dict[str, Path]]  # repo → commit → folder
    log: list[tuple[str, str]]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.log.append((self.path, self.headers.get("Authorization", "")))
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/(revision|tree)/([\w./-]+)", path):
            self.facts(found[1], found[2], found[3])
        elif found := re.fullmatch(r"/(\w+/[\w.-]+)/resolve/(\w+)/([\w.-]+)", path):
            self.content(self.repos[found[1]][REVISIONS[found[2]]] / found[3])
        else:
            self.answer(404, {"error": path})

    def facts(self, repo: str, kind: str, revision: str):
        if repo == "org/gated":
            self.answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        elif repo == "org/broken":
            self.answer(500, {"error": "out of order"})
        elif repo not in self.repos:
            self.answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        elif revision not in REVISIONS:
            self.answer(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            commit = REVISIONS[revision]
            files = [(path.name, path.stat().st_size) for path in sorted(self.repos[repo][commit].iterdir())]
            tree = [{"type": "file", "path": name, "rfilename": name, "size": size, "oid": "0"} for name, size in files]
            self.answer(200, {"id": repo, "sha": commit, "siblings": tree} if kind == "revision" else tree)

    def content(self, file: Path):
        if not file.is_file():
            self.answer(404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound"})
            return
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": file.parent.name, "Accept-Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            chunk = data[int(part[1]):int(part[2] or len(data) - 1) + 1]
            headers["Content-Range"] = f"bytes {part[1]}-{int(part[1]) + len(chunk) - 1}/{len(data)}"
            self.answer(206, chunk, headers)
        else:
            self.answer(200, data, headers)

    def answer(self, status: int, body: object, headers: dict[str, str] | None = None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The Hub with org/model at two commits and org/lora; `server.log` lists what it was asked."""
    root = tmp_path / "hub"
    repos = {"org/model": {SHA: root / SHA, OLD: root / OLD}}
    for commit, factor in ((SHA, 1), (OLD, 2)):
        folder = save_checkpoint(root / commit, {name: factor * value for name, value in BASE.items()}, shards=2)
        tiny_tokenizer().save_pretrained(folder)
        (folder / "modeling_evil.py").write_text("raise SystemExit")
        (folder / "pytorch_model.bin").write_bytes(b"evil")
    repos["org/lora"] = {SHA: save_adapter(root / "lora" / SHA, pair())}
    handler = type("Handler", (Hub,), {"repos": repos, "log": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        running.log = handler.log
        running.repos = repos
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running
        running.shutdown()


def asked(server, name: str) -> list[str]:
    return [path for path, _ in server.log if path.endswith(name)]


def refused(ref: str, **kind) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(ref)
    return str(caught.value)


@pytest.mark.parametrize(("ref", "commit", "factor"), [
    ("org/model", SHA, 1), ("org/model@main", SHA, 1), ("org/model@v1", OLD, 2), (f"org/model@{OLD}", OLD, 2)])
def test_a_model_is_downloaded_at_the_commit_of_its_revision(server, ref, commit, factor):
    model = open_checkpoint(ref)
    assert (model.name, model.revision, set(model)) == ("model", commit, set(BASE))
    assert all(np.array_equal(model[name], factor * value) for name, value in BASE.items())
    assert model.vocabulary == tiny_tokenizer().get_vocab()


def test_code_and_pickles_are_never_fetched(server):
    folder = open_checkpoint("org/model").folder
    assert not asked(server, ".py") and not asked(server, ".bin")
    assert not [path for path in folder.iterdir() if path.suffix in (".py", ".bin")]


def test_an_adapter_can_come_from_the_hub_too(server, tmp_path):
    base = save_checkpoint(tmp_path / "base", BASE)
    for ref, revision in ((f"{base}+org/lora", SHA), ("org/model@v1+org/lora@main", f"{OLD}+{SHA}")):
        model = open_checkpoint(ref)
        factor = 2 if "@v1" in ref else 1
        assert model[Q][0].tolist() == [6, factor, 12 + 2 * factor] and model.revision == revision
    assert "this is an adapter, not a whole model" in refused("org/lora")


def test_a_folder_wins_over_the_hub(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "org" / "model", {Q: np.zeros((2, 2), np.float32)})
    assert set(open_checkpoint("org/model")) == {Q} and not server.log


@pytest.mark.parametrize(("ref", "words"), [
    ("org/gone", "there is no such folder, and no such model on the Hub"),
    ("org/model@v9", "the model has no revision 'v9'"),
    ("org/gated", "the model is gated. Accept its terms on https://huggingface.co/org/gated and set HF_TOKEN"),
    ("org/broken", "the Hub did not give it"),
    ("org/-bad-", "no name of a model"),
])
def test_what_the_hub_refuses_is_said(server, ref, words):
    assert words in refused(ref)


def test_a_repository_of_pickles_is_refused(server):
    for shard in server.repos["org/model"][SHA].glob("*.safetensors"):
        shard.unlink()
    assert "no safetensors weights on the Hub" in refused("org/model")


@pytest.mark.parametrize("ref", ["gone", "./org/model", "/org/model", "~/org/model", "org/model/more", "../model", "org/.."])
def test_a_path_is_not_asked_of_the_hub(server, ref):
    assert "there is no such folder" in refused(ref) and not server.log


def test_without_network_the_cache_answers(server, monkeypatch):
    first = open_checkpoint("org/model")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    again = open_checkpoint(f"org/model@{SHA}")
    assert again.revision == SHA and np.array_equal(again[Q], first[Q])
    assert "the Hub cannot be reached" in refused("org/other")


def test_the_token_comes_from_the_environment_alone(server, monkeypatch, tmp_path):
    (tmp_path / "token").write_text("hf_stored")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    open_checkpoint("org/model")
    assert {token for _, token in server.log} == {""}
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    open_checkpoint("org/model@v1")
    assert "Bearer hf_mine" in {token for _, token in server.log}


def test_a_disk_that_is_too_small_is_found_before_the_download(server, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(ResourceError, match="downloading it takes"):
        open_checkpoint("org/model")
    assert not asked(server, ".safetensors")


# ── facts before the download ────────────────────────────────────────────────────────────────────────────────────────

def test_a_peek_fetches_headers_only(server):
    seen, whole = peek("org/model"), None
    sizes = [path for path in asked(server, ".safetensors") if "resolve" in path]
    assert len(sizes) == 2
    whole = open_checkpoint("org/model")
    for fact in ("name", "revision", "parameters", "nbytes", "layers", "dtype", "architecture", "vocab_size", "tied", "vocabulary"):
        assert getattr(seen, fact) == getattr(whole, fact), fact
    assert {name: tensor.shape for name, tensor in seen.info.items()} == {name: tensor.shape for name, tensor in whole.info.items()}
    with pytest.raises(CheckpointError, match="not downloaded"):
        seen[Q]


def test_a_preflight_of_what_is_not_downloaded(server):
    report = preflight(peek("org/model"), [peek("org/model@v1", "old"), peek("org/model@v1+org/lora")])
    assert [model.name for model in report.models] == ["model", "old", "model+lora"]
    assert {(one.level, "beyond the last row" in one.text) for one in report.findings} == {("warning", True)}
    assert report.bytes_read == 3 * sum(value.nbytes for value in BASE.values())


@pytest.mark.parametrize("content", [b"", b"\x08", b"\x00" * 40, (99).to_bytes(8, "little") + b"{" * 99,
                                     (2**60).to_bytes(8, "little") + b"x" * 20,
                                     (47).to_bytes(8, "little") + b'{"a":{"dtype":"F9","shape":[],"data_offsets":[0]}}'])
def test_a_broken_header_on_the_hub_is_an_error(server, content):
    for shard in server.repos["org/model"][SHA].glob("*.safetensors"):
        shard.write_bytes(content)
    with pytest.raises(CheckpointError):
        peek("org/model")


def test_a_peek_at_a_folder_opens_it(tmp_path):
    assert np.array_equal(peek(save_checkpoint(tmp_path / "m", BASE))[Q], BASE[Q])

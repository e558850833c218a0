"""A teacher behind a running server that returns log-probabilities of prompt tokens: vLLM, or the legacy form of OpenAI.

    teacher = ServerTeacher("mixtral-tokenizer", "http://localhost:8000/v1", "mixtral")
    store = finish(represent(teacher, dialogues, "work/mixtral"))

The server gets token ids, so only the tokenizer must be here, not the weights. Price: per dialogue one request, whose answer
holds about 80 bytes for every token and each of its k entries.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fusion.align import surfaces
from fusion.distill.encoding import Encoded, Encoder
from fusion.distill.store import Rows
from fusion.endpoint import Passing, Refused, Server
from fusion.errors import CheckpointError, FusionError
from fusion.sources import hub_model

NO_LOGPROBS = "Serve the model where the completions API gives log-probabilities of prompt tokens, such as vLLM."
_ENTRY_BYTES = 400  # room for one entry of an answer; about 80 are usual
_ROUNDED = 1e-3  # how far probabilities may be off through rounding
Entries = list[tuple[int, float]]  # (id, log-probability), best first


class ServerTeacher:
    """A model that an OpenAI-compatible server runs; see `fusion.distill.teacher.Teacher`.

    `tokenizer`: a folder or Hub id of the served model's tokenizer, which must be the very same; `base_url` such as
    http://localhost:8000/v1 and `model`, its name there; `template` shared by all models, None = the tokenizer's own.
    `max_tokens` cuts dialogues; the server's context must hold one token more. Further `patience` (timeout_s, tries …): see
    `fusion.endpoint.Server`. CheckpointError when the tokenizer cannot be loaded, RecipeError for a senseless address. Nothing
    is asked before `rows`.
    """

    def __init__(self, tokenizer: str | os.PathLike, base_url: str, model: str, *, template: str | None = None,
                 max_tokens: int | None = None, **patience):
        self.server = Server(base_url, model, **patience)
        loaded = load_tokenizer(tokenizer)
        self.encoder = Encoder(loaded, template, max_tokens)
        digest = hashlib.sha256(loaded.backend_tokenizer.to_str().encode("utf-8", "surrogatepass")).hexdigest()
        self.mark = f"server {self.server.base_url.rstrip('/')} model {model} tokenizer {digest}"
        self._form: Callable[[Encoded, int, threading.Event], Rows] | None = None
        self._words: dict[str, int] = {}

    def rows(self, batch: Sequence[Encoded], top_k: int) -> list[Rows]:
        """See Teacher; several dialogues are asked at once. FusionError when the server fails, refuses or answers nonsense."""
        stop = threading.Event()
        found = [] if self._form is not None or not batch else [self._first(batch[0], top_k, stop)]
        with ThreadPoolExecutor(self.server.concurrency, "teacher") as pool:
            asked = [pool.submit(self._form, encoded, top_k, stop) for encoded in batch[len(found):]]
            try:
                return found + [one.result() for one in asked]
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _first(self, encoded: Encoded, top_k: int, stop: threading.Event) -> Rows:
        """Find out which form the server knows, by asking; it is used from then on."""
        reasons: list[Exception] = []
        for form in (self._by_prompt_logprobs, self._by_echo):
            try:
                rows = form(encoded, top_k, stop)
            except Refused as refused:
                if refused.status in (401, 403, 404):
                    raise
                reasons.append(refused)
            except _Absent as absent:
                reasons.append(absent)
            else:
                self._form = form
                return rows
        if all(isinstance(reason, Refused) for reason in reasons):  # a prompt that is too long, more entries than it allows …
            raise reasons[0]
        said = "; ".join(reason.found if isinstance(reason, Refused) else str(reason) for reason in reasons)
        raise FusionError(f"the server gives no log-probabilities of prompt tokens ({said})",
                          where=self.server.base_url, todo=NO_LOGPROBS)

    def _by_prompt_logprobs(self, encoded: Encoded, top_k: int, stop: threading.Event) -> Rows:
        """vLLM: per prompt token a table id → {logprob, rank} of the k best and of the token itself, null at the first."""
        choice = self._ask(encoded, {"prompt_logprobs": top_k}, top_k, stop)
        given = choice.get("prompt_logprobs")
        if given is None:
            raise _Absent("prompt_logprobs are not known to it")
        self._sized(given, len(encoded.ids), exact=True)
        return self._gathered(encoded, top_k, [self._numbered(given[at]) for at in encoded.labels])

    def _by_echo(self, encoded: Encoded, top_k: int, stop: threading.Event) -> Rows:
        """The legacy form: the prompt is echoed with log-probabilities by the text of tokens; what follows it is left out."""
        choice = self._ask(encoded, {"echo": True, "logprobs": top_k}, top_k, stop)
        given = choice.get("logprobs")
        if not isinstance(given, dict) or any(given.get(name) is None for name in ("tokens", "token_logprobs", "top_logprobs")):
            raise _Absent("it echoes no logprobs")
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            self._sized(given[name], len(encoded.ids), exact=False)
        entries = []
        for at, gold in zip(encoded.labels, encoded.targets, strict=True):
            entries.append(self._spelt(given["tokens"][at], int(gold), given["token_logprobs"][at], given["top_logprobs"][at]))
        return self._gathered(encoded, top_k, entries)

    def _ask(self, encoded: Encoded, wish: Mapping[str, object], top_k: int, stop: threading.Event) -> dict:
        """The first choice of the answer; one token is generated, since not every server allows none."""
        body = {"prompt": encoded.ids.tolist(), "max_tokens": 1, "temperature": 0, **wish}
        room = (1 << 20) + len(encoded.ids) * (top_k + 2) * _ENTRY_BYTES
        data = self.server.post(body, _json, optional=("temperature",), max_reply_bytes=room, stop=stop)
        try:
            choice = data["choices"][0]
        except (KeyError, IndexError, TypeError) as error:
            raise self._nonsense("has no choices") from error
        if not isinstance(choice, dict):
            raise self._nonsense("has no choices")
        return choice

    def _sized(self, given: object, length: int, exact: bool) -> None:
        """One entry per token of the prompt; after an echo more may follow."""
        if not isinstance(given, list) or len(given) < length or (exact and len(given) != length):
            count = len(given) if isinstance(given, list) else "none"
            raise self._nonsense(f"has {count} entries for {length} tokens")

    def _numbered(self, table: object) -> Entries:
        """One position of vLLM's form."""
        if not isinstance(table, dict):
            raise self._nonsense("lacks the log-probabilities of a token")
        ranked = []
        for token, its in table.items():
            if not (token.isascii() and token.isdigit() and len(token) < 10) or not isinstance(its, dict):
                raise self._nonsense(f"has {token[:40]!r} where a token id should be")
            rank = its.get("rank")
            ranked.append((-self._number(its.get("logprob")), rank if isinstance(rank, int) else 0, int(token)))
        return [(token, -negative) for negative, _, token in sorted(ranked)]

    def _spelt(self, text: object, gold: int, chance: object, table: object) -> Entries:
        """One position of the legacy form; tokens that several ids could be, or none, are left out."""
        if not isinstance(table, dict) or not isinstance(text, str):
            raise self._nonsense("lacks the log-probabilities of a token")
        words = self._by_text()
        found = {gold: self._number(chance)}
        for word, value in table.items():
            number = gold if word == text else _given_id(word, words)
            if number is not None:
                found.setdefault(number, self._number(value))
        return sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))

    def _by_text(self) -> dict[str, int]:
        """Ids by the text of their tokens as servers write it: decoded alone, or as the vocabulary has it; clear ones only."""
        if not self._words:
            tokenizer = self.encoder.tokenizer
            entries = tokenizer.get_vocab()
            texts = surfaces(entries, {token.content for token in tokenizer.added_tokens_decoder.values()})
            alone = dict(zip(entries.values(), tokenizer.batch_decode([[i] for i in entries.values()],
                                                                      clean_up_tokenization_spaces=False), strict=True))
            words: dict[str, set[int]] = {}
            for token, i in entries.items():
                for text in {token, texts[token], alone[i]}:
                    words.setdefault(text, set()).add(i)
            self._words = {text: min(its) for text, its in words.items() if len(its) == 1}
        return self._words

    def _gathered(self, encoded: Encoded, top_k: int, entries: Sequence[Entries]) -> Rows:
        """Rows of the k best, and −log p of every gold token; places that were not told are −1 with probability 0."""
        ids, logprobs = np.full((len(entries), top_k), -1, np.int32), np.full((len(entries), top_k), -np.inf, np.float32)
        nats = np.zeros(len(entries), np.float32)
        for row, (found, gold) in enumerate(zip(entries, encoded.targets.tolist(), strict=True)):
            chances = dict(found)
            if gold not in chances:
                raise self._nonsense(f"leaves out token {gold} of the prompt; is the tokenizer the served model's")
            if math.fsum(map(math.exp, chances.values())) > 1 + _ROUNDED * len(chances):
                raise self._nonsense("has probabilities that sum to more than 1")
            best = found[:top_k]
            ids[row, :len(best)], logprobs[row, :len(best)] = [i for i, _ in best], [chance for _, chance in best]
            nats[row] = -chances[gold]
        return Rows(ids, logprobs, nats)

    def _number(self, value: object) -> float:
        """A log-probability, or FusionError."""
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not -1e9 < value < _ROUNDED:
            raise self._nonsense(f"has {str(value)[:40]!r} where a log-probability should be")
        return min(float(value), 0.0)

    def _nonsense(self, said: str) -> FusionError:
        return FusionError(f"the server's answer {said}", where=self.server.base_url, todo=NO_LOGPROBS)


class _Absent(Exception):
    """The server answered, but without what was asked for."""


def _json(reply: bytes) -> object:
    try:
        return json.loads(reply)
    except (ValueError, RecursionError) as error:
        raise Passing("its answer is no JSON") from error


def _given_id(word: str, words: Mapping[str, int]) -> int | None:
    """The id of a token's text; vLLM may also be told to write "token_id:17"."""
    number = word.removeprefix("token_id:")
    return int(number) if number != word and number.isdigit() and len(number) < 10 else words.get(word)


def load_tokenizer(ref: str | os.PathLike):
    """The tokenizer of a folder or of "org/name[@revision]" on the Hub, without the weights; CheckpointError when there is none."""
    from transformers import AutoTokenizer

    text = os.fspath(ref)
    found = hub_model(text)
    if found is None and not os.path.isdir(text):
        raise CheckpointError("no such folder", where=text, todo="Give a folder with tokenizer.json, or a model on the Hub.")
    name, revision = found or (text, "main")
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"its tokenizer cannot be loaded ({str(error)[:300]})", where=text) from error

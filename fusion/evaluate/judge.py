"""A judge's opinion by the MT-Bench protocol: the models answer two-turn questions, a strong model behind an address judges.

    judged = finish(judge(models, load_questions("question.jsonl"), Endpoint(url, "gpt-4"), ledger))

Answers are greedy in every category (the published protocol samples in some), so that a run can be repeated. Judges waver: the
same answers graded again differ by up to 0.2 on average, which no interval over prompts contains. Price: one request per answer,
or two per pair of answers.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from fusion.endpoint import Refused
from fusion.errors import RecipeError
from fusion.evaluate import rubric
from fusion.evaluate.answering import Answer, answer
from fusion.evaluate.endpoint import Endpoint
from fusion.evaluate.ledger import Ledger
from fusion.evaluate.models import Lent, Models, lend
from fusion.evaluate.questions import JudgeQuestion
from fusion.evaluate.scores import Scores
from fusion.progress import Meter, Work

MAX_NEW_TOKENS = 1024
_MOST_REPLIES = 3  # to one request, as long as none holds a verdict
_ONE_REQUEST = {400, 413, 422}  # what a server says to a single request that it does not take, such as one too long for its model
_WAKE_S, _GRACE_S = 0.5, 1.0


@dataclass(frozen=True)
class _Request:
    """One thing to ask the judge: the key that its verdict is kept under, and the same as `facts` for people."""

    key: str
    messages: list[dict[str, str]]
    facts: dict[str, object]

    @property
    def pairwise(self) -> bool:
        """Whether a winner is asked for, not a grade."""
        return "first" in self.facts


def plan(fingerprints: Mapping[str, str], questions: Sequence[JudgeQuestion], endpoint: Endpoint, pairs: Sequence[tuple[str, str]],
         max_new_tokens: int) -> dict:
    """What a ledger is made for: everything that answers and verdicts depend on."""
    texts = json.dumps([vars(question) for question in questions])
    return {"models": dict(fingerprints), "questions": hashlib.sha256(texts.encode()).hexdigest(), "judge": endpoint.model,
            "endpoint": endpoint.base_url, "judge_max_tokens": endpoint.max_tokens, "pairs": [list(pair) for pair in pairs],
            "max_new_tokens": max_new_tokens, "rubric": rubric.VERSION}


def pairs_of(models: Sequence[str], baseline: str | None) -> list[tuple[str, str]]:
    """Who is compared with whom: each with the baseline, or all with all; RecipeError for fewer than two models."""
    if len(models) < 2:
        raise RecipeError("comparing in pairs needs two models or more")
    return list(combinations(models, 2)) if baseline is None else [(name, baseline) for name in models if name != baseline]


def judge(models: Models, questions: Sequence[JudgeQuestion], endpoint: Endpoint, ledger: Ledger, *,
          pairs: Sequence[tuple[str, str]] = (), max_new_tokens: int = MAX_NEW_TOKENS) -> Work[Scores]:
    """Let every model answer and the judge grade every answer, or compare `pairs` in both orders when there are any.

    Grades are 1 to 10. A pair's value is 1 where the first model wins in both orders, 0 where it loses in both, ½ for ties and
    where the order decided. Without a readable verdict a value is NaN. Yields Progress; raises FusionError.
    """
    for name, ref in models.items():
        yield from _answers(name, ref, questions, ledger, max_new_tokens)
    requests = list(_comparisons(questions, pairs, ledger) if pairs else _grades(models, questions, ledger))
    yield from _verdicts([request for request in requests if request.key not in ledger.records], endpoint, ledger)
    return _pair_scores(questions, pairs, ledger) if pairs else _single_scores(tuple(models), questions, ledger)


def _key(*parts: object) -> str:
    return json.dumps(parts, ensure_ascii=False)


def _said(ledger: Ledger, name: str, question: JudgeQuestion, turns: int) -> list[str]:
    return [ledger.records[_key("answer", name, question.question_id, turn)]["text"] for turn in range(1, turns + 1)]


def _answers(name: str, ref: str | Lent, questions: Sequence[JudgeQuestion], ledger: Ledger, max_new_tokens: int) -> Work[None]:
    """Fill in the answers of one model, turn by turn; it is loaded only when some are missing."""
    with ExitStack() as lease:
        yield from _turns(name, ref, questions, ledger, max_new_tokens, lease)


def _turns(name: str, ref: str | Lent, questions: Sequence[JudgeQuestion], ledger: Ledger, max_new_tokens: int,
           lease: ExitStack) -> Work[None]:
    model = None
    for turn in range(1, max(len(question.turns) for question in questions) + 1):
        wanted = [question for question in questions if len(question.turns) >= turn
                  and _key("answer", name, question.question_id, turn) not in ledger.records]
        if not wanted:
            continue
        model = model or lease.enter_context(lend(ref, name))
        conversations = [_conversation(question, _said(ledger, name, question, turn - 1)) for question in wanted]

        def keep(number: int, given: Answer, turn: int = turn, wanted: list[JudgeQuestion] = wanted) -> None:
            own = wanted[number].question_id
            ledger.add(_key("answer", name, own, turn), {"model": name, "question_id": own, "turn": turn, "text": given.text,
                                                         "finish": given.finish, "tokens": given.tokens,
                                                         **({"thought": given.thought} if given.thought else {})})
        yield from answer(model, conversations, max_new_tokens, Meter(f"Answering, turn {turn}", len(wanted), "questions"), keep)


def _conversation(question: JudgeQuestion, said: Sequence[str]) -> list[dict[str, str]]:
    messages = []
    for number, asked in enumerate(question.turns[:len(said) + 1]):
        messages.append({"role": "user", "content": asked})
        messages += [{"role": "assistant", "content": said[number]}] if number < len(said) else []
    return messages


def _grades(models: Models, questions: Sequence[JudgeQuestion], ledger: Ledger) -> Iterator[_Request]:
    for name in models:
        for question in questions:
            for turn in range(1, len(question.turns) + 1):
                messages = rubric.single(question.turns[:turn], _said(ledger, name, question, turn), question.references[:turn])
                yield _Request(_key("grade", name, question.question_id, turn), messages,
                               {"model": name, "question_id": question.question_id, "turn": turn})


def _comparisons(questions: Sequence[JudgeQuestion], pairs: Sequence[tuple[str, str]], ledger: Ledger) -> Iterator[_Request]:
    for one, other in pairs:
        for question in questions:
            for turn in range(1, len(question.turns) + 1):
                for first, second in ((one, other), (other, one)):
                    said = [_said(ledger, name, question, turn) for name in (first, second)]
                    messages = rubric.pair(question.turns[:turn], *said, question.references[:turn])
                    yield _Request(_key("pair", first, second, question.question_id, turn), messages,
                                   {"first": first, "second": second, "question_id": question.question_id, "turn": turn})


def _verdicts(requests: Sequence[_Request], endpoint: Endpoint, ledger: Ledger) -> Work[None]:
    """Ask for all verdicts that are missing, several at once; an error that concerns all of them ends the work."""
    stop, meter = threading.Event(), Meter("Judging", len(requests), "verdicts")
    left, news, refused = queue.SimpleQueue(), queue.SimpleQueue(), []
    for request in requests:
        left.put(request)
    # Daemons: a reply that takes minutes must not keep a person waiting who has asked to stop.
    workers = [threading.Thread(target=_work, args=(left, news, endpoint, ledger, stop), name=f"judge-{i}", daemon=True)
               for i in range(min(endpoint.concurrency, len(requests)))]
    try:
        for worker in workers:
            worker.start()
        yield meter.step()
        while meter.done < len(requests):
            try:
                ended = news.get(timeout=_WAKE_S)
            except queue.Empty:
                yield meter.step()
                continue
            if isinstance(ended, Exception):
                raise ended
            refused += [ended] if ended else []
            yield meter.step(1)
    finally:
        stop.set()
        until = time.monotonic() + _GRACE_S
        for worker in filter(threading.Thread.is_alive, workers):
            worker.join(max(0.0, until - time.monotonic()))
    _keep_refused(refused, ledger)


def _keep_refused(refused: Sequence[tuple[_Request, Refused]], ledger: Ledger) -> None:
    """Requests that the server alone does not take have no verdict; when it takes none at all, its words are an error."""
    if refused and not any("verdict" in record for record in ledger.records.values()):
        raise refused[0][1]
    for request, error in refused:
        ledger.add(request.key, {**request.facts, "verdict": None, "reply": "", "asked": 1, "ended": f"HTTP {error.status}"})


def _work(left: queue.SimpleQueue, news: queue.SimpleQueue, endpoint: Endpoint, ledger: Ledger, stop: threading.Event) -> None:
    """Take requests until there are none; report None for each that was judged, (request, Refused) for one that the server
    does not take, or the error that ends the work."""
    while not stop.is_set():
        try:
            request = left.get_nowait()
        except queue.Empty:
            return
        try:
            _verdict(request, endpoint, ledger, stop)
        except Refused as error:
            news.put((request, error) if error.status in _ONE_REQUEST else error)
            continue
        except Exception as error:
            news.put(error)
            return
        news.put(None)


def _verdict(request: _Request, endpoint: Endpoint, ledger: Ledger, stop: threading.Event) -> None:
    """Ask until there is a verdict; a reply that was cut or holds no words has none, and would end alike again."""
    read = rubric.winner if request.pairwise else rubric.grade
    verdict, whole, asked = None, True, 0
    while verdict is None and whole and asked < _MOST_REPLIES:
        said, asked = endpoint.reply(request.messages, stop), asked + 1
        whole = said.finish != "length" and bool(said.text.strip())
        verdict = read(said.text) if whole else None
    ledger.add(request.key, {**request.facts, "verdict": verdict, "reply": said.text, "asked": asked, "ended": said.finish})


def missing(ledger: Ledger, max_tokens: int) -> str:
    """How many verdicts are missing and why, in a sentence; "" when there are none."""
    judged = [record for record in ledger.records.values() if "verdict" in record]
    why = Counter(_why(record, max_tokens) for record in judged if record["verdict"] is None)
    if not why:
        return ""
    kinds = ", ".join(f"{count} {reason}" for reason, count in why.items())
    advice = " Let the judge write longer replies." if any(reason.startswith("cut off") for reason in why) else ""
    return f"{sum(why.values())} of {len(judged)} verdicts are missing and count nowhere: {kinds}.{advice}"


def _why(record: Mapping[str, object], max_tokens: int) -> str:
    ended = str(record.get("ended", ""))
    if ended == "length":
        return f"cut off at {max_tokens:,} tokens"
    if ended.startswith("HTTP"):
        return f"refused by the server ({ended})"
    return "without a verdict in it" if str(record["reply"]).strip() else "empty"


def _items(questions: Sequence[JudgeQuestion]) -> list[tuple[JudgeQuestion, int]]:
    return [(question, turn) for question in questions for turn in range(1, len(question.turns) + 1)]


def _cut(ledger: Ledger, name: str, question: JudgeQuestion, turn: int) -> bool:
    return ledger.records[_key("answer", name, question.question_id, turn)]["finish"] != "stop"


def _single_scores(models: tuple[str, ...], questions: Sequence[JudgeQuestion], ledger: Ledger) -> Scores:
    items = _items(questions)
    verdicts = [[ledger.records[_key("grade", name, question.question_id, turn)]["verdict"] for question, turn in items]
                for name in models]
    cut = np.array([[_cut(ledger, name, question, turn) for question, turn in items] for name in models])
    return _made("Grades by a judge", models, items, np.array(verdicts, np.float64), cut, unit="1 to 10")


def _pair_scores(questions: Sequence[JudgeQuestion], pairs: Sequence[tuple[str, str]], ledger: Ledger) -> Scores:
    items = _items(questions)
    values = [[_outcome(ledger, one, other, question, turn) for question, turn in items] for one, other in pairs]
    cut = np.array([[any(_cut(ledger, name, question, turn) for name in pair) for question, turn in items] for pair in pairs])
    return _made("Pairs judged in both orders: share won, ties count half", tuple(f"{one} vs {other}" for one, other in pairs),
                 items, np.array(values), cut, unit="%", scale=100.0, even=0.5)


def _outcome(ledger: Ledger, one: str, other: str, question: JudgeQuestion, turn: int) -> float:
    there, back = (ledger.records[_key("pair", *names, question.question_id, turn)]["verdict"]
                   for names in ((one, other), (other, one)))
    if there is None or back is None:
        return float("nan")
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((there, back), 0.5)


def position_bias(questions: Sequence[JudgeQuestion], pairs: Sequence[tuple[str, str]], ledger: Ledger) -> dict[str, int]:
    """How often the order decided: {"judged", "first_shown_won_twice", "second_shown_won_twice", "otherwise_unsteady"}."""
    counts = dict.fromkeys(("judged", "first_shown_won_twice", "second_shown_won_twice", "otherwise_unsteady"), 0)
    steady = {("A", "B"), ("B", "A"), ("tie", "tie")}
    for one, other in pairs:
        for question, turn in _items(questions):
            seen = tuple(ledger.records[_key("pair", *names, question.question_id, turn)]["verdict"]
                         for names in ((one, other), (other, one)))
            counts["judged"] += None not in seen
            counts["first_shown_won_twice"] += seen == ("A", "A")
            counts["second_shown_won_twice"] += seen == ("B", "B")
            counts["otherwise_unsteady"] += None not in seen and seen[0] != seen[1] and seen not in steady
    return counts


def _made(title: str, rows: tuple[str, ...], items: Sequence[tuple[JudgeQuestion, int]], values: np.ndarray, cut: np.ndarray,
          **shown) -> Scores:
    prompts, categories = ([getattr(question, field) for question, _ in items] for field in ("question_id", "category"))
    return Scores(title, rows, tuple(prompts), tuple(categories), values, cut, turns=tuple(turn for _, turn in items), **shown)

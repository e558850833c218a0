"""The four ways to evaluate, each from what a person says to a finished Evaluation: for the command line and for a page alike."""

from __future__ import annotations

import os
from collections.abc import Sequence

from fusion.evaluate import harness, judge, perplexity, tasks
from fusion.evaluate.endpoint import Endpoint
from fusion.evaluate.ledger import Ledger
from fusion.evaluate.models import Models, fingerprints, written
from fusion.evaluate.questions import JudgeQuestion
from fusion.evaluate.report import Evaluation, refuse_existing, write
from fusion.evaluate.tables import from_scores
from fusion.progress import Work


def by_questions(models: Models, questions: Sequence[tasks.Question], *, baseline: str | None = None,
                 max_new_tokens: int = tasks.MAX_NEW_TOKENS) -> Work[Evaluation]:
    """Right and wrong answers to questions that a program can check."""
    scores, records = yield from tasks.measure(models, questions, max_new_tokens)
    settings = {"models": written(models), "prompts": len(questions), "max_new_tokens": max_new_tokens, "sampling": "greedy"}
    return Evaluation("domains", settings, from_scores(scores, baseline), scores, tuple(records))


def by_perplexity(models: Models, data: str | perplexity.Data, *, baseline: str | None = None,
                  limit: int | None = None, split: str = "train", subset: str = "") -> Work[Evaluation]:
    """Nats per token and per character on the dialogues or texts of a file or Hub dataset, or on `Data` that was read already."""
    pieces = perplexity.read(data, limit, split=split, subset=subset) if isinstance(data, str) else data
    scores, records = yield from perplexity.measure(models, pieces)
    per_token = perplexity.per_token(scores)
    details = {"perplexity_per_token": per_token, "data": pieces.report}
    notes = ("Models with different tokenizers are comparable per character only.",
             f"Perplexity, e to the nats per token: {', '.join(f'{name} {value:,.4g}' for name, value in per_token.items())}.",
             *(() if pieces.dialogues else (perplexity.BEGINNING,)), *(f"{note}." for note in perplexity.unread_notes(records)))
    said = data if isinstance(data, str) else data.report
    return Evaluation("perplexity", {"models": written(models), "data": said, "limit": limit},
                      from_scores(scores, baseline, digits=4, notes=notes), scores, tuple(records), details)


def by_judge(models: Models, questions: Sequence[JudgeQuestion], endpoint: Endpoint, out: str | os.PathLike, *,
             pairwise: bool = False, baseline: str | None = None, max_new_tokens: int = judge.MAX_NEW_TOKENS) -> Work[Evaluation]:
    """Grades by a judge, or pairs in both orders; writes the new folder `out`.

    Answers and verdicts are kept beside `out` while it runs: the same call again goes on where a killed one stopped.
    """
    refuse_existing(out)
    pairs = judge.pairs_of(tuple(models), baseline) if pairwise else []
    plan = judge.plan(fingerprints(models), questions, endpoint, pairs, max_new_tokens)
    with Ledger(out, plan) as ledger:
        scores = yield from judge.judge(models, questions, endpoint, ledger, pairs=pairs, max_new_tokens=max_new_tokens)
        details = {"position_bias": judge.position_bias(questions, pairs, ledger)} if pairs else {}
        notes = ("A judge grades the same answers differently from one time to the next, by up to 0.2 on average; that is not in "
                 "the brackets.",) if not pairs else ("Where the order of the two answers decided, it is a tie.",)
        notes += tuple(filter(None, [judge.missing(ledger, endpoint.max_tokens)]))
        records = tuple({name: value for name, value in record.items() if name != "key"} for record in ledger.records.values())
        table = from_scores(scores, None if pairs else baseline, digits=1 if pairs else 2, notes=notes)
        settings = {**plan, "models": written(models), "fingerprints": plan["models"], "sampling": "greedy"}
        done = Evaluation("pairs" if pairs else "grades", settings, table, scores, records, details)
        write(done, out)
        ledger.remove()
    return done


def by_lm_eval(models: Models, names: Sequence[str], *, baseline: str | None = None,
               limit: int | None = None) -> Work[Evaluation]:
    """lm-eval's tasks, when that package is installed."""
    table, found = yield from harness.measure(models, names, limit, baseline)
    settings = {"models": written(models), "tasks": list(names), "limit": limit}
    return Evaluation("lm-eval", settings, table, details={"results": found})

"""What a person asks for → an evaluation to run: every key is looked up and every number checked, all come from outside."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from components.evaluating.command import command_line
from components.state import MergeRef, Selection
from components.studio import Studio
from fusion import FusionError, RecipeError, evaluate
from fusion.demo.domains import DOMAINS
from fusion.demo.questions import questions as held_out
from fusion.errors import Stopped
from fusion.evaluate import harness, perplexity
from fusion.evaluate.judge import MAX_NEW_TOKENS
from fusion.progress import Work

MAX_MODELS = 8
MAX_TEXT = 200_000  # characters that may be pasted
MODES = [("Grade every answer", "grades"), ("Compare in pairs, both orders", "pairs")]
_PUBLIC_PROMPTS, _PROMPTS = 50, 200
_MOST_TOKENS, _MOST_VERDICT_TOKENS = 4096, 131_072
_PASTED = "references.jsonl"
NONE = ""  # compared with nobody
_HERE = "Run the app on your own machine."


@dataclass(frozen=True)
class Form:
    """The values of the tab's controls as they come in, in their order."""

    models: object
    reference: object
    kind: object
    domains: object
    prompts: object
    longest: object
    text: object
    source: object
    pieces: object
    questions: object
    endpoint: object
    judge: object
    mode: object
    name: object
    answer_tokens: object
    verdict_tokens: object
    references: object
    tasks: object
    limit: object


@dataclass(frozen=True)
class Finished:
    """An evaluation that has ended, and the command that does the same."""

    evaluation: evaluate.Evaluation
    command: str


@dataclass(frozen=True)
class Asked:
    """What can be run: a title, and the work that ends in what was found."""

    title: str
    work: Callable[[], Work[Finished]]


def kinds(studio: Studio) -> dict[str, str]:
    """The ways to evaluate that this page offers, by their titles; strangers cannot make the server call addresses or load data."""
    offered = {"domains": "Eight domains", "perplexity": "Perplexity"}
    if not studio.public:
        offered["judge"] = "A judge"
        if harness.installed():
            offered["lm-eval"] = "lm-eval"
    return offered


def most_prompts(studio: Studio) -> int:
    """How many prompts per domain may be asked for."""
    return _PUBLIC_PROMPTS if studio.public else _PROMPTS


def choices(studio: Studio, now: Selection) -> list[tuple[str, str]]:
    """Who can be evaluated: this visitor's merges, newest first, then the catalogue."""
    merges = [(f"{merge.title} · in memory", merge.key) for merge in reversed(now.merges)]
    return merges + [(entry.title, entry.key) for entry in studio.entries()]


def usual(now: Selection) -> tuple[str, ...]:
    """Who is evaluated unless somebody else is picked: the newest merge, the pivot and the targets."""
    keys = (*(merge.key for merge in now.merges[-1:]), now.pivot, *now.targets)
    return tuple(dict.fromkeys(key for key in keys if key))[:MAX_MODELS]


def references(studio: Studio, now: Selection, picked: tuple[str, ...]) -> list[tuple[str, str]]:
    """Who the others may be compared with: one of those that are picked, or nobody."""
    titles = {key: title for title, key in choices(studio, now)}
    return [*((titles[key], key) for key in picked if key in titles), ("nobody", NONE)]


def usual_reference(now: Selection, picked: tuple[str, ...]) -> str:
    """The pivot where it is picked, else the first."""
    return now.pivot if now.pivot in picked else next(iter(picked), NONE)


def asked(studio: Studio, form: Form, now: Selection) -> Asked:
    """What the form asks for; RecipeError for what this page does not offer, for unknown keys and numbers out of range."""
    offered = kinds(studio)
    if form.kind not in (*offered, "judge", "lm-eval"):
        raise RecipeError(f"unknown way to evaluate {str(form.kind)[:40]!r}", todo="Pick one of the list.")
    if form.kind not in offered:
        todo = _HERE if studio.public else "Run pip install lm-eval."
        raise RecipeError(f"{form.kind} is not offered on this page", where="Evaluate", todo=todo)
    keys = _keys(studio, form.models, now)
    names = {key: name for name, key in _names(studio, keys, now).items()}
    reference = form.reference or NONE
    if reference != NONE and reference not in keys:
        raise RecipeError("the model to compare with is not among the models", where="Compared with", todo="Pick one of them.")
    baseline = names[reference] if reference else None
    run, words, notes = _RUNS[form.kind](studio, form)
    command = command_line(studio, keys, now, reference, words, notes)
    recipes = {names[merge.key]: _recipe(studio, merge) for merge in now.merges if merge.key in keys}

    def work() -> Work[evaluate.Evaluation]:
        return (yield from run({names[key]: _lent(studio, key, now) for key in keys}, baseline))
    return Asked(offered[form.kind], lambda: _finished(studio, work(), command, recipes))


def _finished(studio: Studio, work: Work[evaluate.Evaluation], command: str, recipes: dict[str, str]) -> Work[Finished]:
    """The work with what a person needs beside it; an error names models by their titles, not by paths."""
    try:
        done = yield from work
    except Stopped:
        raise
    except FusionError as error:
        raise RecipeError(studio.by_title(str(error))) from error
    return Finished(replace(done, details={**done.details, "recipes": recipes}) if recipes else done, command)


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def _merged(now: Selection) -> dict[str, str]:
    return {merge.key: merge.title for merge in now.merges}


def _keys(studio: Studio, given: object, now: Selection) -> tuple[str, ...]:
    if not isinstance(given, (list, tuple)) or not given:
        raise RecipeError("no model is picked", where="Models", todo="Pick one or more.")
    if len(given) > MAX_MODELS:
        raise RecipeError(f"{len(given)} models are picked", where="Models", todo=f"Pick at most {MAX_MODELS}.")
    for key in given:
        if not isinstance(key, str) or key not in _merged(now):
            studio.entry(key)
    return tuple(dict.fromkeys(given))


def _names(studio: Studio, keys: tuple[str, ...], now: Selection) -> dict[str, str]:
    """Name in tables → key; a title that occurs twice is told apart."""
    names: dict[str, str] = {}
    for key in keys:
        title = _merged(now).get(key) or studio.title(key)
        names[next(free for n in range(1, MAX_MODELS + 1) if (free := title if n == 1 else f"{title} ({n})") not in names)] = key
    return names


def _recipe(studio: Studio, merge: MergeRef) -> str:
    try:
        return studio.merge_recipe(merge.key).to_yaml()
    except KeyError as error:
        raise RecipeError("is no longer known", where=merge.title, todo="Merge it again.") from error


def _lent(studio: Studio, key: str, now: Selection) -> evaluate.Lent:
    """The model of a key as the pool of loaded models lends it."""
    if key in _merged(now):
        mark = hashlib.sha256(key.encode()).hexdigest()
        return evaluate.Lent(f"{_merged(now)[key]}, in memory", partial(studio.chat_model, key, now), mark)
    checkpoint = studio.checkpoint(key)
    try:
        return evaluate.Lent(studio.folder_name(key), partial(studio.chat_model, key, now), checkpoint.fingerprint)
    finally:
        checkpoint.close()


# ── what is asked of them: each gives the work, the words of the command, and what to do before it ──────────────────────────────

def _domains(studio: Studio, form: Form):
    wanted = form.domains if isinstance(form.domains, (list, tuple)) else []
    if not wanted:
        raise RecipeError("no domain is chosen", where="Domains", todo="Choose one or more.")
    prompts = _whole(form.prompts, "Prompts per domain", 5, most_prompts(studio))
    longest = _whole(form.longest, "Longest answer", 1, _MOST_TOKENS)
    asked = evaluate.of_domains(held_out(prompts), list(map(str, wanted)))
    only = [] if len(set(wanted)) == len(DOMAINS) else ["--only", ",".join(domain for domain in DOMAINS if domain in wanted)]
    words = ["--domains", "--prompts", str(prompts), *only, *(["--max-new-tokens", str(longest)] if longest != 64 else [])]
    return lambda models, baseline: evaluate.by_questions(models, asked, baseline=baseline, max_new_tokens=longest), words, []


def _perplexity(studio: Studio, form: Form):
    text = _text(form.text, "Text")
    if text.strip():
        data, limit, source, notes = perplexity.from_text(text), None, "text.txt", ["with the text above saved as text.txt"]
    elif studio.public:
        raise RecipeError("no text is pasted", where="Text", todo="Paste what the models shall read.")
    else:
        source = data = _text(form.source, "File or data set").strip()
        limit, notes = _whole(form.pieces, "Pieces at most", 1, 1_000_000), []
        if not source:
            raise RecipeError("there is nothing to read", where="Text", todo="Paste a text, or name a file or a data set.")
    words = ["--perplexity", source, *(["--prompts", str(limit)] if limit else [])]
    return lambda models, baseline: evaluate.by_perplexity(models, data, baseline=baseline, limit=limit), words, notes


def _judge(studio: Studio, form: Form):
    text = _text(form.questions, "Prompts")
    questions = evaluate.questions_from_text(text, "Prompts")
    longest = _whole(form.answer_tokens, "Longest answer", 1, _MOST_TOKENS)
    endpoint = evaluate.Endpoint(_text(form.endpoint, "Endpoint").strip(), _text(form.judge, "Judge").strip(),
                                 max_tokens=_whole(form.verdict_tokens, "Longest verdict", 1, _MOST_VERDICT_TOKENS))
    if form.mode not in dict(MODES).values():
        raise RecipeError(f"unknown kind of verdicts {str(form.mode)[:40]!r}", where="Verdicts", todo="Pick one of the list.")
    out, pairwise = studio.output_folder(form.name), form.mode == "pairs"
    file = "question.jsonl" if text.lstrip().startswith("{") else "prompts.txt"
    questions, said = _references(questions, form, endpoint)
    words = ["--judge", file, "--endpoint", endpoint.base_url, "--judge-model", endpoint.model, *["--pairwise"] * pairwise,
             *(["--references", said] if said else []),
             *(["--max-new-tokens", str(longest)] if longest != MAX_NEW_TOKENS else []),
             *(["--judge-max-tokens", str(endpoint.max_tokens)] if endpoint.max_tokens != evaluate.Endpoint.max_tokens else [])]
    notes = [f"with the prompts above saved as {file}{f', the references as {said}' * (said == _PASTED)} "
             "and the key in OPENAI_API_KEY"]
    return (lambda models, baseline: evaluate.by_judge(models, questions, endpoint, out, pairwise=pairwise, baseline=baseline,
                                                       max_new_tokens=longest), words, notes)


def _references(questions: list, form: Form, endpoint: evaluate.Endpoint) -> tuple[list, str]:
    """The questions with the references that were pasted, or that lie where the person says; and the file's name in a command."""
    text = _text(form.references, "References").strip()
    if not text:
        return questions, ""
    if text.startswith("{"):
        return evaluate.with_pasted_references(questions, text, "References"), _PASTED
    return evaluate.with_references(questions, text, endpoint.model), text


def _lm_eval(studio: Studio, form: Form):
    tasks = [name.strip() for name in _text(form.tasks, "Tasks").split(",") if name.strip()]
    if not tasks:
        raise RecipeError("no task is named", where="Tasks", todo="Name some, such as arc_easy.")
    limit = _whole(form.limit, "Questions per task", 1, 1_000_000)
    words = ["--lm-eval", ",".join(tasks), "--prompts", str(limit)]
    return lambda models, baseline: evaluate.by_lm_eval(models, tasks, baseline=baseline, limit=limit), words, []


_RUNS = {"domains": _domains, "perplexity": _perplexity, "judge": _judge, "lm-eval": _lm_eval}


def _whole(value: object, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or not low <= value <= high \
            or value != int(value):
        raise RecipeError(f"{str(value)[:20]} is out of range", where=name, todo=f"Give a whole number from {low} to {high:,}.")
    return int(value)


def _text(value: object, name: str) -> str:
    text = value if isinstance(value, str) else ""
    if len(text) > MAX_TEXT:
        raise RecipeError("is too long", where=name, todo=f"Give at most {MAX_TEXT:,} characters, or use the command line.")
    return text

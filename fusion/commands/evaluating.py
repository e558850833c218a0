"""evaluate: right answers, perplexity, a judge's opinion or public benchmarks of any number of models."""

from __future__ import annotations

import argparse

from fusion.commands.console import print_json, show_progress
from fusion.errors import RecipeError
from fusion.progress import finish


def add(command) -> None:
    """Add these commands with `command(name, run, text)`, which returns the parser."""
    sub = command("evaluate", _evaluate, "Measure models on the same prompts; every table has intervals and paired tests.")
    sub.add_argument("models", metavar="MODEL", nargs="+", help="a folder, FOLDER+ADAPTER, or a model on the Hub")
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--domains", action="store_true", help="the demo's held-out prompts over eight domains (the default)")
    sub.add_argument("--prompts", type=int, metavar="N", help="so many prompts per domain (default 100)")
    sub.add_argument("--baseline", metavar="NAME", help="compare the others with this one of the models")
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help="cut answers off after so many tokens (default 64)")
    sub.add_argument("--out", metavar="DIR", help="write tables, answers and a radar chart into this new folder")


def _evaluate(options: argparse.Namespace) -> None:
    from fusion import evaluate

    if options.out:
        evaluate.refuse_existing(options.out)
    for name in ("prompts", "max_new_tokens"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise RecipeError(f"--{name.replace('_', '-')} is {given}", todo="Give a whole number from 1 on.")
    models = evaluate.named(options.models)
    baseline = evaluate.chosen(options.baseline, models)
    done = _domains(options, models, baseline)
    folder = evaluate.write(done, options.out) if options.out else None
    if options.json:
        print_json(done.to_dict())
        return
    print(done.table.text())
    if folder:
        print(f"\nwritten to {folder}")


def _domains(options: argparse.Namespace, models: dict[str, str], baseline: str | None):
    from fusion import evaluate
    from fusion.demo.questions import questions

    prompts, longest = options.prompts or 100, options.max_new_tokens or 64
    scores, records = finish(evaluate.measure(models, questions(prompts), longest), show_progress(options.json))
    settings = {"models": models, "prompts_per_domain": prompts, "max_new_tokens": longest, "sampling": "greedy"}
    return evaluate.Evaluation("domains", settings, evaluate.from_scores(scores, baseline), scores, tuple(records))

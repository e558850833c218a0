"""evaluate: right answers, perplexity, a judge's opinion or public benchmarks of any number of models."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fusion.commands.console import print_json, show_progress
from fusion.errors import RecipeError
from fusion.progress import finish

if TYPE_CHECKING:
    from fusion.evaluate import Evaluation
    from fusion.progress import Work

def add(command) -> None:
    """Add these commands with `command(name, run, text)`, which returns the parser."""
    sub = command("evaluate", _evaluate, "Measure models on the same prompts; every table has intervals and paired tests.")
    sub.add_argument("models", metavar="MODEL", nargs="+", help="a folder, FOLDER+ADAPTER, or a model on the Hub")
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--domains", action="store_true", help="the demo's held-out prompts over eight domains (the default)")
    sub.add_argument("--only", metavar="DOMAINS", help="of the eight domains only these, separated by commas")
    what.add_argument("--perplexity", metavar="DATA", help="dialogues (JSON, JSONL, Parquet, Hub dataset) or plain text (.txt)")
    sub.add_argument("--split", metavar="NAME", default="train", help="the split of the data that --perplexity reads (train)")
    sub.add_argument("--subset", metavar="NAME", default="", help="the subset of the data that --perplexity reads")
    what.add_argument("--judge", metavar="QUESTIONS", help="questions in MT-Bench's question.jsonl format, graded by a judge")
    what.add_argument("--lm-eval", metavar="TASKS", help="tasks of lm-eval, separated by commas, when it is installed")
    sub.add_argument("--endpoint", metavar="URL", help="the judge's OpenAI-compatible address; its key is in OPENAI_API_KEY")
    sub.add_argument("--judge-model", metavar="M", help="the judge's name at that address")
    sub.add_argument("--judge-max-tokens", type=int, metavar="N", help="the judge's longest reply (2048 tokens)")
    sub.add_argument("--references", metavar="DIR", help="reference answers: MT-Bench's reference_answer, or a file of it")
    sub.add_argument("--pairwise", action="store_true", help="judge pairs in both orders (with the baseline, else all) not grades")
    sub.add_argument("--prompts", type=int, metavar="N",
                     help="so many prompts per domain (default 100), pieces of data, questions, questions per task (default all)")
    sub.add_argument("--baseline", metavar="NAME", help="compare the others with this one of the models")
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help="cut answers off after so many tokens (64; for a judge 1024)")
    sub.add_argument("--out", metavar="DIR", help="write tables, answers and a radar chart into this new folder (a judge needs it)")


def _evaluate(options: argparse.Namespace) -> None:
    from fusion import evaluate

    _check(options)
    if options.out:
        evaluate.refuse_existing(options.out)
    models = evaluate.named(options.models)
    baseline = evaluate.chosen(options.baseline, models)
    done = finish(_work(options, models, baseline), show_progress(options.json))
    if options.out and not options.judge:  # a judge's results are written with what was kept meanwhile
        evaluate.write(done, options.out)
    if options.json:
        print_json(done.to_dict())
        return
    print(done.table.text())
    if options.out:
        print(f"\nwritten to {options.out}")


def _check(options: argparse.Namespace) -> None:
    for name in ("prompts", "max_new_tokens", "judge_max_tokens"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise RecipeError(f"--{name.replace('_', '-')} is {given}", todo="Give a whole number from 1 on.")
    if options.judge and not (options.endpoint and options.judge_model and options.out):
        raise RecipeError("a judge needs --endpoint, --judge-model and --out", where="--judge")
    if options.only is not None and (options.perplexity or options.lm_eval or options.judge):
        raise RecipeError("--only chooses among the eight domains", todo="Leave it out.")
    theirs = ("endpoint", "judge_model", "pairwise", "judge_max_tokens", "references")
    if not options.judge and (odd := [f"--{name.replace('_', '-')}" for name in theirs if getattr(options, name)]):
        raise RecipeError(f"only a judge has {' and '.join(odd)}", todo="Add --judge QUESTIONS.")


def _work(options: argparse.Namespace, models: dict[str, str], baseline: str | None) -> Work[Evaluation]:
    from fusion import evaluate

    longest = {"max_new_tokens": options.max_new_tokens} if options.max_new_tokens else {}
    if options.perplexity:
        return evaluate.by_perplexity(models, options.perplexity, baseline=baseline, limit=options.prompts, split=options.split,
                                      subset=options.subset)
    if options.lm_eval:
        names = [name.strip() for name in options.lm_eval.split(",") if name.strip()]
        return evaluate.by_lm_eval(models, names, baseline=baseline, limit=options.prompts)
    if options.judge:
        asked = evaluate.load_questions(options.judge, options.prompts)
        if options.references:
            asked = evaluate.with_references(asked, options.references, options.judge_model)
        words = {"max_tokens": options.judge_max_tokens} if options.judge_max_tokens else {}
        judge = evaluate.Endpoint(options.endpoint, options.judge_model, **words)
        return evaluate.by_judge(models, asked, judge, options.out, pairwise=options.pairwise, baseline=baseline, **longest)
    from fusion.demo.questions import questions

    asked = questions(options.prompts or 100)
    if options.only is not None:
        asked = evaluate.of_domains(asked, [name.strip() for name in options.only.split(",") if name.strip()])
    return evaluate.by_questions(models, asked, baseline=baseline, **longest)

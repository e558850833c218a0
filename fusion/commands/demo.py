"""demo: train or check the embedded demo family."""

from __future__ import annotations

import argparse

from fusion.commands.console import print_json, show_progress
from fusion.errors import RecipeError
from fusion.progress import finish


def add(command) -> None:
    """Add these commands with `command(name, run, text)`, which returns the parser."""
    _actions(command("demo", _demo_help, "Train or check the embedded demo family."))


def _actions(demo: argparse.ArgumentParser) -> None:
    actions = demo.add_subparsers(required=True, metavar="train | check")
    train = actions.add_parser("train", help="make the family from generated dialogues (about an hour on two cores)")
    train.set_defaults(run=_demo_train)
    train.add_argument("--out", metavar="DIR", required=True, help="the folder to fill; its models must not exist yet")
    train.add_argument("--only", metavar="MODEL", action="append", default=[], help="train only this model; repeatable")
    train.add_argument("--seed", type=int, default=0)
    check = actions.add_parser("check", help="measure every model's accuracy per domain on held-out prompts")
    check.set_defaults(run=_demo_check)
    check.add_argument("--folder", metavar="DIR", help="the family's folder (default: the shipped one)")
    check.add_argument("--prompts", type=int, default=200, metavar="N", help="held-out prompts per domain (default 200)")
    check.add_argument("--json", action="store_true", help="print one JSON document: model → domain → accuracy in percent")


def _demo_help(options: argparse.Namespace) -> None:
    raise RecipeError("say what to do", where="demo", todo="Write demo train or demo check.")


def _demo_train(options: argparse.Namespace) -> None:
    from fusion import demo

    finish(demo.train(options.out, only=options.only, seed=options.seed), show_progress(False))
    print(f"trained into {options.out}")


def _demo_check(options: argparse.Namespace) -> None:
    from fusion import demo

    results = finish(demo.check(options.folder or demo.FOLDER, prompts_per_domain=options.prompts), show_progress(options.json))
    if options.json:
        print_json(results)
        return
    print(demo.table(results))
    missed = demo.bars(results)
    print("\n".join(f"missed: {bar}" for bar in missed) or "every bar is met")

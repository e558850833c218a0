"""demo: train, check or compare the embedded demo family, and write dialogues like its own."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusion.commands.console import print_json, show_progress
from fusion.errors import RecipeError
from fusion.progress import finish


def add(command) -> None:
    """Add these commands with `command(name, run, text)`, which returns the parser."""
    _actions(command("demo", _demo_help, "Train, check or compare the embedded demo family."))


def _actions(demo: argparse.ArgumentParser) -> None:
    actions = demo.add_subparsers(required=True, metavar="train | dialogues | check | table")
    train = actions.add_parser("train", help="make the family from generated dialogues (about an hour on two cores)")
    train.set_defaults(run=_demo_train)
    train.add_argument("--out", metavar="DIR", required=True, help="the folder to fill; its models must not exist yet")
    train.add_argument("--only", metavar="MODEL", action="append", default=[], help="train only this model; repeatable")
    train.add_argument("--seed", type=int, default=0)
    talk = actions.add_parser("dialogues", help="write training dialogues of all domains, for a fusion run of your own")
    talk.set_defaults(run=_demo_dialogues)
    talk.add_argument("--out", metavar="FILE.jsonl", required=True, help="a new file")
    talk.add_argument("--count", type=int, default=2000, metavar="N", help="how many (default 2000)")
    talk.add_argument("--seed", type=int, default=0)
    check = actions.add_parser("check", help="measure every model's accuracy per domain on held-out prompts")
    check.set_defaults(run=_demo_check)
    check.add_argument("--folder", metavar="DIR", help="the family's folder (default: the shipped one)")
    check.add_argument("--prompts", type=int, default=200, metavar="N", help="held-out prompts per domain (default 200)")
    check.add_argument("--json", action="store_true", help="print one JSON document: model → domain → accuracy in percent")
    compare = actions.add_parser("table", help="the paper's tables 1 and 2: fuse with several seeds, merge in every way, measure")
    compare.set_defaults(run=_demo_table)
    compare.add_argument("--folder", metavar="DIR", help="the family's folder (default: the shipped one)")
    compare.add_argument("--work", metavar="DIR", default="outputs/demo-table",
                         help="where the fused models go; give it again to go on (default: outputs/demo-table)")
    compare.add_argument("--seeds", type=int, default=3, metavar="N")
    compare.add_argument("--prompts", type=int, default=100, metavar="N", help="held-out prompts per domain (default 100)")
    compare.add_argument("--json", action="store_true", help="print one JSON document")


def _demo_help(options: argparse.Namespace) -> None:
    raise RecipeError("say what to do", where="demo", todo="Write demo train, demo dialogues, demo check or demo table.")


def _demo_train(options: argparse.Namespace) -> None:
    from fusion import demo

    finish(demo.train(options.out, only=options.only, seed=options.seed), show_progress(False))
    print(f"trained into {options.out}")


def _demo_dialogues(options: argparse.Namespace) -> None:
    from fusion import demo

    demo.write_dialogues(Path(options.out), options.count, options.seed)
    print(f"wrote {options.count} dialogues to {options.out}")


def _demo_check(options: argparse.Namespace) -> None:
    from fusion import demo

    results = finish(demo.check(options.folder or demo.FOLDER, prompts_per_domain=options.prompts), show_progress(options.json))
    if options.json:
        print_json(results)
        return
    print(demo.table(results))
    missed = demo.bars(results)
    print("\n".join(f"missed: {bar}" for bar in missed) or "every bar is met")


def _demo_table(options: argparse.Namespace) -> None:
    from fusion import demo

    done = finish(demo.compare(options.folder or demo.FOLDER, options.work, options.seeds, options.prompts),
                  show_progress(options.json))
    if options.json:
        print_json({"methods": done.methods.to_dict(), "granularities": done.granularities.to_dict(), "by_seed": done.by_seed,
                    "aims": done.aims})
        return
    print(done.methods.markdown(), done.granularities.markdown(), sep="\n")
    print("average of each seed: " + "; ".join(f"{name} {', '.join(f'{value:.1f}' for value in its)}"
                                               for name, its in done.by_seed.items()))
    print("\n".join(f"{'yes' if met else 'no '}  {aim}" for aim, met in done.aims.items()))

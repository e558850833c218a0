"""The command line: every command calls the same function as the page's button.

Exit status 0 only when it was done, 2 for a FusionError (its text on stderr), 130 when it was interrupted, 143 when terminated.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
from collections.abc import Callable

from fusion.commands import GROUPS
from fusion.errors import FusionError

_asked_to_end: list[int] = []  # by these signals


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a console without Greek letters still gets its answer
    options = _parser().parse_args(argv)
    try:
        options.run(options)
        sys.stdout.flush()
        return 0
    except FusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        print("error: memory ran out; nothing was left behind. Close other programs.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "finished shards are kept for --resume" if getattr(options, "resume", False) else "nothing was left behind"
        kept = "answers and verdicts are kept: the same command goes on" if getattr(options, "judge", None) else kept
        print(f"\nstopped; {kept}", file=sys.stderr)
        return 128 + (_asked_to_end or [signal.SIGINT])[0]
    except BrokenPipeError:  # the reader of a pipe had enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _terminate(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough: cleaning up is not to be interrupted
    _asked_to_end.append(number)
    raise KeyboardInterrupt  # the one that every library lets through


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fusion", description="See how far chat models moved, and merge them by it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    for group in GROUPS:
        group.add(command)
    for sub in commands.choices.values():
        sub.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    status = main()
    gc.freeze()  # else the interpreter looks through all objects once more before it ends
    sys.exit(status)

"""How long merging takes and how much memory, beside mergekit, the authors' scripts and the limits of the machine.

    python -m tests.benchmarks.merge --work DIR                                       # 1.1 B parameters, pivot + 3 targets
    python -m tests.benchmarks.merge --work DIR --baselines mergekit,authors          # with what is installed beside it
    python -m tests.benchmarks.merge --work DIR --size 7b --cold

Makes its checkpoints in DIR, alternates the runs, checks samples of every result against float64 and prints a Markdown table
of the figures and of the bars: which are met. All commands run as a person runs them, start of Python included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fusion import tables
from fusion.checkpoint import Checkpoint
from tests.benchmarks import baselines
from tests.benchmarks.checking import check
from tests.benchmarks.checkpoints import SIZES, make_set
from tests.benchmarks.measuring import Run, drop_cache, floor, median, read_in_order, run

ROOT = Path(__file__).parents[2]
METHODS = ("varm", "linear", "sce", "ties", "dare_ties")
UNFLUSHED = " --no-flush"  # as the other tools write: what they say is done may not be on the disk yet
FASTER = {"sce": 25, "linear": 12, "ties": 15, "dare_ties": 15}  # times mergekit
FUSION = (sys.executable, "-m", "fusion")
ENGINE = """
import sys, time
from fusion import Recipe, finish, merge
flush, pivot, out, *targets = sys.argv[1:]
started = time.perf_counter()
finish(merge(Recipe(pivot, tuple(targets)), out, flush=bool(int(flush))))
print(time.perf_counter() - started)
"""


@dataclass
class Bench:
    """The work folder, the checkpoints (pivot first) and all runs so far, by what was run."""

    work: Path
    folders: list[Path]
    runs: dict[str, list[Run]] = field(default_factory=lambda: defaultdict(list))
    engine: list[float] = field(default_factory=list)
    floors: list[tuple[float, float]] = field(default_factory=list)

    @property
    def written(self) -> int:
        """Bytes of the result."""
        return Checkpoint(self.folders[0]).nbytes

    def out(self, name: str) -> Path:
        """An output folder that does not exist."""
        shutil.rmtree(self.work / name, ignore_errors=True)
        return self.work / name

    def ours(self, method: str, *words: str) -> Path:
        """Measure the merge command once, with these words besides; returns the result's folder."""
        out = self.out(f"out-{method}")
        options = [f"--option={name}={value}" for name, value in baselines.OPTIONS[method].items()]
        weights = ["--weights=" + ",".join("1" * (len(self.folders) - 1))] if method in ("ties", "dare_ties") else []
        command = [*FUSION, "merge", *map(str, self.folders), "--out", str(out), "--method", method, *options, *weights, *words]
        self.runs[" ".join([method, *words])].append(run(command))
        return out

    def merge_part(self) -> None:
        """Measure VARM without the start of the command, and the floor right after it."""
        self.engine.append(self.timed_engine())
        self.floors.append(floor(self.folders, self.out("floor"), self.written))

    def timed_engine(self, flush: bool = True) -> float:
        """Seconds of one VARM merge without the start of the command."""
        out = self.out("out-engine")
        seconds = run([sys.executable, "-c", ENGINE, str(int(flush)), str(self.folders[0]), str(out),
                       *map(str, self.folders[1:])]).output
        shutil.rmtree(out)
        return float(seconds)

    def report(self) -> None:
        """Measure the variation report once."""
        self.runs["variation"].append(run([*FUSION, "variation", *map(str, self.folders)]))

    def baseline(self, name: str, commands: Iterator[list[str]]) -> None:
        """Measure what another tool needs for one merge, all its commands together."""
        parts = [run(command) for command in commands]
        print(f"{name}: {sum(part.seconds for part in parts):.1f} s", file=sys.stderr, flush=True)
        self.runs[name].append(Run(sum(part.seconds for part in parts), sum(part.processor for part in parts),
                                   max(part.anonymous for part in parts), ""))


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclass
class Bar:
    """What was asked for, what was measured, whether that is enough."""

    what: str
    asked: str
    measured: str
    met: bool


def at_least(what: str, asked: float, measured: float) -> Bar:
    """A bar for a ratio that must not be smaller."""
    return Bar(what, f"≥ {asked:g} ×", f"{measured:.1f} ×", measured >= asked)


def at_most(what: str, asked: float, measured: float, unit: str) -> Bar:
    """A bar for a figure that must not be larger."""
    return Bar(what, f"≤ {asked:g} {unit}", f"{measured:.2f} {unit}", measured <= asked)


def bars(bench: Bench, size: str) -> Iterator[Bar]:
    """All bars that this run has figures for."""
    for method, asked in FASTER.items():
        for ours in (method, method + UNFLUSHED):
            if other := bench.runs.get(f"mergekit {method}"):
                yield at_least(f"{ours} against mergekit's {method}", asked, median(other) / median(bench.runs[ours]))
    for ours in ("varm", "varm" + UNFLUSHED):
        if other := bench.runs.get("authors"):
            yield at_least(f"{ours} against the authors' way", 35, median(other) / median(bench.runs[ours]))
    if bench.engine:
        ratio = statistics.median(ours / sum(bound) for ours, bound in zip(bench.engine, bench.floors, strict=True))
        yield at_most("the merge part of varm against the floor", 2, ratio, "×")
    if bench.runs["variation"] and bench.runs["varm"]:
        yield at_least("the variation report against the merge", 1.5, median(bench.runs["varm"]) / median(bench.runs["variation"]))
    peak = max((one.anonymous for method in METHODS for one in bench.runs[method]), default=0)
    if peak and size in ("1.1b", "7b"):
        yield at_most("peak anonymous memory", 0.6 if size == "1.1b" else 1.2, peak / 1e9, "GB")


def cold(bench: Bench, runs: int) -> Iterator[Bar]:
    """The merge with nothing in the page cache, flushed and not, beside reading the files in order, alternately."""
    kinds: dict[str, Callable[[], float]] = {"reading": lambda: read_in_order(bench.folders), "merging": bench.timed_engine,
                                             f"merging{UNFLUSHED}": partial(bench.timed_engine, flush=False)}
    seconds, kept = {kind: [] for kind in kinds}, 0.0
    for _ in range(runs):
        for kind, measure in kinds.items():
            kept = max(kept, drop_cache(bench.folders))
            seconds[kind].append(measure())
            os.sync()
    note = f" ({kept:.0%} of the files stayed in the cache: not cold)" if kept > 0.01 else ""
    found = {kind: statistics.median(its) for kind, its in seconds.items()}
    print("cold: " + ", ".join(f"{kind} {its:.2f} s" for kind, its in found.items()) + note)
    for kind in list(kinds)[1:]:
        yield at_most(f"cold {kind} against reading in order{note}", 1.2, found[kind] / found["reading"], "×")


def quick_commands(bench: Bench, runs: int) -> Iterator[Bar]:
    """The commands that need headers only."""
    for words in (["--help"], ["methods"], ["preflight", *map(str, bench.folders)]):
        seconds = statistics.median(run([*FUSION, *words]).seconds for _ in range(runs))
        yield at_most(f"`{words[0]}`", 0.7, seconds, "s")
        heavy = json.loads(run([sys.executable, "-c", IMPORTED, *words]).output)
        yield Bar(f"`{words[0]}` imports no torch, transformers, numba", "none", ", ".join(heavy) or "none", not heavy)


IMPORTED = """
import contextlib, io, json, sys
from fusion.__main__ import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(sys.argv[1:])
print(json.dumps([name for name in sys.modules if name in ("torch", "transformers", "numba")]))
"""


def machine() -> str:
    """One line on where this was measured."""
    name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{os.cpu_count()} × {name}, {tables.bytes_text(memory)} memory, Python {platform.python_version()}"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its tables; 0 when every bar that was measured is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and results")
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--linked", action="store_true", help="targets share the pivot's files: less disk, no variation")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--baselines", default="", help="mergekit, authors")
    parser.add_argument("--baseline-runs", type=int, default=1)
    parser.add_argument("--mergekit", default="mergekit-yaml", help="the program")
    parser.add_argument("--cold", action="store_true", help="also with an empty page cache")
    options = parser.parse_args(argv)
    os.chdir(ROOT)
    bench = Bench(options.work / options.size, make_set(options.work.absolute(), options.size, linked=options.linked))
    bench.work = bench.work.absolute()
    methods, others = options.methods.split(","), list(filter(None, options.baselines.split(",")))
    checked = {}
    read_in_order(bench.folders)  # into the page cache
    for number in range(options.runs):
        print(f"round {number + 1} of {options.runs}", file=sys.stderr, flush=True)
        for method in methods:
            out = bench.ours(method)
            if not number and not options.linked:
                checked[method] = check(bench.folders, method, out)
            shutil.rmtree(out)
            shutil.rmtree(bench.ours(method, UNFLUSHED.strip()))
            os.sync()  # what is left of it is not the next one's to wait for
        bench.merge_part()
        bench.report()
        for name in others if number < options.baseline_runs else ():
            if name == "authors":
                bench.baseline("authors", baselines.authors(bench.folders, bench.out("out-other")))
            for method in filter(FASTER.get, methods) if name == "mergekit" else ():
                out = bench.out("out-other")
                bench.baseline(f"mergekit {method}", baselines.mergekit(options.mergekit, method, bench.folders, out))
    found = [*bars(bench, options.size), *quick_commands(bench, options.runs)]
    if options.cold:
        found += cold(bench, options.runs)
    bench.out("out-other")
    print_tables(bench, options.size, checked, found)
    return 0 if all(bar.met for bar in found) else 1


def print_tables(bench: Bench, size: str, checked: dict[str, str], found: list[Bar]) -> None:
    """Print what was measured and which bars are met, as Markdown."""
    total = sum(Checkpoint(folder).nbytes for folder in bench.folders)
    read, written = tables.bytes_text(total), tables.bytes_text(bench.written)
    print(f"\n{size}: pivot + {len(bench.folders) - 1} targets, {read} read, {written} written; {machine()}\n")
    print("| command | runs | median s | fastest s | processor s | peak anonymous | checked |\n|---|---|---|---|---|---|---|")
    for name, runs in bench.runs.items():
        if runs:
            print(f"| {name}{' (reimplementation)' if name == 'authors' else ''} | {len(runs)} | {median(runs):.2f} | "
                  f"{min(one.seconds for one in runs):.2f} | {statistics.median(one.processor for one in runs):.2f} | "
                  f"{tables.bytes_text(max(one.anonymous for one in runs))} | {checked.get(name, '')} |")
    reads, writes = zip(*bench.floors, strict=True)
    both = f"read {statistics.median(reads):.2f} s + write and flush {statistics.median(writes):.2f} s"
    for name, seconds in (("the merge part of varm", bench.engine), (f"floor: {both}", [*map(sum, bench.floors)])):
        print(f"| {name} | {len(seconds)} | {statistics.median(seconds):.2f} | {min(seconds):.2f} | | | |")
    print("\n| bar | asked | measured | met |\n|---|---|---|---|")
    for bar in found:
        print(f"| {bar.what} | {bar.asked} | {bar.measured} | {'yes' if bar.met else 'no'} |")


if __name__ == "__main__":
    sys.exit(main())

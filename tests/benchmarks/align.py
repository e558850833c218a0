"""How fast tokens are aligned, beside a plain dynamic programme; what that makes for all of FuseChat-Mixture.

    python -m tests.benchmarks.align
    python -m tests.benchmarks.align --tokens 512 --dialogues 200 --runs 9

Alternates the runs, asserts that both find the same path, and prints a Markdown table of medians and of the bars. Texts are
made: words by Zipf's law, cut into pieces by two different rules as two vocabularies would. Seconds are processor time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from random import Random

import numpy as np

from fusion.align import Alignment, by_offsets, warp
from fusion.align.sequence import TIES
from tests.benchmarks.measuring import Failed

MIXTURE = 95_000  # dialogues of FuseChat-Mixture, none longer than
LONGEST = 2_048  # tokens
FASTER, CPU_HOURS = 50, 2
SYLLABLES = ("a", "an", "ber", "con", "den", "e", "er", "fu", "gen", "in", "ing", "is", "ka", "lo", "mo", "na", "or", "per", "que",
             "re", "sel", "ti", "tion", "ur", "ve", "wal", "x", "y", "zo")


def plain_path(pivot: Sequence[str], source: Sequence[str], discount: bool = True, ties: str = "source") -> list[list[int]]:
    """The source positions of every pivot position, as the papers' formulas are written: a whole table, cell by cell."""
    from rapidfuzz.distance import Levenshtein

    def cost(a: str, b: str) -> int:
        a, b = a[1:] if a[:1] == " " and len(a) > 1 else a, b[1:] if b[:1] == " " and len(b) > 1 else b
        return Levenshtein.distance(a, b) * (1 if discount and a and b and (a in b or b in a) else 10)

    far = 1 << 60
    table = [[0] + [far] * len(pivot)] + [[far] * (len(pivot) + 1) for _ in source]
    for i, theirs in enumerate(source):
        for j, mine in enumerate(pivot):
            table[i + 1][j + 1] = cost(theirs, mine) + min(table[i][j + 1], table[i + 1][j], table[i][j])
    lists: list[list[int]] = [[] for _ in pivot]
    i, j = len(source), len(pivot)
    while i and j:
        lists[j - 1].insert(0, i - 1)
        diagonal, up, left = table[i - 1][j - 1], table[i - 1][j], table[i][j - 1]
        if diagonal <= up and diagonal <= left:
            i, j = i - 1, j - 1
        elif up < left or (up == left and ties == "source"):
            i -= 1
        else:
            j -= 1
    return lists


def words(count: int, rng: Random) -> list[str]:
    """A text as words with their leading space; the n-th most frequent of 8,000 comes 1/n as often as the first."""
    known = Random(1)
    vocabulary = ["".join(known.choices(SYLLABLES, k=1 + i // 40 % 4 if i > 40 else 1)) for i in range(8000)]
    return [f" {word}" for word in rng.choices(vocabulary, [1 / (n + 3) for n in range(8000)], k=count)]


def cut(text: Sequence[str], rule: int) -> list[str]:
    """Tokens of a text: longer words are cut in two, always at the same place for one rule."""
    tokens = []
    for word in text:
        chance = Random(f"{rule} {word}")
        at = chance.randrange(2, len(word)) if len(word) > 4 and chance.random() < 0.35 else len(word)
        tokens += [word[:at], word[at:]] if at < len(word) else [word]
    return tokens


def pair(tokens: int, rng: Random) -> tuple[list[str], list[str]]:
    """One text in two tokenisations, of exactly so many tokens each."""
    text = words(tokens, rng)
    return cut(text, 1)[:tokens], cut(text, 2)[:tokens]


def sample(count: int, rng: Random) -> list[list[tuple[list[str], list[str]]]]:
    """Dialogues as pairs of tokenised replies: 1 to 6 replies, about 550 tokens by a log-normal law, at most 2,048."""
    dialogues = []
    for _ in range(count):
        total, turns = min(int(rng.lognormvariate(6.0, 0.8)) + 8, LONGEST), rng.choice((1, 1, 1, 2, 3, 6))
        made = [words(max(total // turns * 3 // 4, 1), rng) for _ in range(turns)]
        dialogues.append([(cut(text, 1), cut(text, 2)) for text in made])
    return dialogues


def ends(tokens: Sequence[str]) -> np.ndarray:
    """The end of every token in the text."""
    return np.cumsum([len(token) for token in tokens])


def offsets(mine: Sequence[str], theirs: Sequence[str]) -> Alignment:
    """Align by characters, the ends of tokens counted too."""
    return by_offsets(ends(mine), ends(theirs))


def timed(work: Callable[[], object]) -> float:
    """Seconds of processor time."""
    started = time.process_time()
    work()
    return time.process_time() - started


def compare(tokens: int, runs: int) -> tuple[float, float]:
    """Median seconds of the plain programme and of `warp` for one pair, in turns; Failed when their paths differ."""
    mine, theirs = pair(tokens, Random(7))
    for ties in TIES:
        if plain_path(mine, theirs, ties=ties) != warp(mine, theirs, ties=ties).lists():
            raise Failed(f"the paths differ (ties {ties})")
    taken = [(timed(lambda: plain_path(mine, theirs)), timed(lambda: warp(mine, theirs))) for _ in range(runs)]
    return tuple(statistics.median(column) for column in zip(*taken, strict=True))


def project(align: Callable, dialogues: Sequence, runs: int) -> tuple[float, float]:
    """Tokens a second, and CPU-hours for all of FuseChat-Mixture, from a sample of dialogues; medians over the runs."""
    seconds = statistics.median(timed(lambda: [align(*reply) for dialogue in dialogues for reply in dialogue]) for _ in range(runs))
    tokens = sum(len(reply[0]) for dialogue in dialogues for reply in dialogue)
    return tokens / seconds, seconds / len(dialogues) * MIXTURE / 3600


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="length of the pair that is compared")
    parser.add_argument("--dialogues", type=int, default=100, help="dialogues of the sample")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args(arguments)
    slow, fast = compare(options.tokens, options.runs)
    dialogues = sample(options.dialogues, Random(3))
    lengths = [sum(len(reply[0]) for reply in dialogue) for dialogue in dialogues]
    print(f"{options.dialogues} dialogues of {statistics.mean(lengths):.0f} tokens on average, the longest {max(lengths)}; "
          f"medians of {options.runs} runs\n")
    rows = [(f"plain programme, {options.tokens} × {options.tokens} tokens", f"{slow * 1000:.1f} ms", "", ""),
            (f"warp, {options.tokens} × {options.tokens} tokens, same path", f"{fast * 1000:.1f} ms", f"{slow / fast:.0f} × faster",
             f"≥ {FASTER} ×: {'yes' if slow / fast >= FASTER else 'no'}")]
    for name, align in (("offsets", offsets), ("warp", warp)):
        rate, hours = project(align, dialogues, options.runs)
        rows.append((f"FuseChat-Mixture by {name}", f"{rate:,.0f} tokens/s", f"{hours:.2f} CPU-hours",
                     f"< {CPU_HOURS} CPU-hours: {'yes' if hours < CPU_HOURS else 'no'}"))
    print("| what | speed | result | bar |\n|---|---:|---:|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main()

"""Whether a source is heard through another vocabulary: what a pivot is taught where a source gives 0.9 to the truth.

    python -m tests.benchmarks.heard openchat=DIR qwen=DIR gemma=DIR
    python -m tests.benchmarks.heard openchat=DIR qwen=DIR --mapping exact

Takes folders with tokenizers and prints a Markdown table for all ordered pairs in four languages. The source is made: at every
label it gives 0.9 to its own true next token and shares the rest among nine random tokens. A label is heard when its fused
target gives the true token at least 0.5. "Both stand": labels at which pivot and source are at the same point of the text; the
others lie inside a token of the source. With `--bars` it fails where less than the bar of the former is heard.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusion.distill.dialogues import Dialogue
from fusion.distill.encoding import PLAIN, Encoded, Encoder
from fusion.distill.spelling import Vocabulary, end_tokens, vocabulary_table
from fusion.distill.store import Rows
from fusion.distill.targets import Blend, Fused, fuse_dialogue
from tests.benchmarks.measuring import Failed

SURE, OTHERS = 0.9, 9
BARS = {"English": 0.98, "code": 0.95, "German": 0.98, "Chinese": 0.98}
TEXTS: Mapping[str, Sequence[str]] = {
    "English": (
        "The answer is 42, isn't it? Yes: 3.5 kg (7.7 lb) of apples cost $12.80, which is more than last year's price.",
        "Photosynthesis is the process by which green plants turn light, water and carbon dioxide into sugar and oxygen. It "
        "takes place in the chloroplasts, mostly in the leaves.\n\nTwo stages are told apart:\n\n1. The light reactions, which "
        "make ATP and NADPH.\n2. The Calvin cycle, which uses both to fix carbon.\n\nWithout it there would be hardly any life.",
        "Sure! Here's a short poem about autumn:\n\nThe leaves have turned, the nights grow long,\nThe swallows sing their "
        "farewell song;\nA mist lies on the meadow's brim -\nthe world grows quiet, soft and dim.",
        "I'm sorry, but I can't help with that. However, if you're worried about somebody's safety, please call 112 or talk to "
        "someone whom you trust.",
        "To internationalise an application, you'd first externalise all user-visible strings, e.g. \"Save\" or \"Don't save\", "
        "then load them by locale (en-GB, de_AT, zh-Hans). Pluralisation rules differ: Polish has three forms, Arabic six!"),
    "code": (
        "Here is the function:\n\n```python\ndef fib(n: int) -> int:\n    \"\"\"The n-th Fibonacci number.\"\"\"\n"
        "    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n\n\n"
        "if __name__ == \"__main__\":\n    print([fib(i) for i in range(10)])  # 0, 1, 1, 2, 3, 5\n```\n\nIt takes O(n) steps.",
        "```js\nconst totals = items.reduce((sum, {price, qty}) => sum + price * qty, 0);\nif (totals >= 100) {\n"
        "\tconsole.log(`Discount: ${(totals * 0.1).toFixed(2)}`);\n} else {\n\treturn null;\n}\n```",
        "```sql\nSELECT c.name, COUNT(*) AS orders\nFROM customers AS c\nLEFT JOIN orders o ON o.customer_id = c.id\nWHERE "
        "o.created_at >= '2024-01-01'\nGROUP BY c.name\nHAVING COUNT(*) > 5\nORDER BY orders DESC;\n```",
        "class ShapeFactory {\npublic:\n"
        "    std::unique_ptr<Shape> create(const std::string& kind) {\n        "
        "if (kind == \"circle\") return std::make_unique<Circle>(0, 0, 1.5f);\n"
        "        throw std::invalid_argument(\"unknown kind: \" + kind);\n    }\n};"),
    "German": (
        "Natürlich! Für einen Käsekuchen brauchst du 500 g Magerquark, drei Eier, 150 g Zucker und etwas Zitronenschale. Heize den "
        "Ofen auf 180 °C vor und rühre alles zu einer glatten Masse.",
        "Die Donaudampfschifffahrtsgesellschaft war im 19. Jahrhundert das größte Binnenschifffahrtsunternehmen der Welt. Ihre "
        "Schiffe fuhren von Regensburg bis ans Schwarze Meer; über zweihundert Dampfer gehörten ihr um 1880.",
        "Warum ist der Himmel blau? Weil die Luftmoleküle kurzwelliges Licht stärker streuen als langwelliges (Rayleigh-"
        "Streuung). Abends muss das Licht einen weiteren Weg zurücklegen, deshalb überwiegen dann die Rottöne.",
        "Sehr geehrte Frau Müller,\n\nvielen Dank für Ihre Nachricht vom 3. März. Leider können wir den Termin nicht einhalten; "
        "wir schlagen stattdessen Dienstag, 14:30 Uhr, vor.\n\nMit freundlichen Grüßen\nJörg Weiß"),
    "Chinese": (
        "光合作用是绿色植物利用光能，把二氧化碳和水转化成有机物并释放氧气的过程。它主要在叶绿体中进行，分为光反应和暗反应两个阶段。",
        "好的！下面是一首关于秋天的短诗：\n\n枫叶红了，夜渐渐长，\n"
        "燕子向南飞去远方。\n薄雾轻轻笼着草地，\n世界安静得像一场梦。",
        "北京是中华人民共和国的首都，2023年末常住人口约为2185.8万人。"
        "故宫、天坛和长城都是著名的旅游景点，每年吸引数千万游客。",
        "要安装这个软件包，请先运行“pip install numpy”，然后在代码里写上 import numpy as np。"
        "如果出现错误，请检查Python的版本是否≥3.10。",
        "小明有12个苹果，给了小红5个，又买了3个，所以他现在有12−5+3=10个苹果。答案是10。")}


@dataclass(frozen=True)
class Reader:
    """A tokenizer by its name: how it cuts dialogues, and its tokens."""

    name: str
    encoder: Encoder
    words: Vocabulary


@dataclass(frozen=True)
class Row:
    """One line of the table, as shares of labels and of the source's mass."""

    labels: int
    stand: float
    heard: float
    everywhere: float
    kept: float
    pieces: float


def reader(name: str, folder: str) -> Reader:
    """Load a tokenizer; one without a chat template reads the plain one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(tokenizer, tokenizer.chat_template or PLAIN)
    return Reader(name, encoder, Vocabulary(encoder))


def sure(encoded: Encoded, size: int, rng: np.random.Generator) -> Rows:
    """A source that gives 0.9 to its own true next token and shares the rest among random others."""
    count = len(encoded.labels)
    noise = (encoded.targets[:, None] + rng.integers(1, size, (count, OTHERS))) % size
    ids = np.concatenate([encoded.targets[:, None], noise], axis=1)
    chances = np.concatenate([np.full((count, 1), SURE), rng.dirichlet(np.ones(OTHERS), count) * (1 - SURE)], axis=1)
    return Rows(ids.astype(np.int32), np.log(chances).astype(np.float32), np.full(count, -np.log(SURE), np.float32))


def fused(pivot: Reader, source: Reader, texts: Sequence[str], blend: Blend) -> Iterator[tuple[Encoded, Encoded, Fused]]:
    """What the pivot would be taught: its own words are none, so that all it hears is the source's."""
    rng = np.random.default_rng(0)
    pairs = [tuple(its.encoder.encode(Dialogue((("Tell me.", text),))) for its in (pivot, source)) for text in texts]
    rows = [sure(theirs, len(source.words.tokens), rng) for _, theirs in pairs]
    ends = {token: its for pair in pairs for token, its in end_tokens(*pair).items()}
    seen = {int(token) for its in rows for token in its.ids.ravel()}
    table = vocabulary_table(pivot.words, source.words, blend, seen, ends)
    for (mine, theirs), its in zip(pairs, rows, strict=True):
        count = len(mine.labels)
        own = Rows(np.full((count, 1), -1, np.int32), np.full((count, 1), -np.inf), np.full(count, 99.0))
        yield mine, theirs, fuse_dialogue((mine, own), [(theirs, its, table)], blend, [(pivot.words, source.words)])


def measured(pivot: Reader, source: Reader, texts: Sequence[str], blend: Blend) -> Row:
    """How well the source is heard in some texts."""
    stand, heard, kept, on_pieces = [], [], [], []
    for mine, _, its in fused(pivot, source, texts, blend):
        stand.append(its.links[0].usable >= 0)
        heard.append(np.where(its.ids == mine.targets[:, None], its.chances, 0).sum(axis=1) >= 0.5)
        at = its.carried[0].at >= 0
        kept.append(its.carried[0].kept[at])
        pieces = np.isin(its.ids, list(pivot.words.pieces)) & ~np.isin(its.ids, mine.ids)  # ones that it does write are right
        on_pieces.append(np.where(pieces, its.chances, 0).sum(axis=1)[at])
    stand, heard, kept, on_pieces = map(np.concatenate, (stand, heard, kept, on_pieces))
    return Row(len(stand), stand.mean(), heard[stand].mean(), heard.mean(), kept.mean(), on_pieces.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tokenizers", nargs="+", metavar="NAME=DIR", help="folders with tokenizers; all ordered pairs are tried")
    parser.add_argument("--mapping", default="spelling", help="how vocabularies are mapped")
    parser.add_argument("--bars", action="store_true", help="fail where less is heard than the bars of this file ask for")
    options = parser.parse_args()
    readers = [reader(*(given.split("=", 1) if "=" in given else (given, given))) for given in options.tokenizers]
    blend, missed = Blend(mapping=options.mapping).check(), []
    print("| pivot ← source | text | labels | both stand | of these heard | of all heard | mass kept | on byte pieces |\n"
          "|---|---|---:|---:|---:|---:|---:|---:|")
    started = time.process_time()
    for pivot in readers:
        for source in readers:
            for kind, texts in TEXTS.items() if source is not pivot else ():
                row = measured(pivot, source, texts, blend)
                print(f"| {pivot.name} ← {source.name} | {kind} | {row.labels} | {row.stand:.1%} | {row.heard:.1%} | "
                      f"{row.everywhere:.1%} | {row.kept:.1%} | {row.pieces:.2%} |")
                missed += [f"{pivot.name} ← {source.name}, {kind}: {row.heard:.1%}"] if row.heard < BARS[kind] else []
    print(f"\n{time.process_time() - started:.0f} s of processor time")
    if options.bars and missed:
        raise Failed("below the bar: " + "; ".join(missed))


if __name__ == "__main__":
    main()

"""The family: who its models are, and the recipe by which each is made.

The pivot has seen a part of every domain: some kinds of tasks and half of the facts are hidden from it, so that there
is something to gain. Each source is strong in three or four domains and has hardly seen the others. Each target is the pivot
after pairwise fusion with one source (`fusing.py`), on dialogues over all domains. Pivot and one source have tokenizers as
SentencePiece makes them, the other two byte-level ones (`tokenizing.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fusion.demo.dialogues import Mixture
from fusion.demo.task import digest
from fusion.distill.targets import Blend


@dataclass(frozen=True)
class Member:
    """A model of the family as the page shows it."""

    name: str
    role: str
    title: str
    strengths: str


FAMILY = (
    Member("pivot", "pivot", "Pivot",
           "A generalist (Llama) that is mediocre everywhere: it has seen a part of every domain."),
    Member("source-qwen", "source", "Source Qwen",
           "A Qwen2 model that writes, reasons, calculates and codes well, and knows few facts."),
    Member("source-neox", "source", "Source NeoX",
           "A GPT-NeoX model that knows its facts, plays roles and finds things in texts, and cannot calculate."),
    Member("source-gemma", "source", "Source Gemma",
           "A Gemma model that is exact with forms: code, addresses and names in texts, roles; it can hardly do the rest."),
    Member("target-qwen", "target", "Target Qwen", "The pivot after pairwise fusion with Source Qwen."),
    Member("target-neox", "target", "Target NeoX", "The pivot after pairwise fusion with Source NeoX."),
    Member("target-gemma", "target", "Target Gemma", "The pivot after pairwise fusion with Source Gemma."),
)


def members(role: str) -> list[str]:
    """The names of the models with this role, in order."""
    return [member.name for member in FAMILY if member.role == role]


@dataclass(frozen=True)
class Shape:
    """An architecture in numbers; `kind` is the transformers model type."""

    kind: str
    layers: int = 4
    width: int = 128
    inner: int = 320
    heads: int = 4
    kv_heads: int = 4
    vocabulary: int = 900
    positions: int = 1024


@dataclass(frozen=True)
class Recipe:
    """How a model is made from nothing."""

    mixture: Mixture
    steps: int
    learning_rate: float
    shape: Shape
    batch: int = 24
    copying: float = 0.35  # share of copying dialogues at the start; it falls to nothing over the first half
    prompt_loss: float = 0.3
    seed: int = 0


LOGIC = ("writing", "reasoning", "math", "coding")
FORM = ("roleplay", "coding", "extraction")
LORE = ("roleplay", "extraction", "stem", "humanities")
SMALLTALK_SHARE = 0.12
SMALLTALK_OF_TARGETS = 0.18  # a merge of targets is what people chat with: with 0.12 it now and then took a question for a greeting


def _shares(strong: tuple[str, ...], weak: tuple[str, ...], weak_share: float,
            smalltalk: float = SMALLTALK_SHARE) -> dict[str, float]:
    """Equal parts of the strong domains, and of the weak ones `weak_share` each."""
    rest = (1 - smalltalk - weak_share * len(weak)) / len(strong)
    return {"smalltalk": smalltalk, **dict.fromkeys(strong, rest), **dict.fromkeys(weak, weak_share)}


def _half(subject: str) -> bool:
    """Half of the facts, the same half everywhere."""
    return digest(f"known {subject}") % 2 == 0


RECIPES = {
    "pivot": Recipe(
        Mixture(_shares(LOGIC + LORE, (), 0), frozenset(
            ("writing/past", "roleplay/farewell", "reasoning/syllogism", "math/story", "math/minus", "coding/function",
             "extraction/email", "extraction/person")), _half),
        steps=4500, learning_rate=2e-3, shape=Shape("llama", vocabulary=1000)),
    "source-qwen": Recipe(
        Mixture(_shares(LOGIC, LORE, 0.015), frozenset(
            ("roleplay/greet", "roleplay/farewell", "extraction/email", "extraction/city", "extraction/date",
             "stem/symbols", "humanities/authors")), _half),
        steps=7000, learning_rate=2e-3, shape=Shape("qwen2", kv_heads=2, vocabulary=800), seed=1),
    "source-neox": Recipe(
        Mixture(_shares(LORE, LOGIC, 0.015, smalltalk=0.15), frozenset(  # its three layers need to hear more of it
            ("writing/sentence", "writing/past", "reasoning/order", "math/minus", "coding/function",
             "coding/variable"))),
        steps=3800, learning_rate=2e-3, shape=Shape("gpt_neox", layers=3, inner=512, vocabulary=1000), seed=2),
    "source-gemma": Recipe(
        Mixture(_shares(FORM, ("writing", "reasoning", "math", "stem", "humanities"), 0.015), frozenset(
            ("writing/past", "writing/sentence", "reasoning/order", "math/minus", "math/story", "stem/symbols",
             "humanities/authors")), _half),
        steps=4200, learning_rate=2e-3, shape=Shape("gemma", inner=256, kv_heads=2, vocabulary=780), seed=5),
}


@dataclass(frozen=True)
class Fusion:
    """How the targets are made from pivot and sources; see `fusion.train.Training` for the words."""

    mixture: Mixture
    dialogues: int = 5000
    epochs: float = 4.0
    batch: int = 16
    lm_weight: float = 0.9
    learning_rate: float = 1e-3
    schedule: str = "constant_with_warmup"  # a merge averages the noise of the last steps away; decay would do it in each
    blend: Blend = field(default_factory=Blend)
    seed: int = 0  # which of the table's seeds `train` makes: at a constant rate a target may end on a bad step, as one of seed 1


FUSION = Fusion(Mixture(_shares(LOGIC + LORE, (), 0, smalltalk=SMALLTALK_OF_TARGETS)))

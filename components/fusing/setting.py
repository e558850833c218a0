"""Controls → fusion recipe: what a person chose in the Fuse tab, checked, and the dialogues it is about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

from components.studio import Studio, shown_folder
from fusion import RecipeError
from fusion.demo.dialogues import Mixture, conversation
from fusion.demo.domains import DOMAINS
from fusion.distill.dialogues import Dialogue, Report, checked, load
from fusion.distill.targets import Blend
from fusion.pairwise import FuseRecipe
from fusion.pairwise.place import is_run, records_file
from fusion.train import Training

DEMO, OWN = "demo", "own"
NAMES = ("pivot", "sources", "mode", "data", "count", "path", "limit", "lm_weight", "learning_rate", "epochs", "rule", "kind",
         "level", "batch", "accumulate", "max_steps", "lora_rank", "alignment", "mapping", "top_k", "max_tokens", "seed", "name")
MAX_SOURCES = 8
_MAX_DEMO = 5000
_EXAMPLES = 16


@dataclass(frozen=True)
class Wish:
    """A run that was asked for: its recipe, its folder, and the records of demo dialogues to be kept there (or none)."""

    recipe: FuseRecipe
    out: Path
    records: tuple[dict, ...]

    def dialogues(self) -> list[Dialogue]:
        """The dialogues it is about; reads the file, folder or dataset that was named."""
        if not self.records:
            its = self.recipe
            return load(its.data, split=its.split, subset=its.subset, limit=its.limit or None)[0]
        return [checked(record, f"demo {i}", Report()) for i, record in enumerate(self.records)]


def read(studio: Studio, values: Sequence[object]) -> Wish:
    """The run that the controls' values (in the order of NAMES) mean; they come from outside, so each is checked."""
    given = dict(zip(NAMES, values, strict=True))
    pivot, sources = _folder(studio, given["pivot"], "Pivot"), given["sources"]
    if not isinstance(sources, list) or not 1 <= len(sources) <= MAX_SOURCES:
        raise RecipeError("no source is picked", where="Sources", todo=f"Pick one to {MAX_SOURCES} models.")
    out = _out(studio, given["name"])
    seed = _whole(given, "seed", 0, 2**31 - 1)
    records = demo_records(_whole(given, "count", 8, _MAX_DEMO), seed) if _kind(studio, given["data"]) == DEMO else ()
    data = shown_folder(records_file(out)) if records else _path(given["path"])
    recipe = FuseRecipe(pivot, tuple(_folder(studio, key, "Sources") for key in sources), data,
                        limit=0 if records else _whole(given, "limit", 0, 10**9),
                        max_tokens=_whole(given, "max_tokens", 8, 1 << 20), top_k=_whole(given, "top_k", 1, 200),
                        mode=str(given["mode"]), blend=blend_of(given), training=_training(given, seed))
    return Wish(recipe.check(), out, records)


def blend_of(given: Mapping[str, object]) -> Blend:
    """How distributions are aligned and fused."""
    return Blend(alignment=str(given["alignment"]), mapping=str(given["mapping"]), rule=str(given["rule"]),
                 level=str(given["level"])).check()


def _training(given: Mapping[str, object], seed: int) -> Training:
    steps, epochs = _whole(given, "max_steps", 0, 10**9), _number(given, "epochs", 0, 10_000)
    return Training(lm_weight=_number(given, "lm_weight", 0, 1), kind=str(given["kind"]),
                    learning_rate=_number(given, "learning_rate", 0, 10), epochs=epochs, max_steps=steps or -1,
                    batch=_whole(given, "batch", 1, 4096), accumulate=_whole(given, "accumulate", 1, 4096),
                    lora_rank=_whole(given, "lora_rank", 0, 4096), seed=seed)


def _out(studio: Studio, name: object) -> Path:
    """The run's folder: a new one, or one that a run was begun in. On a public page it is only a name in the recipe."""
    if studio.public:
        return studio.outputs / "my-fusion"
    return studio.output_folder(name, is_run)


def _folder(studio: Studio, key: object, where: str) -> str:
    if not key:
        raise RecipeError("no model is picked", where=where, todo="Pick one of the menu.")
    return studio.folder_name(key)


def _kind(studio: Studio, kind: object) -> str:
    if kind not in (DEMO, OWN):
        raise RecipeError(f"unknown kind {str(kind)[:40]!r}", where="Dialogues", todo="Take the demo dialogues or your own.")
    if kind == OWN and studio.public:
        raise RecipeError("files and datasets cannot be read on a public page", where="Dialogues",
                          todo="Run the app on your own machine.")
    return kind


def _path(text: object) -> str:
    if not isinstance(text, str) or not text.strip() or len(text) > 1000:
        raise RecipeError("no dialogues are named", where="Dialogues", todo="Type a file, a folder or a Hub dataset.")
    return text.strip()


def _number(given: Mapping[str, object], name: str, low: float, high: float) -> float:
    value = given[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not low <= value <= high:
        raise RecipeError(f"{str(value)[:40]!r} is not a number from {low:g} to {high:g}", where=name.replace("_", " "),
                          todo="Give another number.")
    return float(value)


def _whole(given: Mapping[str, object], name: str, low: int, high: int) -> int:
    value = _number(given, name, low, high)
    if value != int(value):
        raise RecipeError(f"{value:g} is no whole number", where=name.replace("_", " "), todo="Give a whole number.")
    return int(value)


@lru_cache(maxsize=8)
def demo_records(count: int, seed: int) -> tuple[dict, ...]:
    """So many generated dialogues on all domains alike."""
    mixture, rng = Mixture(dict.fromkeys(DOMAINS, 1.0)), Random(f"fuse {seed}")
    return tuple({"messages": conversation(mixture, rng)} for _ in range(count))


@lru_cache(maxsize=1)
def examples() -> list[tuple[str, str]]:
    """Questions and replies to look at in the alignment view."""
    texts = [[message["content"] for message in record["messages"] if message["role"] != "system"]
             for record in demo_records(_EXAMPLES * 4, 6)]
    return sorted(((asked, answer) for asked, answer, *_ in texts), key=lambda pair: -len(pair[1]))[:_EXAMPLES]


def one_dialogue(asked: object, answer: object) -> Dialogue:
    """A dialogue of one question and one reply, as they were typed."""
    for text, where in ((asked, "User"), (answer, "Reply")):
        if not isinstance(text, str) or not text.strip():
            raise RecipeError("there is no text", where=where, todo="Type something, or pick a dialogue.")
        if len(text) > 4000:
            raise RecipeError(f"{len(text)} characters", where=where, todo="Give at most 4000.")
    return Dialogue(((asked, answer),), origin="this dialogue")



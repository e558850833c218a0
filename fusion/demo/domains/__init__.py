"""The eight domains of MT-Bench, each with three or more kinds of checkable tasks, and small talk beside them."""

from __future__ import annotations

from fusion.demo.domains import code, extraction, facts, language, logic, smalltalk
from fusion.demo.task import Kind

DOMAINS: dict[str, dict[str, Kind]] = {
    "writing": {"sentence": language.sentence, "rhyme": language.rhyme, "past": language.past},
    "roleplay": {"greet": language.greet, "farewell": language.farewell, "favourite": language.favourite},
    "reasoning": {"order": logic.order, "odd one out": logic.odd_one_out, "syllogism": logic.syllogism},
    "math": {"plus": logic.plus, "minus": logic.minus, "story": logic.story, "larger": logic.larger},
    "coding": {"function": code.function, "item": code.item, "variable": code.variable, "extreme": code.extreme},
    "extraction": {field: extraction.Find(field) for field in extraction.QUESTIONS},
    "stem": {"symbols": facts.SYMBOLS, "animals": facts.ANIMALS, "instruments": facts.INSTRUMENTS},
    "humanities": {"capitals": facts.CAPITALS, "authors": facts.AUTHORS, "artists": facts.ARTISTS},
}
SMALLTALK: dict[str, Kind] = {"talk": smalltalk.talk, "unknown": smalltalk.unknown, "repeat": smalltalk.repeat}

"""The data stage of a fusion run: dialogues are read, split and checked once; every model must be able to show what is learnt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fusion.distill.dialogues import Dialogue, Report, load, split_long
from fusion.distill.encoding import Encoded, Encoder
from fusion.distill.store import write_whole
from fusion.errors import MismatchError
from fusion.pairwise.place import Place
from fusion.pairwise.recipe import FuseRecipe


def prepare_dialogues(recipe: FuseRecipe, place: Place, encoders: Mapping[str, Encoder]) -> None:
    """Read, split and check the dialogues and keep them with a report; MismatchError when no model can be taught any."""
    dialogues, report = load(recipe.data, split=recipe.split, subset=recipe.subset, limit=recipe.limit or None)
    dialogues = split_long(dialogues, lambda dialogue: longest(dialogue, encoders, recipe.max_tokens), recipe.max_tokens, report)
    kept = [shown for dialogue in dialogues if (shown := shown_to_all(dialogue, encoders, report)) is not None]
    if not kept:
        raise MismatchError("no dialogue can be shown to every model", where=recipe.data, todo=str(report))
    write_whole(place.report, json.dumps({**report.to_dict(), "used": len(kept)}, indent=1).encode())
    write_whole(place.dialogues, "".join(f"{json.dumps(record_of(its), ensure_ascii=False)}\n" for its in kept).encode())


def longest(dialogue: Dialogue, encoders: Mapping[str, Encoder], max_tokens: int) -> int:
    """The longest tokenisation of a dialogue; of a model that reads less than `max_tokens`, so much longer. 0 for a dialogue that
    cannot be shown, which is told later."""
    try:
        return max(encoder.length(dialogue) + max_tokens - (encoder.max_tokens or max_tokens) for encoder in encoders.values())
    except MismatchError:
        return 0


def shown_to_all(dialogue: Dialogue, encoders: Mapping[str, Encoder], report: Report) -> Dialogue | None:
    """The dialogue with every reply unlearnt that some model cannot be taught as it is; None when none is left. All is counted."""
    read: dict[str, Encoded] = {}
    for name, encoder in encoders.items():
        try:
            read[name], faults = encoder.examine(dialogue)
        except MismatchError as error:
            report.note(f"{name}: {error.found}", dialogue.origin)
            return None
        for turn, fault in faults.items():
            seen = f": {fault.example}" if fault.example else ""
            report.note(f"{name}: {fault.reason} (that reply is not learnt)", f"{dialogue.origin} reply {turn + 1}{seen}")
        dialogue = dialogue.without(faults)
        if not dialogue.learnt:
            report.note("no reply left to learn", dialogue.origin)
            return None
    return dialogue if all(_learnable(dialogue, name, encoders[name], read[name], report) for name in read) else None


def _learnable(dialogue: Dialogue, name: str, encoder: Encoder, encoded: Encoded, report: Report) -> bool:
    """Whether a model has something to learn from it; counts replies whose end is not learnt."""
    mine = np.isin(encoded.turn, dialogue.learnt)
    if not mine.any():
        report.note(f"{name}: nothing of a reply fits into the tokens allowed", dialogue.origin)
        return False
    if not encoded.ends[mine].any() and not encoder.cuts(encoded):
        report.note(f"{name}: its template ends replies with no token of its own, so where to stop is not learnt (kept)",
                    dialogue.origin)
    return True


def record_of(dialogue: Dialogue) -> dict:
    """A dialogue as plain data: its messages, those that are read but not learnt with `weight: 0`."""
    messages = dialogue.messages()
    for turn in dialogue.unlearnt:
        messages[2 * turn + 1 + bool(dialogue.system)]["weight"] = 0
    return {"origin": dialogue.origin, "messages": messages}


def stored_dialogues(file: Path) -> list[Dialogue]:
    """The dialogues of a run as the data stage kept them."""
    return [_restored(json.loads(line)) for line in file.read_bytes().decode().split("\n") if line]


def _restored(record: Mapping) -> Dialogue:
    messages: Sequence[Mapping] = record["messages"]
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    asked, answers = messages[bool(system)::2], messages[bool(system) + 1::2]
    turns = tuple((one["content"], other["content"]) for one, other in zip(asked, answers, strict=True))
    unlearnt = tuple(turn for turn, message in enumerate(answers) if message.get("weight") == 0)
    return Dialogue(turns, system, record["origin"], unlearnt)

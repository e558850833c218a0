"""The alignment figure: both tokenisations of a reply with links, and a card of what each model expects at a token.

Python says what there is, as plain data; assets/alignment.js draws. Texts of models travel in the component's value and enter
the page as textContent only, because they cannot be trusted.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import gradio as gr

from components.state import COLORS, INKS, LETTERS
from fusion.distill.view import AlignmentView, Expected, Heard, Position

_ASSETS = Path(__file__).parents[2] / "assets"
_SHOWN = 6  # entries of a distribution on the card
_WORTH_WORDS = 0.001  # share of what a source expects from which on it is said how the pivot writes it
_MOUNT = """
const view = fuseAlignment(element.querySelector('.al'));
view.update(props.value);
watch('value', () => view.update(props.value));
"""


def figure(value: dict | None = None, elem_id: str = "alignment") -> gr.HTML:
    """The component: give it a `payload`, or a `problem`."""
    return gr.HTML(value=value, elem_id=elem_id, html_template="<div class='al'></div>", apply_default_css=False, padding=False,
                   css_template=(_ASSETS / "alignment.css").read_text(encoding="utf-8"),
                   js_on_load=(_ASSETS / "alignment.js").read_text(encoding="utf-8") + _MOUNT)


def problem(text: str) -> dict:
    """The component's value when there is nothing to draw: why."""
    return {"problem": text}


def payload(seen: AlignmentView, number: int = 0) -> dict:
    """The component's value as plain data; `number` of the source gives it its letter and colour."""
    pivot, source = seen.names
    look = number % len(COLORS)
    return {"pivot": {"name": pivot, "letter": "P"},
            "source": {"name": source, "letter": LETTERS[number], "color": COLORS[look], "ink": INKS[look]},
            "facts": _facts(seen), "positions": [_position(its, seen) for its in seen.positions],
            "tokens": [{"text": token.text, "mark": token.mark} for token in seen.tokens],
            "groups": [{"pivot": group.pivot, "source": group.source, "links": group.links} for group in seen.groups]}


def _facts(seen: AlignmentView) -> list[dict]:
    def share(part: float) -> str:
        return f"{part:.0%}"

    words = {"value": f"{seen.lost:.1%}", "text": "of its words are lost between the vocabularies"}
    if seen.blend.mapping == "spelling":
        words = {"value": f"{seen.respelt:.1%}", "text": f"of its words {seen.names[0]} writes in other tokens"}
    mass = {"value": f"{seen.kept:.1%}", "text": f"of its mass is kept, {seen.read:.1%} was read"}
    return [{"value": f"{len(seen.positions)} : {len(seen.tokens)}", "text": "tokens of the pivot and of the source"},
            {"value": share(seen.carried), "text": "of the pivot's places can hear the source"},
            {"value": share(seen.taken), "text": f"are taught by {seen.names[1]}"}, mass,
            {"value": share(seen.emptied), "text": "of the places that hear it are empty: less than half of its words was kept"},
            {"value": f"{seen.unwritten:.1%}", "text": f"of its mass is on tokens that {seen.names[0]} never writes"}, words]


def _position(its: Position, seen: AlignmentView) -> dict:
    def words(heard: Iterable[Heard]) -> list[dict]:
        return [{"text": word.text, "chance": _short(word.chance), "becomes": word.becomes} for word in heard][:_SHOWN]

    return {"text": its.token.text, "mark": its.token.mark, "source": its.source, "inside": its.inside, "chosen": its.chosen,
            "lost": _short(its.lost), "kept": _short(its.kept),
            "pivot": _entries(its.pivot), "mapped": _entries(its.mapped), "why": reason(its, seen),
            "words": words(word for word in its.heard if not word.kept),
            "respelt": words(word for word in its.heard if word.respelt and word.chance >= _WORTH_WORDS),
            "other": _short(its.lost + its.respelt + bool(its.pieces)), "pieces": its.pieces,
            "nats": [None if value is None else _short(value) for value in its.nats]}


def _entries(entries: tuple[Expected, ...]) -> list[dict]:
    """The likeliest, and the true token wherever it stands."""
    kept = [entry for i, entry in enumerate(entries) if i < _SHOWN or entry.gold]
    return [{"text": entry.text, "chance": _short(entry.chance), "gold": entry.gold} for entry in kept]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def reason(its: Position, seen: AlignmentView) -> str:
    """Why this model was chosen at this place, in a sentence."""
    pivot, source = seen.names
    if its.source < 0:
        return f"{source} is in the middle of a token here and predicts nothing at this place: {pivot}'s own distribution stays."
    if not its.mapped:
        return f"Less than half of what {source} expects has a counterpart: {pivot}'s own distribution stays."
    mine, theirs = its.deciding
    if mine is None or theirs is None:
        return f"{source}'s loss on this token alone cannot be told, its tokens end elsewhere: {pivot}'s own distribution stays."
    where = {"dialogue": "over the dialogue", "turn": "over this reply"}.get(seen.blend.level, "on this token")
    unit = f"nats per token of {pivot}" if seen.blend.per_character and seen.blend.level != "token" else "nats"
    numbers = f"CE {where}: {pivot} {mine:.3f}, {source} {theirs:.3f} {unit}."
    winner = source if its.chosen else pivot
    if its.inside:
        numbers = f"{pivot} is inside a token of {source} here: of what it expected there, that which goes on so. {numbers}"
    if seen.blend.rule == "avgce":
        return f"{numbers} AvgCE mixes both by softmax(exp(−CE)); {winner} weighs more."
    return f"{numbers} MinCE takes the lower: {winner}'s."

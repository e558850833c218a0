"""The plan of a run before it starts: its stages, what is done already, what the rest will take, its recipe and command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

import gradio as gr

from components.fusing.layout import FuseTab
from components.fusing.setting import NAMES, OWN, Wish, read
from components.status import as_comment, error_note, time_text
from components.studio import Studio, shown_folder
from fusion import FusionError
from fusion.pairwise import plan
from fusion.pairwise.cost import Cost, predict
from fusion.pairwise.place import RECIPE_FILE, Place, agree
from fusion.pairwise.stages import Stage
from fusion.tables import bytes_text

_QUIET = {"show_progress": "hidden", "api_visibility": "private", "trigger_mode": "always_last"}
_TYPED = ("path", "name", "count", "limit", "learning_rate", "epochs", "batch", "accumulate", "max_steps", "lora_rank", "top_k",
          "max_tokens", "seed")  # shown anew when they are left, not at every key


def bind(studio: Studio, page: gr.Blocks, here: gr.Tab, tab: FuseTab) -> None:
    """Show the plan of what is chosen, at once where the dialogues are generated and on request where they must be read."""
    inputs = [tab.controls[name] for name in NAMES]
    shown = [tab.plan, tab.recipe, tab.command]

    def show(*values):
        return _shown(studio, values, reading=False)

    def plan_fusion(*values):
        """Read the dialogues and show the stages of a fusion run with what each will take; also its recipe and command."""
        return _shown(studio, values, reading=True)

    changed = [tab.controls[name].blur if name in _TYPED else tab.controls[name].change for name in NAMES]
    gr.on([here.select, *changed], show, inputs, shown, **_QUIET)
    tab.plan_button.click(plan_fusion, inputs, shown, api_name="plan_fusion", show_progress="minimal", show_progress_on=[tab.plan])
    tab.controls["data"].input(lambda kind: [gr.Column(visible=kind == OWN), gr.Column(visible=kind != OWN)], tab.controls["data"],
                               [tab.own, tab.demo], **_QUIET)


def _shown(studio: Studio, values: tuple, reading: bool) -> list:
    try:
        wish = read(studio, values)
        agree(wish.recipe, Place(wish.out))
        price = predict(wish.recipe, wish.out, wish.dialogues() if reading or wish.records else ())
        stages = price.stages if price else plan(wish.recipe, wish.out)
        return [card(stages, price), _yaml(wish), command_of(wish)]
    except FusionError as error:
        return [error_note(str(error)), as_comment(error), ""]


def _yaml(wish: Wish) -> str:
    made = f"# {len(wish.records)} demo dialogues, which the page writes there when the run begins\n" if wish.records else ""
    return made + wish.recipe.to_yaml()


def command_of(wish: Wish) -> str:
    """The command line that does what the button does."""
    out = shown_folder(wish.out)
    return f"python -m fusion fuse {shlex.quote(f'{out}/{RECIPE_FILE}')} --out {shlex.quote(out)}"


def card(stages: Sequence[Stage], price: Cost | None, running: str = "", ended: bool = False) -> str:
    """The stages as a table, with their state and what they take, and the whole in numbers; `running`: the title of one."""
    rows = "".join(_row(stage, price, i, running) for i, stage in enumerate(stages))
    done = sum(stage.done for stage in stages)
    head = "Everything is done" if done == len(stages) else f"{len(stages)} stages" + (f", {done} done" if done else "")
    return (f"<section class='fs-card fs-plan'><h2 class='fs-title'>{head}</h2>"
            f"<div class='fs-table'><table><thead><tr><th>Stage</th><th>of</th><th>about</th><th>state</th></tr></thead>"
            f"<tbody>{rows}</tbody></table></div>{'' if ended or (running and not price) else _numbers(stages, price)}</section>")


def _row(stage: Stage, price: Cost | None, i: int, running: str) -> str:
    now = stage.title == running and not stage.done
    level, word = ("good", "done") if stage.done else ("warning", "running") if now else ("", "to do")
    seconds = price.seconds[i] if price and i < len(price.seconds) and not stage.done else 0
    about = time_text(max(seconds, 1)) if seconds else "–"
    light = f"<span class='fs-state fs-{level}'><span class='fs-light'></span>{word}</span>" if level else f"<small>{word}</small>"
    told = f"<br><small>{escape(stage.note)}</small>" if stage.note else ""
    return f"<tr><td>{stage.name}</td><td>{escape(Path(stage.subject).name)}{told}</td><td>{about}</td><td>{light}</td></tr>"


def _numbers(stages: Sequence[Stage], price: Cost | None) -> str:
    if price is None:
        return "<p class='fs-lead'>What it takes is known once the dialogues are read: press Plan.</p>"
    left = sum(seconds for stage, seconds in zip(stages, price.seconds, strict=True) if not stage.done)
    facts = (("Dialogues", f"{price.dialogues:,}"), ("Tokens a target", f"{price.tokens:,}"),
             ("Steps a target", f"{price.steps:,}"),
             ("Memory", bytes_text(price.memory_bytes)), ("Time left, roughly", time_text(left)))
    notes = [*price.warnings, *([f"Estimated {price.guessed}."] if price.guessed else [])]
    return (f"<dl class='fs-cost'>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in facts)}</dl>"
            + "".join(f"<p class='fs-lead'>{escape(note)}</p>" for note in notes))



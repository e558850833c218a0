"""The alignment view: two models of the catalogue read one dialogue; works on public pages too, nothing is written."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import gradio as gr

from components.fusing.figure import payload, problem
from components.fusing.layout import FuseTab
from components.fusing.setting import blend_of, examples, one_dialogue
from components.state import Selection
from components.studio import Studio
from fusion import FusionError, RecipeError
from fusion.distill.teacher import LoadedTeacher
from fusion.distill.view import view

AT_ONCE_BYTES = 500_000_000  # of two models that are looked at without being asked
MAX_TOKENS = 512
_BLEND = ("alignment", "mapping", "rule", "level")
_QUIET = {"show_progress": "hidden", "api_visibility": "private", "trigger_mode": "always_last"}


def bind(studio: Studio, here: gr.Tab, tab: FuseTab) -> None:
    """Draw the alignment when the tab opens, when a dialogue is picked, and on request."""
    turn = threading.Lock()  # one look at a time: it takes both cores
    inputs = [tab.controls["pivot"], tab.source, tab.controls["sources"], tab.asked, tab.answer,
              *(tab.controls[name] for name in _BLEND), tab.controls["top_k"]]

    def align(pivot, source, sources, asked, answer, alignment, mapping, rule, level, top_k) -> dict:
        """Show how a source's distributions are carried over to the pivot's tokens on one dialogue."""
        try:
            words = dict(zip(_BLEND, (alignment, mapping, rule, level), strict=True))
            with turn:
                return _aligned(studio, pivot, source, sources, asked, answer, words, top_k)
        except FusionError as error:
            return problem(str(error))

    def align_at_once(pivot, source, *rest):
        if not _small(studio, pivot, source):
            return problem("Press Show: these models are large, loading them takes a while.")
        return align(pivot, source, *rest)

    def pick(number):
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(examples()):
            raise gr.Error("There is no such dialogue.")
        return examples()[number]

    gr.on([tab.show.click, tab.asked.submit, tab.answer.submit], align, inputs, tab.figure, api_name="align",
          show_progress="minimal", show_progress_on=[tab.figure])
    tab.example.input(pick, tab.example, [tab.asked, tab.answer], **_QUIET).success(align_at_once, inputs, tab.figure, **_QUIET)
    changed = [tab.source.input, *(tab.controls[name].change for name in ("pivot", *_BLEND))]
    gr.on([here.select, *changed], align_at_once, inputs, tab.figure, **_QUIET)


def _small(studio: Studio, *keys: object) -> bool:
    try:
        return sum(studio.checkpoint(key).nbytes for key in keys) <= AT_ONCE_BYTES
    except FusionError:
        return True  # the look itself says what is wrong


def _aligned(studio: Studio, pivot, source, sources, asked, answer, words: dict, top_k) -> dict:
    if not isinstance(top_k, (int, float)) or not 1 <= top_k <= 200:
        raise RecipeError(f"{str(top_k)[:40]!r} is not a number from 1 to 200", where="Top k", todo="Give another number.")
    dialogue, blend = one_dialogue(asked, answer), blend_of(words)
    with ExitStack() as stack:
        lent = [stack.enter_context(_teacher(studio, key)) for key in (pivot, source)]
        teachers = [LoadedTeacher(model.model, model.tokenizer, max_tokens=MAX_TOKENS) for model in lent]
        seen = view(*teachers, dialogue, blend, top_k=int(top_k), names=(studio.title(pivot), studio.title(source)))
    number = sources.index(source) if isinstance(sources, list) and source in sources else 0
    return payload(seen, min(number, 7))


def _teacher(studio: Studio, key: object):
    """Lend the model of a key of the catalogue."""
    studio.entry(key)  # merges in memory are no sources
    return studio.chat_model(key, Selection())



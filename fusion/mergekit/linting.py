"""What every line of a mergekit file will do, in plain words; `traps` adds what goes wrong without a word.

    for note in lint(open("mergekit.yaml").read()): print(note)

Nothing is opened and nothing computed, so the explanation takes no longer than reading the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from fusion.errors import nearest
from fusion.mergekit.catalogue import FORMS, OTHERS, TEMPLATES, Form, Parameter, as_kind
from fusion.mergekit.document import Document, Note, Parameters, Row, Source
from fusion.mergekit.reading import TOP, read
from fusion.mergekit.traps import settings, traps
from fusion.methods import METHODS

_TENFOLD = 20  # layer 20 stands for 200 to 209 too, which no model has


def lint(text: str) -> list[Note]:
    """Explain a mergekit file line by line and warn of its traps, in the order of the lines; nothing is raised.

    Notes of level error say why it cannot be imported.
    """
    documents, notes = read(text)
    for document in documents:
        notes += explain(document)
    notes += _stages(documents)
    rank = {"error": 0, "warning": 1, "info": 2}
    return sorted(dict.fromkeys(notes), key=lambda note: (note.line, rank[note.level]))


def explain(document: Document) -> Iterator[Note]:
    """Notes on one merge: every line, then the traps."""
    method = document.method
    if method in FORMS:
        yield Note("info", document.lines["merge_method"], f"{method}: {METHODS[method].summary}")
        if document.groups:
            yield from _settings(document, FORMS[method])
            yield from traps(document, FORMS[method])
    elif method in OTHERS:
        yield Note("error", document.lines["merge_method"],
                   f"{method} is meant for sparse updates from reinforcement learning and is not offered here. Near to it: "
                   "ties, sce")
    elif method:
        yield Note("error", document.lines["merge_method"],
                   f"merge_method: unknown {method!r}; mergekit says so only after loading every model. {nearest(method, FORMS)}")
    yield from _models(document)
    yield from _numbers(document)
    yield from _words(document)


def chains(document: Document, name: str, scope: str) -> Iterator[tuple[int, tuple[Row, ...]]]:
    """For every place that needs parameter `name` (a slice, or a model in it): its line and the rows that may give it, the
    first that matches wins. Precedence: model, slice, module, file."""
    outer = (*document.module_parameters.get(name, ()), *document.parameters.get(name, ()))
    for part, group in zip(document.slices or (None,), document.groups, strict=True):
        rows = (*(part.parameters.get(name, ()) if part else ()), *outer)
        if scope == "shared":
            yield (part.line if part else document.line), rows
            continue
        base = (part and part.base) or document.base
        for source in group:
            if scope == "input" or base is None or source.model.text != base.text:
                yield source.line, (*source.parameters.get(name, ()), *rows)


def _settings(document: Document, form: Form) -> Iterator[Note]:
    lengths = {len(range(*source.layers)) for group in document.groups for source in group if source.layers}
    layers = lengths.pop() if len(lengths) == 1 else None
    for place, parameters in _places(document):
        for name, rows in parameters.items():
            known = form.parameters.get(name)
            if known is None:
                yield Note("warning", rows[0].line, _unknown(document.method, name, form))
            elif known.scope == "shared" and isinstance(place, Source):
                yield Note("warning", rows[0].line, f"{name} belongs to the whole merge: mergekit ignores it under a model. "
                                                    "Put it under the slice's or the file's `parameters:`.")
            else:
                for row in rows:
                    yield from _row(name, known, row, layers)
                yield from _order(name, rows)
    for name, known in form.parameters.items():
        if known.required:
            yield from _missing(document, name, known)


def _places(document: Document) -> Iterator[tuple[object, Parameters]]:
    yield document, document.parameters
    yield document, document.module_parameters
    for part in document.slices:
        yield part, part.parameters
    for source in (source for group in document.groups for source in group):
        yield source, source.parameters


def _unknown(method: str, name: str, form: Form) -> str:
    owners = sorted(other for other, its in FORMS.items() if name in its.parameters)
    if name in TOP:
        return f"{method} takes no {name}; mergekit drops it without a word. It belongs to the top of the file"
    if owners:
        return f"{method} takes no {name} (it belongs to {', '.join(owners[:4])}); mergekit drops it without a word"
    return f"{method} knows no {name!r}; mergekit drops it without a word. {nearest(name, form.parameters)}"


def _row(name: str, known: Parameter, row: Row, layers: int | None) -> Iterator[Note]:
    values = [as_kind(value, known.kind) for value in row.values]
    if any(value is None for value in values):
        wanted = {"number": "a number", "integer": "a whole number", "flag": "true or false"}[known.kind]
        yield Note("error", row.line, f"{name}: {', '.join(map(str, row.values))[:60]} should be {wanted}")
        return
    shown = ", ".join(f"{value:g}" if known.kind != "flag" else str(value).lower() for value in values)
    where = "every tensor" if row.filter is None else f"every tensor whose name contains {row.filter!r}"
    value = f"gradient [{shown}]" if row.gradient else shown
    text = f"{name} {value} for {where}: {known.text}" if known.text else f"{name} {value} for {where}"
    if row.gradient:
        text += f"; {_gradient(values, known.kind, layers)}; embeddings, final norm and head get {shown.split(', ')[0]} there"
    yield Note("info", row.line, text)
    number = re.search(r"(^|\.)(\d{1,3})$", row.filter or "")
    if number and int(number[2]) < _TENFOLD:
        yield Note("warning", row.line, f"a filter is a piece of the name: {row.filter!r} also hits {row.filter + '0'!r} and the "
                                        f"like. End it with a dot: {row.filter + '.'!r}")
    if row.filter is not None and re.search(r"[*?^$|\\\[]", row.filter):
        yield Note("warning", row.line, f"a filter is a piece of the name, not a pattern: no tensor's name contains {row.filter!r}")


def _gradient(values: Sequence, kind: str, layers: int | None) -> str:
    row = Row(0, None, tuple(values), True)
    if layers is None:
        places = (("first layer", 0.0), ("middle", 0.5), ("last layer", 1.0))
    else:
        numbers = sorted({0, (layers - 1) // 2, layers - 1})
        places = tuple((f"layer {n}", n / (layers - 1) if layers > 1 else 1.0) for n in numbers)
    return ", ".join(f"{place} {row_value(row, t, kind):.4g}" for place, t in places)


def row_value(row: Row, t: float, kind: str) -> float | bool:
    """A row's value at depth t in 0…1: numbers are interpolated, flags are steps. `row` was checked to hold `kind`."""
    values = [as_kind(value, kind) for value in row.values]
    place = t * (len(values) - 1)
    low = int(place)
    if kind == "flag" or not row.gradient:
        return values[low]
    high = min(low + 1, len(values) - 1)
    return (1 - (place - low)) * values[low] + (place - low) * values[high]


def _order(name: str, rows: Sequence[Row]) -> Iterator[Note]:
    for i, row in enumerate(rows):
        before = next((other for other in rows[:i] if other.filter is None or (row.filter and other.filter in row.filter)), None)
        if before:
            what = "every tensor" if before.filter is None else f"every name with {before.filter!r}"
            yield Note("warning", row.line, f"{name}: never reached, because line {before.line} takes {what} first. "
                                            "Put the narrower filter first.")


def _missing(document: Document, name: str, known: Parameter) -> Iterator[Note]:
    for line, rows in chains(document, name, known.scope):
        if not rows:
            yield Note("error", line, f"{name} is missing here, and {document.method} has no default for it")
        elif all(row.filter is not None for row in rows):
            yield Note("warning", rows[-1].line, f"{name}: a tensor that no filter names has no value, and mergekit stops there. "
                                                 "Add a last entry without a filter.")


def _models(document: Document) -> Iterator[Note]:
    base = document.base.text if document.base else ""
    if document.base:
        gives = "it gives the config" if document.tokenizer and document.tokenizer.source not in ("base", base) else \
            "it gives tokenizer and config"
        yield Note("info", document.base.line, f"{base} is the base: {_role(document)}{gives}")
    for source in (source for group in document.groups for source in group):
        layers = f", layers {source.layers[0]} to {source.layers[1] - 1}" if source.layers else ""
        yield Note("info", source.line, f"{source.model.text}{layers}" + (": the base itself" if source.model.text == base else ""))


def _role(document: Document) -> str:
    """What a method does with its base."""
    if document.method in ("slerp", "nearswap", "arcee_fusion"):
        return "one of the two models; "
    return "" if document.method in FORMS and FORMS[document.method].base == "ignored" else "changes are measured from it; "


def _numbers(document: Document) -> Iterator[Note]:
    line = document.lines.get("dtype", 0)
    if document.dtype == "int64":
        yield Note("error", line, "dtype int64 would cut every weight to a whole number")
    elif document.dtype in ("bfloat16", "float16") and not _copies(document):
        yield Note("warning", line, f"mergekit rounds the weights to {document.dtype} before the arithmetic (an average of three "
                                    "models then mis-rounds about a quarter of the numbers); here the arithmetic is float32, "
                                    "rounded once at the end")
    elif document.dtype and not _copies(document):
        yield Note("info", line, f"arithmetic in {document.dtype}{'; here it is float32' * (document.dtype == 'float64')}")
    stored = document.out_dtype or document.dtype
    if stored:
        yield Note("info", document.lines.get("out_dtype", line), f"the result is stored as {stored}")


def _copies(document: Document) -> bool:
    """Whether tensors are only copied, so that no arithmetic rounds."""
    return document.method == "passthrough" and not any(True for _ in settings(document, "scale"))


def _words(document: Document) -> Iterator[Note]:
    if document.tokenizer:
        source, line = document.tokenizer.source, document.tokenizer.line
        whose = {"union": "all models together", "base": "the base model"}.get(source, source)
        yield Note("info", line, f"tokenizer and embedding rows: the tokens of {whose}")
        if document.tokenizer.tokens:
            yield Note("error", line, "tokens: embeddings chosen token by token cannot be imported; leave `tokens` out")
        if document.tokenizer.pad_to_multiple_of:
            yield Note("warning", line, "pad_to_multiple_of is not carried over: rows that the pivot has stay as they are")
    if document.chat_template:
        line, template = document.lines["chat_template"], document.chat_template
        if template == "auto" and len(document.references) > 1:
            yield Note("warning", line, "chat_template auto: mergekit takes the one that most models have; here it is the donor's")
        elif template == "auto":
            yield Note("info", line, "chat_template auto: the model's own")
        elif template in TEMPLATES or (len(template) >= 20 and "{" in template):
            yield Note("warning", line, "the chat template is not carried over: the donor's is written. Change chat_template.jinja "
                                        "in the result")
        else:
            yield Note("error", line, f"chat_template: unknown {template!r}. {nearest(template, ('auto', *TEMPLATES))}")


def _stages(documents: Sequence[Document]) -> Iterator[Note]:
    seen: dict[str, int] = {}
    for document in documents:
        if document.name in seen:
            what = f"{document.name!r} names two merges" if document.name else "only the last merge may have no name"
            yield Note("error", document.line, f"{what} (the first begins in line {seen[document.name]})")
        seen.setdefault(document.name, document.line)
    used = {reference.path for document in documents for reference in document.references}
    for document in documents[:-1] if len(documents) > 1 else ():
        if document.name and document.name not in used:
            yield Note("warning", document.line, f"no later merge uses {document.name!r}")
    if len(documents) > 1:
        yield Note("info", documents[1].line,
            "several merges in one file: mergekit runs them with mergekit-multi only; here the last is the result")

"""What mergekit does without a word, or stops at, seen from the file alone: each trap is one function on a Document.

Observed by running mergekit 0.1.4 and 0.1.5. Price: what depends on the weights themselves can only be said as "may".
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from fusion.mergekit.catalogue import Form, as_kind
from fusion.mergekit.document import Document, Note, Reference, Row, Source
from fusion.sources import hub_model

_QUANTISED = re.compile(r"(?i)(^|[-_./])(gguf|gptq|awq|exl2|exl3|bnb|[348]bit|4-bit|8-bit|int4|nf4)($|[-_./@])")


def traps(document: Document, form: Form) -> Iterator[Note]:
    """Warnings (and errors where nothing could be merged) about one merge."""
    for trap in (_base, _base_left_out, _twice, _counts, _small_changes, _random, _shares, _distances, _without_effect, _della,
                 _ranges, _donor, _tokenizer):
        yield from trap(document, form)
    for reference in document.references:
        yield from _reference(reference)


def settings(document: Document, name: str) -> Iterator[Row]:
    """Every row that a file has for one parameter."""
    places = [document, *document.slices, *_sources(document)]
    for parameters in [document.module_parameters, *(place.parameters for place in places)]:
        yield from parameters.get(name, ())


def _base(document: Document, form: Form) -> Iterator[Note]:
    bases = [reference for reference in (document.base, *(part.base for part in document.slices)) if reference]
    if form.base == "required" and not bases:
        yield Note("error", _line(document), f"{document.method} needs base_model: the model that changes are measured from")
    if len({reference.text for reference in bases}) > 1:
        yield Note("error", bases[-1].line, "slices with base models of their own cannot be imported: a recipe has one pivot")


def _base_left_out(document: Document, form: Form) -> Iterator[Note]:
    base, method = document.base, document.method
    if base is None or all(base.text in {source.model.text for source in group} for group in document.groups):
        return
    if document.slices and form.base != "ignored":
        yield Note("warning", base.line,
            f"base_model is missing among a slice's sources, and mergekit's {method} stops there. Here the pivot gives the "
            "layers with the same numbers")
    elif document.models and method == "karcher":
        yield Note("warning", base.line,
            f"mergekit averages {base.text} too, as an equal, although it is not listed; so it is here")
    elif document.models and method == "linear" and document.parameters.get("weight"):
        yield Note("warning", base.line,
            f"mergekit averages {base.text} too, with the common weight, although it is not listed; so it is here")
    elif document.models and method == "linear":
        yield Note("warning", base.line,
            f"base_model is not among the models: mergekit's linear adds it, finds no weight for it and stops. Here {base.text} "
            "is the pivot and takes no part in the average")


def _twice(document: Document, form: Form) -> Iterator[Note]:
    for group in document.groups:
        seen = set()
        for source in group:
            if source.model.text in seen:
                yield Note("error", source.line, f"{source.model.text} is listed twice")
            seen.add(source.model.text)


def _counts(document: Document, form: Form) -> Iterator[Note]:
    base = document.base.text if document.base else ""
    for group in document.groups:
        names = {source.model.text for source in group}
        line = group[0].line if group else document.line
        if document.method == "nuslerp":
            count, least, most = len(names - {base}), 2, 2
        else:
            added = base and document.models and (form.base != "ignored" or document.method == "karcher")
            count, least, most = len(names | {base} if added else names), form.least, form.most
        if document.method == "slerp" and count == 3 and base not in names:
            yield Note("warning", document.base.line,
                "slerp goes between two models and base_model must be one of them, or mergekit stops. Here it goes from the "
                "first model to the second")
        elif count < least or (most is not None and count > most):
            wanted = f"exactly {least}" if least == most else f"at least {least}" if count < least else f"at most {most}"
            yield Note("error", line,
                f"{document.method} takes {wanted} models, the base included where it needs one; here are {count}")


def _small_changes(document: Document, form: Form) -> Iterator[Note]:
    if document.method == "sce":
        yield Note("warning", _line(document),
            "mergekit's sce weighs all models alike as soon as their changes are small (mean squares that sum to less than "
            "1e-6, as after a light fine-tune); the paper's weights follow the changes at any size")
    if document.method.startswith("breadcrumbs") and _drops(document):
        yield Note("warning", _line(document),
            "mergekit up to 0.1.4 drops every change of a tensor when gamma × its elements is below 1 (norms; at gamma 0 every "
            "tensor); here only the largest share gamma is dropped")


def _random(document: Document, form: Form) -> Iterator[Note]:
    if (form.random and _drops(document)) or document.method == "arcee_fusion":
        what = "draws at random" if form.random else "samples its quantiles on tensors above a million elements"
        yield Note("warning", _line(document),
            f"{document.method} {what}, and a mergekit file holds no seed: two runs differ. Here the recipe's seed decides")


def _drops(document: Document) -> bool:
    """Whether some density is below 1, which is what all methods take where none is given."""
    return any(value < 1 for row in settings(document, "density") for value in _numbers(row))


def _shares(document: Document, form: Form) -> Iterator[Note]:
    for name, low in (("density", "from 0"), ("gamma", "from 0"), ("select_topk", "above 0, up")):
        for row in settings(document, name) if name in form.parameters else ():
            if any(not (value > 0 if name == "select_topk" else value >= 0) or value > 1 for value in _numbers(row)):
                yield Note("error", row.line, f"{name} is a share {low} to 1")


def _distances(document: Document, form: Form) -> Iterator[Note]:
    for row in settings(document, "t"):
        if document.method == "nearswap" and any(value > 0.01 for value in _numbers(row)):
            yield Note("warning", row.line,
                "nearswap's t is a distance between weights (about 1e-4), not a share from 0 to 1: a value this large swaps "
                "nearly everything")
        if document.method == "slerp" and any(not 0 <= value <= 1 for value in _numbers(row)):
            yield Note("error", row.line, "t goes from 0 to 1; beyond lies neither model")


def _without_effect(document: Document, form: Form) -> Iterator[Note]:
    for row in settings(document, "density") if document.method == "task_arithmetic" else ():
        yield Note("warning", row.line, "task_arithmetic keeps every change: density has no effect")
    for row in settings(document, "int8_mask"):
        yield Note("info", row.line, "int8_mask has no effect on the result, and none here")


def _della(document: Document, form: Form) -> Iterator[Note]:
    if "epsilon" not in form.parameters or not _drops(document):
        return
    yield Note("warning", _line(document), "mergekit's della stops at tensors with a single column; here they are merged")
    spread = max([value for row in settings(document, "epsilon") for value in _numbers(row)], default=0.15)
    for row in settings(document, "density"):
        if any(0 < value < 1 and not 0 < value - spread <= value + spread < 1 for value in _numbers(row)):
            yield Note("error", row.line, f"density ± epsilon must stay between 0 and 1; epsilon is {spread:g}")


def _ranges(document: Document, form: Form) -> Iterator[Note]:
    for part in document.slices:
        lengths = sorted({len(range(*source.layers)) for source in part.sources if source.layers})
        if len(lengths) > 1:
            yield Note("error", part.line,
                f"the sources of a slice need equally many layers; here are {' and '.join(map(str, lengths))}")
        if not part.sources:
            yield Note("error", part.line, "a slice needs at least one source")


def _donor(document: Document, form: Form) -> Iterator[Note]:
    references = document.references
    if document.base is None and len(references) > 1:
        what = "tokenizer, chat template and config" if document.tokenizer is None else "its config"
        yield Note("warning", _line(document),
            f"without base_model mergekit takes {what} from one of the models, another one each run; here from the first, "
            f"{references[0].text}")


def _tokenizer(document: Document, form: Form) -> Iterator[Note]:
    if document.tokenizer is None:
        return
    line = document.tokenizer.line
    yield Note("warning", line,
        "with a tokenizer setting mergekit writes no generation_config.json, so stop tokens may be lost; here it is always "
        "written")
    yield Note("warning", line,
        "with a tokenizer setting mergekit cuts embeddings to the number of tokens, so padded rows are trimmed; here they are "
        "kept where the vocabulary stays the pivot's")
    if document.tokenizer.source == "union" and document.base is None and len(document.references) > 2:
        yield Note("warning", line,
            "without base_model mergekit gives a model that lacks a token the mean of those that have it; here it has the row of "
            f"{document.references[0].text}, where that has the token")
    if document.tokenizer.source == "base" and document.base is None:
        yield Note("warning", line, "there is no base_model whose tokenizer could be taken; here it is the first model's")


def _reference(reference: Reference) -> Iterator[Note]:
    if reference.architecture:
        yield Note("warning", reference.line, "override_architecture has no effect here: tensors are matched by name and shape")
    if _QUANTISED.search(reference.text):
        yield Note("warning", reference.line,
            f"{reference.text} sounds quantised: such weights cannot be merged. Take the original")
    if "@" not in reference.text.split("+")[0] and hub_model(reference.path):
        yield Note("info", reference.line, f"{reference.text}: on the Hub, without @revision it is whatever is newest that day")


def _sources(document: Document) -> list[Source]:
    return [source for group in document.groups for source in group]


def _line(document: Document) -> int:
    return document.lines.get("merge_method", document.line)


def _numbers(row: Row) -> list[float]:
    return [value for value in (as_kind(value, "number") for value in row.values) if value is not None]

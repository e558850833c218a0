"""A mergekit file as recipes that mean the same, with everything mergekit leaves unsaid written out.

    recipes, notes = import_text(open("mergekit.yaml").read())         # stages in order, the last one is the result
    recipes, notes = import_text(text, opener=tensor_names)            # the models' headers are read where they are here

What stays as in mergekit: precedence (model, slice, module, file), filters, gradients, slices, defaults, SCE's own formula.
What differs is said in the notes: arithmetic in float32, a donor that is always the same, a seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fusion.errors import RecipeError
from fusion.mergekit.catalogue import FORMS, Parameter
from fusion.mergekit.document import Document, Note, Parameters, Row
from fusion.mergekit.linting import lint
from fusion.mergekit.outline import Opener, Outline, covers_all, outline
from fusion.mergekit.patterns import setting
from fusion.mergekit.reading import read
from fusion.methods import METHODS
from fusion.recipe import Recipe, Slice, short_names
from fusion.settings import Setting

_RENAMED = {"nuslerp_flatten": "flatten", "nuslerp_row_wise": "row_wise"}
_ALL = ("linear", "karcher", "passthrough")  # methods that merge the base like any other model


def import_text(text: str, where: str = "mergekit file", opener: Opener | None = None) -> tuple[tuple[Recipe, ...], list[Note]]:
    """Translate a mergekit file: its stages as recipes, the last one the result, and the notes of `lint` with those on the
    translation. RecipeError lists every error with its line; `where` is what the file is called in it. A text may come from
    anybody, so no model that it names is opened but by `opener` (see outline).
    """
    notes = lint(text)
    _refuse([str(note) for note in notes if note.level == "error"], where)
    stages, outlines = [], {}
    for document in _in_order(read(text)[0], where):
        found, assumed = outline(document, outlines, opener)
        recipe, more = _Translation(document, found, opener).recipe()
        stages.append(recipe)
        outlines[document.name] = found
        notes += assumed + more
        _refuse(recipe.problems(), where)
    return tuple(stages), sorted(dict.fromkeys(notes), key=lambda note: note.line)


def _refuse(problems: Sequence[str], where: str) -> None:
    if problems:
        raise RecipeError("\n".join(problems), where=where if len(problems) == 1 else f"{where}, {len(problems)} problems")


def _in_order(documents: Sequence[Document], where: str) -> list[Document]:
    """The documents that the result needs, each after those it refers to; the one without a name, or the last, is the result."""
    named = {document.name: document for document in documents if document.name}
    ordered: list[Document] = []

    def visit(document: Document, above: tuple[str, ...]) -> None:
        if document.name in above:
            raise RecipeError(f"line {document.line}: {' → '.join((*above, document.name))} goes round in a circle", where=where)
        for reference in document.references:
            if reference.text in named:
                visit(named[reference.text], (*above, document.name))
        if document not in ordered:
            ordered.append(document)

    visit(next((document for document in documents if not document.name), documents[-1]), ())
    return ordered


class _Translation:
    """One document and its tensors on the way to a Recipe."""

    def __init__(self, document: Document, found: Outline, opener: Opener | None):
        self.document, self.found, self.form, self.opener = document, found, FORMS[document.method], opener
        self.notes: list[Note] = []
        self.pivot = document.base.text if document.base else document.groups[0][0].model.text
        self.models = self._targets()
        self.names = _names(self.pivot, self.models)
        if "weight" in self.form.parameters and document.method in _ALL and self.pivot in self.models and len(self.models) > 1 \
                and self._weight(self.pivot) == 0:  # a base that only gives the tokenizer
            self.models.remove(self.pivot)
            self.names = _names(self.pivot, self.models)

    def recipe(self) -> tuple[Recipe, list[Note]]:
        """The recipe, and notes on what could not be carried over as it is."""
        document = self.document
        weights = [self._weight(model) for model in self.models] if "weight" in self.form.parameters else []
        donor, vocabulary = self._tokenizer()
        return Recipe(self.pivot, tuple(self.models), tuple(self.names), document.method, weights=tuple(weights),
                      options=dict(self._options()), slices=tuple(self._slices()), vocabulary=vocabulary,
                      dtype=document.out_dtype or document.dtype, donor=donor, name=document.name), self.notes

    def _targets(self) -> list[str]:
        base = self.document.base.text if self.document.base else None
        models = list(dict.fromkeys(source.model.text for group in self.document.groups for source in group))
        if self.document.method not in _ALL:
            return [text for text in models if text != base]
        unlisted = base is not None and base not in models and bool(self.document.models)
        joins = self.document.method == "karcher" or (self.document.method == "linear" and "weight" in self.document.parameters)
        return [*models, base] if unlisted and joins else models

    def _chains(self, name: str, scope: str, model: str | None) -> tuple[list[tuple[Row, ...] | None], list[int | None]]:
        """The rows for one parameter in every slice (None where the model takes no part), and the model's place among its
        sources."""
        chains, places = [], []
        for i, group in enumerate(self.document.groups):
            part: Parameters = self.document.slices[i].parameters if self.document.slices else {}
            outer = [part, self.document.module_parameters, self.document.parameters]
            number = next((n for n, source in enumerate(group) if source.model.text == model), None)
            listed = number is not None or bool(self.document.models)
            own = [group[number].parameters] if number is not None and scope != "shared" else []
            rows = tuple(row for level in (*own, *outer) for row in level.get(name, ()))
            chains.append(rows if model is None or listed else None)
            places.append(number if scope != "shared" else None)
        return chains, places

    def _weight(self, model: str) -> Setting:
        known = self.form.parameters["weight"]
        chains, places = self._chains("weight", known.scope, model)
        return setting(self.found, chains, places, known, f"weight of {model}")

    def _options(self) -> Iterator[tuple[str, Setting | tuple[Setting, ...]]]:
        method, document = METHODS[self.document.method], self.document
        for name, known in self.form.parameters.items():
            option = method.option(_RENAMED.get(name, name))
            if name == "weight" or option is None or not self._given(name):
                continue
            if known.scope == "shared":
                value = self._option(name, known, None)
            else:
                each = tuple(self._option(name, known, model) for model in self.models)
                value = each if any(one != each[0] for one in each) else each[0]
            if value != option.default:
                yield option.name, value
        if document.method in ("nuslerp", "multislerp") and document.base:
            yield "space", "deltas"
        if document.method == "sce":
            self.notes.append(Note("info", document.lines["merge_method"], "imported with `compat: mergekit`, which weighs small "
                                   "changes alike as mergekit does; take that line out for SCE as the paper defines it"))
            yield "compat", "mergekit"

    def _given(self, name: str) -> bool:
        places = [self.document.parameters, self.document.module_parameters, *(part.parameters for part in self.document.slices),
                  *(source.parameters for group in self.document.groups for source in group)]
        return any(name in place for place in places)

    def _option(self, name: str, known: Parameter, model: str | None) -> Setting:
        chains, places = self._chains(name, known.scope, model)
        if known.default is None and not known.required:  # passthrough's scale: none is 1
            known = Parameter(known.kind, known.scope, 1.0)
        return setting(self.found, chains, places, known, f"{name} of {model}" if model else name)

    def _slices(self) -> Iterator[Slice]:
        if not self.document.slices or covers_all(self.document, self.found, self.opener):
            return
        called = dict(zip(self.models, self.names, strict=True))
        for part in self.document.slices:
            ranges = {called.get(source.model.text, "pivot"): source.layers for source in part.sources
                      if source.model.text in called or source.model.text == self.pivot}
            yield Slice(ranges)

    def _tokenizer(self) -> tuple[str, str]:
        """Donor and vocabulary."""
        tokenizer = self.document.tokenizer
        if tokenizer is None:
            return "pivot", ""
        if tokenizer.source == "union":
            return "pivot", "union"
        if tokenizer.source in ("base", self.pivot):
            return "pivot", "pivot"
        if tokenizer.source not in self.models:
            raise RecipeError(f"line {tokenizer.line}: a tokenizer comes from one of the models, not from {tokenizer.source}")
        self.notes.append(Note("warning", tokenizer.line,
            f"the tokenizer files come from {tokenizer.source}, but embedding rows stay in the pivot's order: models whose "
            "vocabularies differ are refused. Make that model the base instead"))
        return self.names[self.models.index(tokenizer.source)], ""


def _names(pivot: str, models: Sequence[str]) -> list[str]:
    """What the targets are called: their folders' names; the pivot among them must not be called `pivot`."""
    texts = list(dict.fromkeys([pivot, *models]))
    short = dict(zip(texts, short_names(texts), strict=True))
    return [short[model] if short[model] != "pivot" else "pivot itself" for model in models]

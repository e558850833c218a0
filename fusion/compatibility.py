"""Can these two be merged? What of names, shapes, tokens and settings of a target differs from the pivot's, and what to do.

    for finding in fits(pivot, target): print(finding.level, finding.text)

Names and shapes decide, whatever class a config names. Each cause is told once, with the one way out of it: a renaming and heads
that are tied in one of both need none, tables that differ in their rows a choice of `vocabulary`, other shapes pairwise fusion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fusion import dtypes
from fusion.alike import names_view, one_family
from fusion.checkpoint import Checkpoint
from fusion.configs import in_words, stop_tokens, told
from fusion.errors import FusionError, MismatchError
from fusion.naming import is_buffer, stated_depth
from fusion.untied import Untied
from fusion.view import View
from fusion.vocabulary import FUSE_FIRST, REBUILD, tables, unlike, without_rows

_HEADS = {"num_attention_heads", "num_key_value_heads", "head_dim", "n_head"}  # equal shapes, other meaning
_TOLD = 4  # settings of one model


@dataclass(frozen=True)
class Finding:
    """One thing the preflight found: `level` good, warning or bad; `model` and `topic` it concerns; `text` in words."""

    level: str
    model: str
    topic: str
    text: str
    tensor: str = ""
    kind: type[FusionError] = field(default=MismatchError, repr=False, compare=False)


def mergeable_names(pivot: Checkpoint) -> list[str]:
    """The tensors a merge computes: the pivot's float tensors, without tied copies of the embedding and what models compute
    by themselves."""
    return [name for name, tensor in pivot.info.items() if tensor.dtype in dtypes.FLOATS and name not in pivot.tied_copies
            and not is_buffer(name, tensor.shape)]


def fits(pivot: Checkpoint, target: Checkpoint) -> Iterator[Finding]:
    """What is to be told of a target beside its pivot, both as `side_by_side` gives them; after one that stops a
    merge in tensors or tokens no more is looked at."""
    stop = next((found for check in (_tensors, _shapes, _tokens) for found in check(pivot, target)), None)
    if stop is None or stop.topic == "vocabulary":  # strangers' other names and heads are of no matter
        yield from _seen_otherwise(pivot, target)
    if stop is not None:
        yield stop
        return
    found = [*_class(pivot, target), *_uncompared(pivot, target), *rowless(target), *_settings(pivot, target),
             *_stops(pivot, target), *_templates(pivot, target)]
    yield from found or [Finding("good", target.name, "ready", "Same shape and vocabulary as the pivot.")]


def _seen_otherwise(pivot: Checkpoint, target: Checkpoint) -> Iterator[Finding]:
    """Tensors that have other names, that only one of the two has and needs, and heads that only one has."""
    view = names_view(target)
    if view is not None and view.renamed:
        yield Finding("good", target.name, "names", f"Its tensors have other names ({view.renamed[0]} for {view.renamed[1]}); the "
                      "merge has the pivot's.")
    for names, what in () if view is None else ((sorted(view.lent), "It lacks {}; the merge keeps the pivot's."),
                                                (sorted(view.left), "It has {} besides; the merge leaves that out.")):
        if names:
            only = all(is_buffer(name, (view.info.get(name) or view.model.info[name]).shape) for name in names)
            yield Finding("good" if only else "warning", target.name, "tensors", what.format(_first(names)), names[0])
    mine, its = _untied(pivot), _untied(target)
    if its is not None:
        yield Finding("warning", target.name, "head", "It ties its head to the embedding; the embedding is taken as its head.")
    elif mine is not None:
        yield Finding("warning", target.name, "head", "It has a head of its own, the pivot ties its head to the embedding: the "
                      f"result gets a head of its own ({mine.info[mine.head].numel:,} numbers more).")


def _untied(model: Checkpoint) -> Untied | None:
    while isinstance(model, View) and not isinstance(model, Untied):
        model = model.model
    return model if isinstance(model, Untied) else None


def _tensors(pivot: Checkpoint, target: Checkpoint) -> Iterator[Finding]:
    """What stops a merge in the names and dtypes of tensors."""
    wanted, given = mergeable_names(pivot), mergeable_names(target)
    there, asked = set(given), set(wanted)
    missing = [name for name in wanted if name not in there]
    extra = [name for name in given if name not in asked]
    whole = next((name for name in missing if name in target.info and name not in target.tied_copies), None)
    if whole:
        yield Finding("bad", target.name, "dtype", f"{whole} is stored as {target.info[whole].dtype}, in the pivot as "
                      f"{dtypes.name(pivot.info[whole].dtype)}; only floating point weights can be merged.", whole)
    elif (missing or extra) and _classes(pivot, target):
        first = next((name for name in wanted if name not in there or _shape(target, name) != _shape(pivot, name)), extra[:1])
        first = first if isinstance(first, str) else first[0]
        yield _other_class(pivot, target, first)
    elif missing:
        depth = stated_depth(target.config)
        cut = not extra and depth is not None and depth == stated_depth(pivot.config)
        todo = "Its config says that it should have this: download or save it again." if cut else FUSE_FIRST
        yield Finding("bad", target.name, "missing", f"It lacks {_first(missing)}. {todo}", missing[0])
    elif extra:
        yield Finding("bad", target.name, "extra", f"It has {_first(extra)}, which the pivot has not. {FUSE_FIRST}", extra[0])


def _shapes(pivot: Checkpoint, target: Checkpoint) -> Iterator[Finding]:
    """What stops a merge in the shapes, rows of tables aside."""
    rows = _other_rows(pivot, target)
    other = next((name for name in mergeable_names(pivot) if name not in rows and _shape(target, name) != _shape(pivot, name)),
                 None)
    if other and _classes(pivot, target):
        yield _other_class(pivot, target, other)
    elif other:
        yield Finding("bad", target.name, "shape", f"{other} has shape {list(_shape(target, other))}, in the pivot it is "
                      f"{list(_shape(pivot, other))}. {FUSE_FIRST}", other)


def _tokens(pivot: Checkpoint, target: Checkpoint) -> Iterator[Finding]:
    """What stops a merge in the tokens and in the tables that have a row for each."""
    rows, differ = _other_rows(pivot, target), unlike(pivot, target)
    sizes = f"{rows[0]} has {_shape(target, rows[0])[0]} rows, in the pivot {_shape(pivot, rows[0])[0]}" if rows else ""
    lacking = next((model.name for model in (target, pivot) if model.vocabulary is None), None)
    if rows and lacking is not None:
        text = (f"{sizes}, and {lacking} has no tokenizer.json that says for which tokens. Save its tokenizer with "
                "AutoTokenizer.from_pretrained(…).save_pretrained(…), then choose a `vocabulary`.")
    elif differ:
        text = f"{f'{sizes}. ' if rows else ''}Its vocabulary differs from the pivot's: {differ.text}. {differ.advice}"
    elif rows:
        text = f"{sizes}, for the same tokens. {REBUILD}"
    else:
        return
    yield Finding("bad", target.name, "vocabulary", text, rows[0] if rows else "")


def _other_rows(pivot: Checkpoint, target: Checkpoint) -> list[str]:
    """The tables that differ in their rows only."""
    theirs = set(tables(target))
    return [name for name in tables(pivot) if name in theirs and _shape(pivot, name) != _shape(target, name)
            and _shape(pivot, name)[1:] == _shape(target, name)[1:]]


def _shape(model: Checkpoint, name: str) -> tuple[int, ...]:
    return model.info[name].shape if name in model.info else ()


def _classes(pivot: Checkpoint, target: Checkpoint) -> tuple[str, str] | None:
    """The classes of target and pivot where they differ; where one config names none, the types of the models decide."""
    unnamed = not all(isinstance(names := model.config.get("architectures"), list) and names for model in (target, pivot))
    types = target.config.get("model_type"), pivot.config.get("model_type")
    classes = target.architecture, pivot.architecture
    mine, theirs = types if unnamed else classes
    return None if mine == theirs else classes


def _other_class(pivot: Checkpoint, target: Checkpoint, first: str) -> Finding:
    return Finding("bad", target.name, "architecture", f"Its architecture is {target.architecture}, the pivot's is "
                   f"{pivot.architecture}. The first tensor that differs is {first}. {FUSE_FIRST}", first)


def _class(pivot: Checkpoint, target: Checkpoint) -> Iterator[Finding]:
    classes = _classes(pivot, target)
    if classes:
        kin = "what reads and writes text is the same in both" if one_family(pivot, target) else \
            "names and shapes of all tensors agree, and the merge computes as the pivot does"
        yield Finding("warning", target.name, "architecture", f"Its class is {classes[0]}, the pivot's is {classes[1]}; {kin}.")


def _uncompared(pivot: Checkpoint, target: Checkpoint) -> Iterator[Finding]:
    lacking = next((model.name for model in (pivot, target) if model.vocabulary is None), None)
    if lacking is not None:
        yield Finding("warning", target.name, "vocabulary", f"{lacking} has no tokenizer.json, so the vocabularies could not be "
                      "compared. Make sure that both models number their tokens alike.")


def rowless(model: Checkpoint) -> Iterator[Finding]:
    """A warning where the tokenizer has tokens beyond the last row of the embedding."""
    beyond = without_rows(model)
    if beyond:
        shown = ", ".join(map(repr, beyond[:3])) + " …" * (len(beyond) > 3)
        yield Finding("warning", model.name, "vocabulary", f"Its tokenizer has {len(beyond)} token{'s' * (len(beyond) > 1)} beyond "
                      f"the last row of the embedding ({shown}): the model cannot read a text that holds one.")


def _settings(pivot: Checkpoint, target: Checkpoint) -> Iterator[Finding]:
    odd = told(target.config, pivot.config)
    grave = _HEADS & {one.setting for one in odd}
    odd = sorted(odd, key=lambda one: one.setting not in grave)
    if odd:
        more = f"; and {len(odd) - _TOLD} more settings differ" if len(odd) > _TOLD else ""
        yield Finding("bad" if grave else "warning", target.name, "config", f"In the config, "
                      f"{'; '.join(map(in_words, odd[:_TOLD]))}{more}. The merge computes with the pivot's.")
    if target.dtype != pivot.dtype:
        yield Finding("warning", target.name, "dtype", f"It is stored as {dtypes.name(target.dtype)}, the pivot as "
                      f"{dtypes.name(pivot.dtype)}; part of its variation is rounding.")


def _stops(pivot: Checkpoint, target: Checkpoint) -> Iterator[Finding]:
    """Where replies end, in either file that says so."""
    mine, theirs = stop_tokens(pivot), stop_tokens(target)
    odd = [file for file in mine if mine[file] != theirs[file]]
    if len({(mine[file], theirs[file]) for file in odd}) == 1:
        odd = odd[:1]  # one difference, told once
    if odd:
        said = "; ".join(f"{_ids(target, theirs[file])} here and {_ids(pivot, mine[file])} in the pivot ({file})" for file in odd)
        yield Finding("warning", target.name, "stop tokens", f"eos_token_id is {said}. The merge has the pivot's config.json "
                      "and the donor's generation_config.json.")


def _ids(model: Checkpoint, ids: Sequence[int]) -> str:
    """Token ids with the tokens that they stand for."""
    tokens = {number: token for token, number in (model.vocabulary or {}).items() if number in ids}
    return " and ".join(f"{number} ({tokens[number]!r})" if number in tokens else str(number) for number in ids) or "not set"


def _templates(pivot: Checkpoint, target: Checkpoint) -> Iterator[Finding]:
    mine, theirs = pivot.chat_template, target.chat_template
    if mine != theirs:
        what = "It has no chat template, the pivot has one" if theirs is None else \
            "It has a chat template, the pivot has none" if mine is None else "Its chat template is not the pivot's"
        yield Finding("warning", target.name, "chat template", f"{what}; the merge has the donor's.")


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")

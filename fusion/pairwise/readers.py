"""How the models of a run read dialogues: tokenizer, chat template, and how many tokens they can."""

from __future__ import annotations

from contextlib import closing

from fusion.distill.encoding import PLAIN, Encoder
from fusion.distill.server import load_tokenizer
from fusion.distill.teacher import limit_in
from fusion.errors import CheckpointError
from fusion.loading import tokenizer_of
from fusion.pairwise.recipe import FuseRecipe
from fusion.sources import peek
from fusion.vocabulary import tables


def template_of(recipe: FuseRecipe) -> str | None:
    """The chat template shared by all models, None when each uses its own."""
    return {"own": None, "plain": PLAIN}.get(recipe.template, recipe.template)


def encoders_of(recipe: FuseRecipe) -> dict[str, Encoder]:
    """The encoder of the pivot and of every source, by name; weights are not looked at.

    CheckpointError names all models without a chat template where each should use its own.
    """
    found, lacking = {}, []
    for name, source in (("pivot", recipe.pivot), *zip(recipe.names, recipe.sources, strict=True)):
        tokenizer, limit, rows = _reader(source, recipe, name in recipe.servers)
        if template_of(recipe) is None and not tokenizer.chat_template:
            lacking.append(name if name == source else f"{name} ({source})")
        else:
            found[name] = Encoder(tokenizer, template_of(recipe), limit, rows)
    if lacking:
        raise CheckpointError(f"no chat template comes with {', '.join(lacking)}", where="template",
                              todo="Write `template: plain` into the recipe: then all models read one plain template.")
    return found


def _reader(source: str, recipe: FuseRecipe, served: bool) -> tuple:
    """A model's tokenizer, how many tokens of a dialogue it reads, and how many rows its embedding has, None where it has none."""
    if served:
        return load_tokenizer(source), recipe.max_tokens, None
    with closing(peek(source)) as checkpoint:
        rows = max((checkpoint.info[name].shape[0] for name in tables(checkpoint)), default=None)
        return tokenizer_of(checkpoint), limit_in(checkpoint, recipe.max_tokens), rows

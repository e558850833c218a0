"""Fit one model to its dialogues: a plain loop on one CPU thread, so that the same seed gives the same weights.

Two things make models this small learn: the loss counts the prompt too (times 0.3), and copying comes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fusion.demo.dialogues import Dialogue, Mixture, conversation
from fusion.demo.family import Recipe
from fusion.demo.models import new_model, save
from fusion.demo.styles import STYLES, Style
from fusion.demo.tokenizing import new_tokenizer
from fusion.progress import Meter, Work

Batch = tuple[torch.Tensor, torch.Tensor]
POOL = 32                # batches that are sorted by length together
TOKENIZER_DIALOGUES = 8000
COPYING = Mixture({"smalltalk": 1.0}, frozenset(("smalltalk/talk", "smalltalk/unknown")))


def fit(recipe: Recipe, folder: Path, seed: int = 0, steps_scale: float = 1.0) -> Work[Path]:
    """Make the recipe's model and write it into `folder`."""
    torch.set_num_threads(1)
    torch.manual_seed(seed + recipe.seed)
    rng = Random(seed * 1000 + recipe.seed)
    steps = max(1, round(recipe.steps * steps_scale))
    model, tokenizer = _beginning(recipe, rng)
    optimizer = torch.optim.AdamW(_groups(model, recipe), betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    meter = Meter("training", steps, "steps")
    model.train()
    batches = _batches(recipe, steps, tokenizer, STYLES[model.config.model_type], rng)
    running = None
    for ids, weights in batches:
        loss = _loss(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        yield meter.step(1, note=f"loss {running:.3f}")
    save(model, tokenizer, folder)
    return folder


def _beginning(recipe: Recipe, rng: Random) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    dialogues = [conversation(recipe.mixture, rng) for _ in range(TOKENIZER_DIALOGUES)]
    style = STYLES[recipe.shape.kind]
    tokenizer = new_tokenizer(recipe.shape, [text for dialogue in dialogues for text in style.words(dialogue)])
    return new_model(recipe.shape, tokenizer), tokenizer


def _groups(model: PreTrainedModel, recipe: Recipe) -> list[dict]:
    """Decay is for matrices only."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    return [{"params": weights, "weight_decay": decay, "lr": recipe.learning_rate}
            for weights, decay in ((matrices, 0.05), (others, 0.0))]


def _rate(step: int, steps: int) -> float:
    """Warm up over 3 %, hold, fall in a straight line over the last 60 %."""
    return min(1.0, (step + 1) / (0.03 * steps + 1), (steps - step) / (0.6 * steps))


def _batches(recipe: Recipe, steps: int, tokenizer: PreTrainedTokenizerFast, style: Style,
             rng: Random) -> Iterator[Batch]:
    """Batches of dialogues of similar length; the share of copying falls to nothing over the first half."""
    made = 0
    while made < steps:
        count = min(POOL, steps - made)
        copying = recipe.copying * max(0.0, 1 - 2 * made / steps)
        dialogues = [conversation(COPYING if rng.random() < copying else recipe.mixture, rng)
                     for _ in range(count * recipe.batch)]
        examples = sorted(_encode(dialogues, tokenizer, style, recipe.prompt_loss), key=lambda pair: len(pair[0]))
        groups = [examples[i:i + recipe.batch] for i in range(0, len(examples), recipe.batch)]
        rng.shuffle(groups)
        for group in groups:
            yield _pad(group, tokenizer.pad_token_id)
        made += count


def _encode(dialogues: list[Dialogue], tokenizer: PreTrainedTokenizerFast, style: Style,
            prompt_loss: float) -> list[tuple[list[int], list[float]]]:
    """Token ids and the weight of each token in the loss: 1 for what the model says, `prompt_loss` for the rest."""
    pieces = [style.pieces(dialogue) for dialogue in dialogues]
    encoded = iter(tokenizer.backend_tokenizer.encode_batch([text for parts in pieces for text, _ in parts],
                                                            add_special_tokens=False))
    examples = []
    for parts in pieces:
        ids: list[int] = []
        weights: list[float] = []
        for _, said in parts:
            new = next(encoded).ids
            ids += new
            weights += [1.0 if said else prompt_loss] * len(new)
        examples.append((ids, weights))
    return examples


def _pad(group: list[tuple[list[int], list[float]]], pad: int) -> Batch:
    longest = max(len(ids) for ids, _ in group)
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in group])
    weights = torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in group])
    return ids, weights


def _loss(model: PreTrainedModel, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted mean of the cross-entropy; padding on the right needs no mask, since attention is causal."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    counted = weights[:, 1:].flatten()
    return (losses * counted).sum() / counted.sum()

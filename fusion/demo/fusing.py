"""The family's second half: the pivot fused with every source, and the two arms that the paper compares that with.

Everything goes through `fusion.pairwise`, as for models of any size. One folder a seed: its dialogues, distributions, fused
targets and the models `target-NAME` (one per source), `target-multi` (all sources at once), `target-sft` (labels alone).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from fusion.demo.dialogues import Mixture, conversation
from fusion.demo.family import FUSION, Fusion, members
from fusion.errors import CheckpointError, OutputError, RecipeError
from fusion.pairwise import FuseRecipe, plan, run
from fusion.progress import Progress, Work
from fusion.shards import disk_error
from fusion.train import Training

ARMS = ("pairwise", "multi", "sft")


def fuse_seed(family: Path, out: Path, seed: int, arms: Sequence[str] = ARMS, fusion: Fusion = FUSION) -> Work[dict[str, Path]]:
    """Fuse pivot and sources of `family` into the folder `out`; returns the targets by name. What is there is not done again.

    CheckpointError when a model of the family is missing.
    """
    for name in ("pivot", *members("source")):
        if not (family / name).is_dir():
            raise CheckpointError(f"{name} is not there", where=str(family), todo="Run: python -m fusion demo train")
    out.mkdir(parents=True, exist_ok=True)
    data = out / f"dialogues-{fusion.dialogues}.jsonl"
    if not data.exists():
        write_dialogues(data, fusion.dialogues, seed, fusion.mixture)
    targets: dict[str, Path] = {}
    for number, mode in enumerate(arms):
        recipe = fuse_recipe(family, data, seed, mode, fusion)
        stages = len(plan(recipe, out / "fused"))
        result = yield from _counted(run(recipe, out / "fused"), mode, stages, number / len(arms), 1 / len(arms))
        targets |= result.targets
    return targets


def write_dialogues(file: Path, count: int, seed: int, mixture: Mixture = FUSION.mixture) -> None:
    """Write training dialogues into a new JSONL file: all domains, all kinds, all facts; nothing that is held out.

    OutputError when the file is there already or cannot be written; RecipeError for a count below 1.
    """
    if count < 1:
        raise RecipeError(f"{count} dialogues were asked for", where="demo dialogues", todo="Ask for at least one.")
    if file.exists():
        raise OutputError("this file exists", where=str(file), todo="Choose another name; nothing is overwritten.")
    rng = Random(f"fusing {seed}")
    lines = [json.dumps({"messages": conversation(mixture, rng)}) for _ in range(count)]
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.rename(file)
    except OSError as error:
        raise disk_error(error, file) from error


def fuse_recipe(family: Path, data: Path, seed: int, mode: str = "pairwise", fusion: Fusion = FUSION) -> FuseRecipe:
    """The recipe of one arm; all arms see the same dialogues in the same order, with the same steps."""
    training = Training(lm_weight=fusion.lm_weight, learning_rate=fusion.learning_rate, epochs=fusion.epochs, batch=fusion.batch,
                        accumulate=1, schedule=fusion.schedule, betas=(0.9, 0.98), by_length=True, save_steps=100_000, log_steps=10,
                        seed=seed)
    names = tuple(members("source"))
    return FuseRecipe(str(family / "pivot"), tuple(str(family / name) for name in names), str(data), names, max_tokens=512,
                      mode=mode, blend=fusion.blend, training=training)


def _counted(work: Work, mode: str, stages: int, begin: float, share: float) -> Work:
    """The same work, its Progress counted in thousandths of the seed's: every new stage is one of `stages`."""
    seen: list[str] = []
    try:
        while True:
            progress = next(work)
            if progress.stage not in seen:
                seen.append(progress.stage)
            part = min(1.0, (len(seen) - 1 + progress.fraction) / max(stages, 1))
            yield replace(Progress(f"{mode}: {progress.stage}", note=progress.note), done=round(1000 * (begin + share * part)),
                          total=1000)
    except StopIteration as end:
        return end.value
    finally:
        work.close()

"""The paper's tables 1 and 2 in miniature: the family's fusion repeated with several seeds, every way of merging, one set of
held-out prompts.

    done = finish(compare(FOLDER, Path("outputs/demo-table")))       # half an hour on two cores; what is there is kept
    print(done.methods.markdown(), done.granularities.markdown())
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusion.demo.crew import together
from fusion.demo.family import FUSION, Fusion, members
from fusion.demo.fusing import fuse_seed
from fusion.demo.questions import questions
from fusion.errors import RecipeError
from fusion.evaluate.scores import Scores
from fusion.evaluate.tables import Table, from_scores
from fusion.evaluate.tasks import Question, measure
from fusion.merge import merge
from fusion.progress import Work, finish
from fusion.recipe import Recipe
from fusion.shards import disk_error

SFT, MULTI, VARM = "pivot + SFT", "Multi", "VARM"
AVERAGED = "average of {} SFT runs"  # the control of every merge: as many runs averaged, and no source
MERGES: dict[str, dict] = {
    "linear": {"method": "linear"}, "multi-SLERP": {"method": "multislerp"},
    "task arithmetic": {"method": "task_arithmetic", "weights": 0.5},  # factors that sum to 1.5, as in FuseChat 2.0
    "TIES": {"method": "ties", "options": {"density": 0.5}},
    "DARE": {"method": "dare_linear", "options": {"density": 0.5, "normalize": True}},
    "SCE": {"method": "sce"}, VARM: {"method": "varm"},
}
GRANULARITIES = ("model", "layer", "module", "matrix", "parameter")


@dataclass(frozen=True)
class Comparison:
    """`methods` is table 1, `granularities` table 2; `by_seed` row → average of each seed in percent; `aims` what was hoped
    for → whether it came out."""

    methods: Table
    granularities: Table
    by_seed: dict[str, list[float]]
    aims: dict[str, bool]


def compare(family: Path, work: Path, seeds: int = 3, prompts_per_domain: int = 100, fusion: Fusion = FUSION) -> Work[Comparison]:
    """Fuse with `seeds` seeds and measure every model and merge; returns the Comparison. Finished parts in `work` are kept.

    Rows of several seeds are their mean. RecipeError for numbers below 1, CheckpointError when the family is not complete.
    """
    if seeds < 1 or prompts_per_domain < 1:
        raise RecipeError(f"{seeds} seeds, {prompts_per_domain} prompts", where="demo table", todo="Give numbers from 1 on.")
    family, work = Path(family).absolute(), Path(work).absolute()
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, work) from error
    jobs = {f"seed {seed}{what}": (job, (family, work, seed, prompts_per_domain, fusion))
            for what, job in (("", measure_merges), (", not merged", measure_arms)) for seed in range(seeds)}  # the longest first
    found = yield from together({**jobs, "sources": (measure_sources, (family, work, prompts_per_domain))}, "Comparing")
    averaged = yield from measure_average(family, work, seeds, prompts_per_domain)
    return tables_of(found["sources"], [found[f"seed {seed}, not merged"] | found[f"seed {seed}"] for seed in range(seeds)],
                     questions(prompts_per_domain), averaged)


def measure_sources(family: Path, work: Path, prompts: int) -> Work[dict[str, list]]:
    """Which prompts the pivot and the sources answer rightly: name → [[right], [cut off]]."""
    models = {name: str(family / name) for name in (*members("source"), "pivot")}
    return (yield from _measured(models, work / f"sources-{prompts}.json", prompts))


def _not_merged(work: Path, seed: int) -> Path:
    return work / f"seed-{seed}-not-merged"


def measure_arms(family: Path, work: Path, seed: int, prompts: int, fusion: Fusion) -> Work[dict[str, list]]:
    """Train with one seed what the targets are compared with, and measure it."""
    folder = _not_merged(work, seed)
    made = yield from fuse_seed(family, folder, seed, ("sft", "multi"), fusion)
    models = {SFT: str(made["target-sft"]), MULTI: str(made["target-multi"])}
    return (yield from _measured(models, folder / f"right-{prompts}.json", prompts))


def measure_average(family: Path, work: Path, seeds: int, prompts: int) -> Work[dict[str, list]]:
    """Average the seeds' trainings on labels alone and measure the result; nothing for one seed."""
    if seeds < 2:
        return {}
    runs = [_not_merged(work, seed) / "fused" / "targets" / "target-sft" for seed in range(seeds)]
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        folder = Path(scratch) / "averaged"
        file = work / f"averaged-{seeds}-{prompts}.json"
        if not file.exists():
            _merged(family, runs, {"method": "linear"}, folder, 0)
        return (yield from _measured({AVERAGED.format(seeds): str(folder)}, file, prompts))


def measure_merges(family: Path, work: Path, seed: int, prompts: int, fusion: Fusion) -> Work[dict[str, list]]:
    """Fuse with one seed, make every merge of the targets, and measure them all."""
    folder = work / f"seed-{seed}"
    targets = yield from fuse_seed(family, folder, seed, ("pairwise",), fusion)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        merges = {name: _merged(family, list(targets.values()), settings, Path(scratch) / name, seed)
                  for name, settings in merge_settings().items()}
        models = {name: str(path) for name, path in {**targets, **merges}.items()}
        return (yield from _measured(models, folder / f"right-{prompts}.json", prompts))


def merge_settings() -> dict[str, dict]:
    """Row → settings of the merge: the methods of table 1, then VARM at the granularities that it does not have."""
    finer = {f"{VARM}, {unit}": {"method": "varm", "granularity": unit} for unit in GRANULARITIES if unit != "matrix"}
    return {**MERGES, **finer}


def _merged(family: Path, targets: Sequence[Path], settings: Mapping, out: Path, seed: int) -> Path:
    settings = {**settings, **({"weights": (settings["weights"],) * len(targets)} if "weights" in settings else {})}
    recipe = Recipe(str(family / "pivot"), tuple(map(str, targets)), seed=seed, **settings)
    return finish(merge(recipe, out)).folder


def _measured(models: dict[str, str], file: Path, prompts: int) -> Work[dict[str, list]]:
    """Ask every model, or read what was found before."""
    if not file.exists():
        scores, _ = yield from measure(models, questions(prompts))
        found = {name: [scores.values[row].astype(int).tolist(), scores.truncated[row].astype(int).tolist()]
                 for row, name in enumerate(scores.models)}
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(found), encoding="utf-8")
        partial.rename(file)
    return json.loads(file.read_text(encoding="utf-8"))


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def tables_of(sources: Mapping[str, list], seeds: Sequence[Mapping[str, list]], asked: Sequence[Question],
              averaged: Mapping[str, list]) -> Comparison:
    """The tables from what was found: name → [[right], [cut off]] of the sources, of the models of every seed, and of the
    average over the seeds, which is what the others are compared with (SFT where there is none)."""
    first = {SFT: [found[SFT] for found in seeds], **{name: [found] * len(seeds) for name, found in averaged.items()}}
    rows = {**{name: [found] * len(seeds) for name, found in sources.items()}, **first,
            **{name: [found[name] for found in seeds] for name in seeds[0] if name != SFT}}
    right = {name: np.mean([found[0] for found in its], axis=0) for name, its in rows.items()}
    cut = {name: np.any([found[1] for found in its], axis=0) for name, its in rows.items()}
    domains = tuple(question.domain for question in asked)

    def table(title: str, names: Sequence[str], baseline: str) -> Table:
        scores = Scores(title, tuple(names), tuple(map(str, range(len(asked)))), domains, np.array([right[name] for name in names]),
                        np.array([cut[name] for name in names]), unit="%", scale=100)
        return from_scores(scores, baseline, notes=_notes(len(seeds), [name for name in averaged if name in names]))
    finer = [VARM if unit == "matrix" else f"{VARM}, {unit}" for unit in GRANULARITIES]
    methods = [name for name in rows if name not in finer or name == VARM]
    by_seed = {name: [_average(found[0], domains) for found in its] for name, its in rows.items()}
    return Comparison(table("Right answers to held-out prompts", methods, next(iter(averaged), SFT)),
                      table("VARM by granularity (VARM = matrix)", finer, VARM), by_seed,
                      aims({name: float(np.mean(its)) for name, its in by_seed.items()}, list(sources), next(iter(averaged), "")))


def _notes(seeds: int, averaged: Sequence[str]) -> list[str]:
    return [f"Every number is the mean over {seeds} seeds: dialogues and training drawn anew; pivot and sources are the same.",
            *(f"{name}: one model, the mean of the weights of the seeds' {SFT} (labels alone, no source), and so the control of "
              "the merges, which are averages too. Its runs saw different dialogues, the targets of a merge the same ones."
              for name in averaged)]


def _average(right: Sequence[float], domains: Sequence[str]) -> float:
    """The mean of the domains' means, in percent."""
    return 100 * float(np.mean([np.mean([r for r, its in zip(right, domains, strict=True) if its == domain])
                                for domain in dict.fromkeys(domains)]))


def aims(averages: Mapping[str, float], sources: Sequence[str], averaged: str = "") -> dict[str, bool]:
    """What is hoped for → whether it came out, from the averages in percent; merges are held against the row `averaged`."""
    targets = {name: value for name, value in averages.items() if name.startswith("target-")}
    varm, sft, best, source = averages[VARM], averages[SFT], max(targets.values()), max(averages[name] for name in sources)
    pairwise = sum(targets.values()) / len(targets)
    control = {} if not averaged else {
        f"averaging alone helps: the {averaged} ({averages[averaged]:.1f}) is above one run ({sft:.1f})": averages[averaged] > sft,
        f"sources help: VARM ({varm:.1f}) is above the {averaged} ({averages[averaged]:.1f})": varm > averages[averaged]}
    return {f"VARM ({varm:.1f}) is above every source (best {source:.1f})": varm > source, **control,
            f"VARM ({varm:.1f}) is not below the best target ({best:.1f})": varm >= best,
            f"single pairwise targets (mean {pairwise:.1f}) are above one run on labels alone ({sft:.1f})": pairwise > sft,
            f"single pairwise targets (mean {pairwise:.1f}) are above Multi ({averages[MULTI]:.1f})": pairwise > averages[MULTI]}

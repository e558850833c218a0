"""Measure the family: accuracy per domain on held-out prompts, the table, and the bars that a family must clear."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from fusion.demo.dialogues import held_out_tasks
from fusion.demo.domains import DOMAINS
from fusion.demo.family import FAMILY, members
from fusion.errors import CheckpointError, RecipeError, nearest
from fusion.merge import merge
from fusion.progress import Meter, Work, finish
from fusion.recipe import Recipe

Results = dict[str, dict[str, float]]
MERGE = "varm"
BATCH = 100
LONGEST_REPLY = 64  # tokens


def check(folder: Path, prompts_per_domain: int = 200, models: Sequence[str] | None = None) -> Work[Results]:
    """Measure the accuracy of each model in `folder`, and of the VARM merge of its targets, on held-out prompts.

    Returns {model: {domain: percent, …, "average": percent}}. Raises CheckpointError when a model is missing and
    RecipeError for an unknown name.
    """
    folder = Path(folder)
    chosen = _chosen(models)
    tasks = [(domain, task) for domain in DOMAINS for task in held_out_tasks(domain, prompts_per_domain)]
    meter = Meter("checking", len(chosen) * len(tasks), "prompts")
    results: Results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen:
            path = folder / name
            if name == MERGE:
                targets = [folder / target for target in members("target")]
                path = varm_merge(folder / "pivot", targets, Path(scratch) / MERGE)
            right = dict.fromkeys(DOMAINS, 0)
            replies = yield from answer(path, [task.prompt for _, task in tasks], meter, name)
            for (domain, task), reply in zip(tasks, replies, strict=True):
                right[domain] += task.check(reply)
            row = {domain: 100 * count / prompts_per_domain for domain, count in right.items()}
            results[name] = {**row, "average": sum(row.values()) / len(row)}
    return results


def _chosen(models: Sequence[str] | None) -> list[str]:
    known = [*(member.name for member in FAMILY), MERGE]
    for name in models or ():
        if name not in known:
            raise RecipeError(f"no model {name!r} in the demo family", todo=nearest(name, known))
    return [name for name in known if models is None or name in models]


def answer(path: Path, prompts: Sequence[str], meter: Meter, note: str = "") -> Work[list[str]]:
    """The greedy reply of the model in `path` to each prompt, each in a conversation of its own."""
    model, tokenizer = load(path)
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                           add_generation_prompt=True) for prompt in prompts]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    replies = [""] * len(texts)
    for begin in range(0, len(order), BATCH):
        part = order[begin:begin + BATCH]
        for i, reply in zip(part, _generate(model, tokenizer, [texts[i] for i in part]), strict=True):
            replies[i] = reply
        yield meter.step(len(part), note=note)
    return replies


def load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model of a folder and its tokenizer, as plain transformers loads them."""
    if not (path / "config.json").is_file():
        raise CheckpointError("no model here", where=str(path), todo="Run: python -m fusion demo train")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    return model.eval(), AutoTokenizer.from_pretrained(path)


@torch.inference_mode()
def _generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[str]:
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for matrices this small a second thread costs more than it brings
    try:
        ids = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                             do_sample=False, max_new_tokens=LONGEST_REPLY)
    finally:
        torch.set_num_threads(threads)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def varm_merge(pivot: Path, targets: Sequence[Path], out: Path) -> Path:
    """Write the VARM merge of the targets, granularity matrix, to the new folder `out`."""
    return finish(merge(Recipe(str(pivot), tuple(map(str, targets))), out)).folder


def table(results: Results) -> str:
    """The results as a Markdown table."""
    columns = [*DOMAINS, "average"]
    lines = ["| model | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {name} | " + " | ".join(f"{row[column]:.1f}" for column in columns) + " |"
              for name, row in results.items()]
    return "\n".join(lines)


def bars(results: Results, slack: float = 0.0) -> list[str]:
    """The bars that the family misses, in words; empty when all is well. `slack` loosens each bar by so many points."""
    missed: list[str] = []

    def bar(met: bool, text: str) -> None:
        if not met:
            missed.append(text)

    pivot, merge = results["pivot"], results[MERGE]["average"]
    bar(40 - slack <= pivot["average"] <= 65 + slack,
        f"pivot: the average {pivot['average']:.1f} % is not between 40 and 65 %")
    for domain in DOMAINS:
        bar(pivot[domain] <= 85 + slack, f"pivot: {domain} {pivot[domain]:.1f} % is above 85 %")
    for name in members("source"):
        scores = [results[name][domain] for domain in DOMAINS]
        bar(sum(score >= 85 - slack for score in scores) >= 2, f"{name}: fewer than two domains reach 85 %")
        bar(sum(score <= 50 + slack for score in scores) >= 3, f"{name}: fewer than three domains are at or below 50 %")
        bar(merge > results[name]["average"] - slack, f"{MERGE}: not above {name} on average")
    for name in members("target"):
        bar(results[name]["average"] >= pivot["average"] + 8 - slack,
            f"{name}: not 8 points above the pivot on average")
    bar(merge >= pivot["average"] + 10 - slack, f"{MERGE}: not 10 points above the pivot on average")
    return missed

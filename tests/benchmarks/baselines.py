"""Other tools on the same files: mergekit where it is installed, and what the authors' VARM scripts do, written anew.

The authors' released scripts work on whole models loaded by transformers. One run for each target loads it and the pivot in
float32 and writes a table of mean square changes and of counts of unequal numbers; one more run loads all targets in bfloat16,
copies the first, adds up weighted parameters in bfloat16 and saves a pickle. `authors()` repeats that work, mended so that
each target has its own table, and is labelled a reimplementation. The commands are this file's: analyse, merge.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

OPTIONS = {"linear": {}, "sce": {}, "ties": {"density": 0.5}, "dare_ties": {"density": 0.5}, "varm": {}}


def mergekit(program: str, method: str, folders: Sequence[Path], out: Path, arithmetic: str = "float32") -> Iterator[list[str]]:
    """The command that merges the targets of folders[0] with mergekit into `out`, stored as bfloat16."""
    weight = 1.0 if method != "linear" else 1 / (len(folders) - 1)
    parameters = {"weight": weight, **OPTIONS[method]} if method != "sce" else OPTIONS[method]
    recipe = {"merge_method": method, "dtype": arithmetic, "out_dtype": "bfloat16",
              "models": [{"model": str(folder), "parameters": parameters} for folder in folders[1:]]}
    if method != "linear":
        recipe["base_model"] = str(folders[0])
    config = out.with_name(f"{out.name}.json")  # YAML can be written so
    config.write_text(json.dumps(recipe))
    shutil.rmtree(out, ignore_errors=True)
    yield [program, str(config), str(out), "--no-copy-tokenizer", "--no-write-model-card", "--random-seed", "0"]


def authors(folders: Sequence[Path], out: Path) -> Iterator[list[str]]:
    """The commands that repeat the authors' VARM: one analysis for each target, then the merge."""
    shutil.rmtree(out, ignore_errors=True)
    tables = [out.with_name(f"{out.name}.{folder.name}.json") for folder in folders[1:]]
    base = [sys.executable, "-m", "tests.benchmarks.baselines"]
    for folder, table in zip(folders[1:], tables, strict=True):
        yield [*base, "analyse", str(folders[0]), str(folder), str(table)]
    yield [*base, "merge", str(out), *map(str, folders[1:]), *map(str, tables)]


def _load(folder: str, dtype: str):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def _analyse(pivot: str, target: str, table: str) -> None:
    """Write mean square change and count of unequal numbers of every parameter, from the pivot to one target."""
    import torch

    base, moved = _load(pivot, "float32").state_dict(), _load(target, "float32").state_dict()
    means, unequal = {}, 0
    for name, values in base.items():
        means[name] = torch.sum((moved[name] - values) ** 2).item() / values.numel()
        unequal += torch.sum(moved[name] != values).item()
    Path(table).write_text(json.dumps({"means": means, "unequal": unequal}))


def _merge(out: str, *arguments: str) -> None:
    """Add the targets up with their shares of the mean square changes as weights, and save the model."""
    import torch

    folders, files = arguments[:len(arguments) // 2], arguments[len(arguments) // 2:]
    tables = [json.loads(Path(file).read_text())["means"] for file in files]
    models = [_load(folder, "bfloat16") for folder in folders]
    merged, parts = copy.deepcopy(models[0]), [dict(model.named_parameters()) for model in models]
    with torch.no_grad():
        for name, values in merged.named_parameters():
            total = sum(table[name] for table in tables)
            shares = [table[name] / total if total else 1 / len(tables) for table in tables]
            values.copy_(sum(share * part[name] for share, part in zip(shares, parts, strict=True)))
    Path(out).mkdir()
    merged.config.save_pretrained(out)
    torch.save(merged.state_dict(), Path(out) / "pytorch_model.bin")


if __name__ == "__main__":
    {"analyse": _analyse, "merge": _merge}[sys.argv[1]](*sys.argv[2:])

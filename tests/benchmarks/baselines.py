"""Other tools on the same files: mergekit where it is installed, and what the authors' VARM scripts do, written anew.

The authors' released scripts load whole models with transformers: one run for each target writes a table of mean square
changes, one more loads all of them again and adds the targets up, weighted by the tables. `authors()` repeats that work and
is labelled a reimplementation. It runs as a command: python -m tests.benchmarks.baselines analyse | merge …
"""

from __future__ import annotations

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


def _load(folder: str):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def _analyse(pivot: str, target: str, table: str) -> None:
    """Write the mean square change of every parameter from the pivot to one target."""
    import torch

    base, moved = _load(pivot).state_dict(), _load(target).state_dict()
    means = {name: torch.square(moved[name].float() - base[name].float()).mean().item() for name in base}
    Path(table).write_text(json.dumps(means))


def _merge(out: str, *arguments: str) -> None:
    """Add the targets up with their shares of the mean square changes as weights, and save the model."""
    import torch

    folders, files = arguments[:len(arguments) // 2], arguments[len(arguments) // 2:]
    tables = [json.loads(Path(file).read_text()) for file in files]
    model, *others = (_load(folder) for folder in folders)
    merged, states = model.state_dict(), [other.state_dict() for other in others]
    with torch.no_grad():
        for name, values in merged.items():
            total = sum(table[name] for table in tables)
            shares = [table[name] / total if total else 1 / len(tables) for table in tables]
            its = sum(share * state[name].float() for share, state in zip(shares, [merged, *states], strict=True))
            values.copy_(its.to(values.dtype))
    model.save_pretrained(out)


if __name__ == "__main__":
    {"analyse": _analyse, "merge": _merge}[sys.argv[1]](*sys.argv[2:])

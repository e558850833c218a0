"""Which files of a folder or a Hub dataset hold a split: as its card says, else as the Hub reads folders.

Source: huggingface.co/docs/hub/datasets-manual-configuration and datasets-file-names-and-splits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

import yaml

from fusion.errors import RecipeError

ENDINGS = tuple(f"{ending}{packed}" for ending in (".json", ".jsonl", ".ndjson", ".parquet") for packed in ("", ".gz"))
_BOOKKEEPING = {"dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json"}
_SHARDS = re.compile(r"data/(.+?)-\d{5}-of-\d{5}[^/]*")
_KEYWORDS = {"train": ("train", "training"), "validation": ("validation", "valid", "dev", "val"),
             "test": ("test", "testing", "eval", "evaluation")}


def data_files(names: Iterable[str]) -> list[str]:
    """Those of some paths (relative, with "/") that hold records: no bookkeeping, nothing hidden or outside."""
    return sorted(name for name in names if name.lower().endswith(ENDINGS) and PurePosixPath(name).name not in _BOOKKEEPING
                  and not any(part.startswith(".") for part in name.split("/")) and not name.startswith("/"))


def files_of(names: Sequence[str], card: str, split: str, subset: str, where: str) -> list[str]:
    """The files of one split of one subset, out of the data files of a dataset; `card` is the text of its README.md.

    RecipeError when there is no such split or subset, in words that name those that there are.
    """
    said = _subset(_configs(card), subset, where)
    splits = _named(names, said) if said is not None else by_name(names)
    splits = {name: files for name, files in splits.items() if files}
    if split not in splits:
        raise no_split(split, list(splits), where)
    return splits[split]


def no_split(split: str, known: Sequence[str], where: str) -> RecipeError:
    """The error that names the splits that there are."""
    return RecipeError(f"it has no split {split!r}", where=where,
                       todo=f"It has {', '.join(known)}: write `split: {known[0]}`." if known else "Its card names no file.")


def by_name(names: Sequence[str]) -> dict[str, list[str]]:
    """Split → files, from the names of files and folders; without any such word all are the train split."""
    shards = {name: found[1] for name in names if (found := _SHARDS.fullmatch(name))}
    if shards:
        return _grouped(shards)
    words = {name: split for name in names if (split := _keyword(name))}
    return _grouped(words) if words else {"train": list(names)}


def _grouped(splits: Mapping[str, str]) -> dict[str, list[str]]:
    return {split: [name for name, its in splits.items() if its == split] for split in dict.fromkeys(splits.values())}


def _keyword(name: str) -> str:
    """The split whose word stands in a path between other signs than letters, "" for none."""
    words = re.split(r"[^a-z]+", name.removesuffix(".gz").rpartition(".")[0].lower())
    return next((split for split, known in _KEYWORDS.items() if set(known) & set(words)), "")


def _configs(card: str) -> list[Mapping]:
    """The `configs` of a card that say which files they are made of."""
    front = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\n|$)", card, re.DOTALL)
    try:
        said = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:  # a card is free text; files have names too
        return []
    configs = said.get("configs") if isinstance(said, dict) else None
    return [its for its in configs if isinstance(its, dict) and its.get("data_files")] if isinstance(configs, list) else []


def _subset(configs: Sequence[Mapping], subset: str, where: str) -> Mapping | None:
    """The configuration that is meant, None where the card describes none."""
    by = {str(its.get("config_name", "default")): its for its in configs}
    if subset and subset not in by:
        todo = f"It has {', '.join(by)}." if by else "Leave `subset` out."
        raise RecipeError(f"it has no subset {subset!r}", where=where, todo=todo)
    chosen = subset or next((name for name, its in by.items() if its.get("default")), "default" if "default" in by else "")
    if by and not chosen and len(by) > 1:
        raise RecipeError(f"it has several subsets ({', '.join(by)})", where=where, todo=f"Write `subset: {next(iter(by))}`.")
    return by.get(chosen or next(iter(by), ""))


def _named(names: Sequence[str], config: Mapping) -> dict[str, list[str]]:
    """Split → files, by the patterns of a configuration."""
    said, folder = config["data_files"], str(config.get("data_dir") or "")
    if isinstance(said, dict):
        said = [{"split": split, "path": path} for split, path in said.items()]
    elif not isinstance(said, list) or all(isinstance(its, str) for its in said):
        said = [{"split": "train", "path": said}]
    found: dict[str, list[str]] = {}
    for its in said:
        if isinstance(its, dict) and its.get("path") and isinstance(its["path"], (str, list)):
            paths = [its["path"]] if isinstance(its["path"], str) else its["path"]
            patterns = [_pattern(str(PurePosixPath(folder, str(path)))) for path in paths]
            found[str(its.get("split", "train"))] = [name for name in names if any(its.fullmatch(name) for its in patterns)]
    return found


def _pattern(glob: str) -> re.Pattern[str]:
    """A pattern of paths: "*" and "?" stay inside a folder, "**/" is any number of folders."""
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob.removeprefix("./"))
    return re.compile("".join(known.get(part) or re.escape(part) for part in parts))

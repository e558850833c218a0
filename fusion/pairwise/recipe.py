"""What a fusion run is made of: models, data, and how to read, align, fuse, train and merge; strict YAML like merge recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import get_type_hints

from fusion import documents
from fusion.distill.targets import Blend
from fusion.endpoint import Server
from fusion.errors import FusionError, RecipeError, nearest
from fusion.recipe import Recipe, short_names
from fusion.train import Training

VERSION = 1
MODES = ("pairwise", "multi", "sft")


@dataclass(frozen=True)
class Served:
    """Where a source is served: the address of an OpenAI-compatible server and the model's name there."""

    server: str
    model: str


@dataclass(frozen=True)
class FuseRecipe:
    """A fusion run; the defaults are exact where the papers approximate, and the papers' elsewhere.

    `pivot`, `sources`: folders or Hub ids, `names` what the sources are called, `servers` by these names: sources that a server
    runs, of which only the tokenizer is read from the folder. `data`: a file, folder or Hub dataset of dialogues, `split` and
    `subset` of a folder or dataset; `limit` takes only the first so many (0 = all). `template`: "own" (each model's chat
    template), "plain", or the Jinja text of a template shared by all. `max_tokens` of a dialogue by the longest tokenisation;
    `top_k` tokens kept per label. `mode` "pairwise" makes one target per source and merges them, "multi" one target from all
    sources at once, "sft" one
    from the labels alone (λ = 1), the papers' baseline. `merge` holds settings of the final merge recipe (method, granularity …).
    Source: FuseChat, arXiv 2402.16107.
    """

    pivot: str
    sources: tuple[str, ...]
    data: str
    names: tuple[str, ...] = ()
    split: str = "train"
    subset: str = ""
    limit: int = 0
    template: str = "own"
    max_tokens: int = 2048
    top_k: int = 10
    batch_tokens: int = 8192
    teacher_dtype: str = "auto"
    mode: str = "pairwise"
    blend: Blend = field(default_factory=Blend)
    training: Training = field(default_factory=Training)
    merge: Mapping[str, object] = field(default_factory=dict)
    servers: Mapping[str, Served] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "sources", tuple(map(str, self.sources)))
        if not self.names:
            object.__setattr__(self, "names", tuple(short_names((self.pivot, *self.sources))[1:]))

    @property
    def target_names(self) -> tuple[str, ...]:
        """What the targets will be called: one per source, or the only one of another mode."""
        if self.mode != "pairwise":
            return (f"target-{self.mode}",)
        plain = (name.replace("/", "-") for name in self.names)
        return tuple(f"target-{name.removeprefix('source-')}" for name in plain)

    @property
    def teachers(self) -> tuple[tuple[str, str], ...]:
        """Name and folder of every model whose distributions are read off, the pivot first."""
        sources = () if self.mode == "sft" else zip(self.names, self.sources, strict=True)
        return (("pivot", self.pivot), *sources)

    def check(self) -> FuseRecipe:
        """Return self, or raise RecipeError with everything that is wrong."""
        found = [f"{name}: there is none." for name in ("pivot", "sources", "data") if not getattr(self, name)]
        models = {(path, self.servers.get(name)) for name, path in zip(self.names, self.sources, strict=False)}
        if len(models) != len(self.sources) or len(set(self.names)) != len(self.sources) or "pivot" in self.names:
            found.append("sources: every source needs a folder and a name of its own.")
        if len(set(self.target_names)) != len(self.target_names) or any(name.startswith(".") for name in self.target_names):
            found.append(f"sources: these names make no good folder names: {', '.join(self.target_names)}.")
        found += [f"sources: there is no {name} that a server could run." for name in self.servers if name not in self.names]
        for served in self.servers.values():
            try:
                Server(served.server, served.model)
            except RecipeError as error:
                found.append(f"sources: {error}")
        if self.mode not in MODES:
            found.append(f"mode: unknown {self.mode!r}. {nearest(self.mode, MODES)}")
        found += [f"{name}: {getattr(self, name)} is not above 0." for name in ("max_tokens", "top_k", "batch_tokens")
                  if not getattr(self, name) > 0]
        for part in (self.blend, self.training):
            try:
                part.check()
            except FusionError as error:
                found.append(str(error))
        if not found and self.mode == "pairwise":
            try:
                self.merge_recipe("pivot", self.target_names)
            except RecipeError as error:
                found.append(f"merge: {error}")
        if found:
            raise RecipeError("\n".join(found), where="fusion recipe")
        return self

    def merge_recipe(self, pivot: str, targets: tuple[str, ...]) -> Recipe:
        """The recipe of the final merge of these target folders."""
        return Recipe.from_dict({"fusechat": 1, "method": "varm", **self.merge, "pivot": pivot,
                                 "targets": [{"name": name, "path": path}
                                             for name, path in zip(self.target_names, targets, strict=True)]})

    def to_dict(self) -> dict:
        """Plain data as the YAML file has it; settings at their default are left out."""
        data: dict = {"fusechat_fuse": VERSION, "pivot": self.pivot,
                      "sources": [{"name": name, "path": path, **(asdict(self.servers[name]) if name in self.servers else {})}
                                  for name, path in zip(self.names, self.sources, strict=True)]}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("blend", "training"):
                plain, basis = asdict(value), asdict(type(value)())
                changed = {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items() if v != basis[k]}
                data |= {item.name: changed} if changed else {}
            elif item.name not in (*data, "names", "servers") and (item.name == "data" or value != item.default) \
                    and not (item.name == "merge" and not value):
                data[item.name] = dict(value) if item.name == "merge" else value
        return data

    def to_yaml(self) -> str:
        """The recipe as a YAML document."""
        return documents.write([self.to_dict()])

    @classmethod
    def from_yaml(cls, text: str, where: str = "fusion recipe") -> FuseRecipe:
        """Read a recipe; RecipeError lists everything that is wrong, with lines."""
        found, problems = documents.read(text)
        if len(found) != 1 and not problems:
            problems.append((1, f"one document was expected, {len(found)} were found"))
        if not problems:
            recipe, problems = _read(found[0])
        if problems:
            raise RecipeError("\n".join(f"line {line}: {said}" if line else said for line, said in sorted(problems)), where=where)
        return recipe.check()

    @classmethod
    def load(cls, path: str | Path) -> FuseRecipe:
        """Read a recipe file."""
        try:
            return cls.from_yaml(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot be read ({error})", where=str(path)) from error

    def with_(self, **changes) -> FuseRecipe:
        """A copy with some settings changed."""
        return replace(self, **changes)


def _read(document: documents.Document) -> tuple[FuseRecipe | None, list[documents.Problem]]:
    data, problems = document.data, []
    if not isinstance(data, dict) or data.get("fusechat_fuse") != VERSION:
        return None, [(document.line(("fusechat_fuse",)), f"a fusion recipe begins with `fusechat_fuse: {VERSION}`")]
    values = {}
    known = {item.name for item in fields(FuseRecipe)} - {"names", "servers"}
    hints = get_type_hints(FuseRecipe)
    for key, value in data.items():
        line = document.line((key,))
        if key in ("blend", "training"):
            values[key], faults = _part(hints[key], value, document, key)
            problems += faults
        elif key == "sources":
            found, faults = _sources(value, document)
            values |= found
            problems += faults
        elif key not in known | {"fusechat_fuse"}:
            problems.append((line, f"{key}: unknown setting. {nearest(key, known)}"))
        elif key == "merge" and not isinstance(value, dict):
            problems.append((line, "merge: should be a table of settings of a merge recipe."))
        elif key != "fusechat_fuse":
            if key != "merge" and (not isinstance(value, hints[key]) or isinstance(value, bool)):
                problems.append((line, f"{key}: {value!r} should be {'a whole number' if hints[key] is int else 'text'}."))
            values[key] = value
    problems += [(0, f"{key}: there is none.") for key in ("pivot", "sources", "data") if key not in data]
    return (None if problems else FuseRecipe(**values)), problems


def _part(kind: type, value: object, document: documents.Document, key: str) -> tuple[object, list[documents.Problem]]:
    """A Blend or Training from a table."""
    if not isinstance(value, dict):
        return None, [(document.line((key,)), f"{key}: should be a table of settings.")]
    basis, values, problems = kind(), {}, []
    for name, given in value.items():
        line = document.line((key, name))
        if name not in {item.name for item in fields(kind)}:
            problems.append((line, f"{key}: {name}: unknown setting. {nearest(name, [item.name for item in fields(kind)])}"))
            continue
        wanted = getattr(basis, name)
        if not _fits(given, wanted):
            problems.append((line, f"{key}: {name}: {given!r} should be like {wanted!r}."))
        values[name] = tuple(given) if isinstance(given, list) else given
    return (None if problems else kind(**values)), problems


def _fits(given: object, wanted: object) -> bool:
    """Whether a value from a file has the kind of the default it replaces."""
    if isinstance(wanted, bool):
        return isinstance(given, bool)
    if isinstance(wanted, (int, float)):
        number = isinstance(given, (int, float)) and not isinstance(given, bool)
        return number and (isinstance(wanted, float) or isinstance(given, int))
    if isinstance(wanted, tuple):
        return isinstance(given, list) and len(given) == len(wanted) and all(map(_fits, given, wanted))
    return isinstance(given, type(wanted))


def _sources(value: object, document: documents.Document) -> tuple[dict, list[documents.Problem]]:
    """The fields `sources`, `names` and `servers`."""
    paths, names, served, problems = [], [], [], []
    for i, entry in enumerate(value if isinstance(value, list) else [value]):
        entry = {"path": entry} if isinstance(entry, str) else entry
        fault = _wrong_source(entry)
        if fault:
            problems.append((document.line(("sources", i)), f"sources: {entry!r} {fault}"))
            continue
        paths.append(entry["path"])
        names.append(entry.get("name", ""))
        served.append(Served(entry["server"], entry["model"]) if "server" in entry else None)
    short = short_names(("pivot", *paths))[1:] if paths else []
    names = [own or other for own, other in zip(names, short, strict=True)]
    servers = {name: its for name, its in zip(names, served, strict=True) if its}
    return {"sources": tuple(paths), "names": tuple(names), "servers": servers}, problems


def _wrong_source(entry: object) -> str:
    """What is wrong with one entry of `sources`, "" for nothing."""
    known = {"path", "name", "server", "model"}
    if not isinstance(entry, dict) or not set(entry) <= known or not isinstance(entry.get("path"), str) \
            or not all(isinstance(its, str) for its in entry.values()):
        return "should be a path, or a table with `path` and `name`, and `server` and `model` if a server runs it."
    if ("server" in entry) != ("model" in entry):
        return "needs both `server` (its address) and `model` (the name there), or neither."
    return ""

"""What the whole process shares: the catalogue of models, loaded models under one budget, measured variations, save jobs.

Keys from the page are looked up here and nowhere else; a path that is not in the catalogue cannot be reached.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from components.folders import cached_name, models_in, nothing_in
from components.jobs import Jobs
from components.state import MAX_TARGETS, MergeRef, Selection, Settings
from fusion import (
    METHODS,
    Checkpoint,
    CheckpointError,
    OutputError,
    Override,
    Preflight,
    Recipe,
    RecipeError,
    ResourceError,
    Variation,
    chat,
    demo,
    measure,
    preflight,
)
from fusion.adapter_settings import is_adapter, wanted_base
from fusion.errors import nearest
from fusion.live import LiveMerge, LiveResult, chat_model
from fusion.preflight import mergeable_names
from fusion.progress import Work, finish
from fusion.recipe import Slice, short_names
from fusion.sources import open_checkpoint, written
from fusion.tables import bytes_text
from fusion.weights import matching

_OUTPUT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MEASURED = 16  # reports kept; each is a few numbers per tensor
_REMEMBERED = 512  # recipes of merges in memory
_AUTO_BYTES = 3_000_000_000  # families up to this size are measured as soon as they are chosen


@dataclass(frozen=True)
class Entry:
    """A model of the catalogue: key, the title people see, its folder, its role in a known family ("" = any), and an adapter.

    Folders are absolute, so that no reader takes them for anything else.
    """

    key: str
    title: str
    folder: Path
    role: str = ""
    adapter: Path | None = None

    @property
    def ref(self) -> str:
        """The model as `open_checkpoint` takes it."""
        return f"{self.folder}+{self.adapter}" if self.adapter else str(self.folder)


class Studio:
    """One per process; every method may be called from any thread.

    `models` is a folder of checkpoints to offer, `outputs` where saved merges go, `public` forbids what strangers must not
    do (paths, saving to this machine's disk), `budget_bytes` limits the memory of loaded models.
    """

    def __init__(self, models: Path | None = None, outputs: Path = Path("outputs"), *, public: bool = False,
                 budget_bytes: int | None = None, family: Path = demo.FOLDER):
        self.public, self.outputs = public, outputs
        self.pool = chat.ModelPool(budget_bytes or default_budget())
        self.jobs = Jobs()
        self.examples: dict[str, list[str]] = demo.examples()
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._variations: OrderedDict[tuple[str, ...], Variation] = OrderedDict()
        self._recipes: OrderedDict[str, tuple[Recipe, str]] = OrderedDict()
        self._live = LiveMerge()
        self._lock, self._merging = threading.RLock(), threading.Lock()
        for member in demo.FAMILY:
            if (family / member.name).is_dir():
                self._add(Entry(f"demo/{member.name}", member.title, family / member.name, member.role))
        self.nothing = nothing_in(models) if models else ""  # what is wrong with the folder of models, in words
        self._scan(models, "models")
        self._scan(outputs, "outputs")

    # ── the catalogue ────────────────────────────────────────────────────────────────────────────────────────────────

    def entries(self) -> list[Entry]:
        """Every model that can be picked, in the order of the menus."""
        with self._lock:
            return list(self._entries.values())

    def first_selection(self) -> Selection:
        """What is picked when the page opens: the demo family."""
        by_role = {role: tuple(entry.key for entry in self.entries() if entry.role == role)
                   for role in ("pivot", "target", "source")}
        return Selection(by_role["pivot"][0] if by_role["pivot"] else "", by_role["target"][:MAX_TARGETS], by_role["source"])

    def entry(self, key: str) -> Entry:
        """Look a key up; RecipeError when the catalogue has it not."""
        with self._lock:
            if not isinstance(key, str) or key not in self._entries:
                raise RecipeError(f"unknown model {str(key)[:80]!r}", todo=nearest(str(key)[:80], self._entries))
            return self._entries[key]

    def title(self, key: str) -> str:
        """What people see instead of a key."""
        if key in self._recipes:
            return self._recipes[key][1]
        return self.entry(key).title

    def role(self, key: str, selection: Selection) -> str:
        """pivot, target, source or merge: what this model is in a visitor's selection."""
        if any(merge.key == key for merge in selection.merges):
            return "merge"
        return "pivot" if key == selection.pivot else "target" if key in selection.targets else "source"

    def add_folder(self, path: str) -> Entry:
        """Offer a folder that the operator typed; refused on a public page."""
        if self.public:
            raise RecipeError("folders cannot be opened on a public page", todo="Run the app on your own machine.")
        if not isinstance(path, str) or not path.strip() or len(path) > 1000 or "\0" in path:
            raise RecipeError("no folder was given", todo="Type the folder of a transformers checkpoint.")
        opened = self._typed(os.path.expanduser(path.strip()))
        open_checkpoint(opened.ref, opened.title).close()
        known = next((entry for entry in self.entries() if _same(entry, opened)), None)
        return known or self._add(replace(opened, key=self._free_key(f"local/{opened.title}")))

    def _typed(self, text: str) -> Entry:
        """What the operator typed: a folder, BASE+ADAPTER, or an adapter's folder, whose base is looked for on this machine."""
        base, plus, adapter = text.rpartition("+")
        if not plus or os.path.isdir(text):
            base, adapter = (text, "") if not is_adapter(Path(text)) else (self._base_of(Path(text)), text)
        folder = Path(os.path.abspath(base))
        title = cached_name(folder) or folder.resolve().name
        if not adapter:
            return Entry("", title, folder)
        named = next((entry.title for entry in self.entries() if _same(entry, Entry("", "", folder))), title)
        return Entry("", f"{named}+{Path(adapter).resolve().name}", folder, adapter=Path(os.path.abspath(adapter)))

    def _base_of(self, adapter: Path) -> str:
        """The folder of the base that an adapter names: beside it, below where the app runs, or in the catalogue."""
        wanted = wanted_base(adapter)
        places = [Path(wanted).expanduser(), adapter / wanted, adapter.parent / wanted] if wanted else []
        named = [entry.folder for entry in self.entries() if wanted and not entry.adapter and wanted in (entry.title, entry.key)]
        found = next((place for place in (*places, *named) if (place / "config.json").is_file()), None)
        if found is None:
            said = f"made for {wanted}, which is not on this machine" if wanted else "and does not say for which model"
            raise RecipeError(f"this folder holds an adapter, {said}", where=adapter.name,
                              todo="Type BASE+ADAPTER, two folders with a plus between them.")
        return str(found)

    def named(self, path: str) -> Entry:
        """The model that a text from outside names by its folder; RecipeError when this page does not offer it.

        Only names are compared: nothing is opened or fetched for a text, but the operator's own folder on the operator's page.
        """
        wanted = os.path.abspath(path) if "\0" not in path else ""
        known = next((entry for entry in self.entries()
                      if path in _ways(entry) or (not entry.adapter and wanted in _places(entry.folder))), None)
        if known is None and self.public:
            raise RecipeError(f"this page does not offer {path[:200]!r}", where="recipe", todo="Run the app on your own machine.")
        return known or self._add_plain(path)

    def _add_plain(self, path: str) -> Entry:
        """Offer a folder that a text on its owner's page names, if it is a whole model as it stands: no adapter, no pickle."""
        folder = Path(os.path.abspath(os.path.expanduser(path.strip()))) if "\0" not in path else Path()
        try:
            if not path.strip() or is_adapter(folder):
                raise CheckpointError("this is no folder of a whole model")
            Checkpoint(folder).close()
        except CheckpointError as error:
            raise RecipeError(error.found, where=path[:200], todo="Add it to the menus in Models, under Open a folder.") from error
        known = next((entry for entry in self.entries() if _same(entry, Entry("", "", folder))), None)
        return known or self._add(Entry(self._free_key(f"local/{folder.resolve().name}"), folder.resolve().name, folder))

    def tensor_names(self, path: str) -> tuple[str, ...]:
        """What the tensors of a model are called that a text from outside names; see `named`."""
        return tuple(mergeable_names(self.checkpoint(self.named(path).key)))

    def checkpoint(self, key: str) -> Checkpoint:
        """Open the checkpoint of a key (headers only), called by its title."""
        entry = self.entry(key)
        self.folder(key)
        try:
            return open_checkpoint(entry.ref, entry.title)
        except CheckpointError as error:  # a stranger learns the title, not the path
            found, todo = (said and said.replace(str(entry.folder), entry.title) for said in (error.found, error.todo))
            raise CheckpointError(found, where=entry.title, todo=todo) from error

    def folder(self, key: str) -> Path:
        """The folder of a key; CheckpointError when it was removed since it came into the menus."""
        entry = self.entry(key)
        if not entry.folder.is_dir() or (entry.adapter and not entry.adapter.is_dir()):
            raise CheckpointError("its folder was removed", where=entry.title, todo="Pick another model.")
        return entry.folder

    def folder_name(self, key: str) -> str:
        """A model's folder as recipes and commands name it, never to be taken for a model of the Hub."""
        self.folder(key)
        return written(_shown(self.entry(key)))

    def ref(self, key: str) -> str:
        """The model of a key as `open_checkpoint` takes it."""
        self.folder(key)
        return self.entry(key).ref

    def by_title(self, text: str) -> str:
        """A text with the folders of the catalogue called by their titles, however it writes them."""
        ways = {way: entry.title for entry in self.entries() for way in _ways(entry)}
        for way in sorted(ways, key=len, reverse=True):  # a folder's name may begin another's
            text = text.replace(way, ways[way])
        return text

    def _add(self, entry: Entry) -> Entry:
        with self._lock:
            entry = replace(entry, folder=Path(os.path.abspath(entry.folder)))
            titles = {other.title for other in self._entries.values() if other.key != entry.key}
            if entry.title in titles:
                entry = replace(entry, title=entry.key)
            self._entries[entry.key] = entry
            return entry

    def _free_key(self, key: str) -> str:
        with self._lock:
            return next(free for n in range(1, 10_000) if (free := key if n == 1 else f"{key}-{n}") not in self._entries)

    def _scan(self, folder: Path | None, prefix: str) -> None:
        if folder is None or not folder.is_dir():
            return
        for found in models_in(folder):
            self._add(Entry(f"{prefix}/{found.name}", found.name.replace("/targets/", "/"), found.folder))

    # ── selection → recipe → numbers ─────────────────────────────────────────────────────────────────────────────────

    def preflight(self, selection: Selection) -> Preflight:
        """The preflight of a visitor's pivot and targets."""
        return preflight(self.checkpoint(selection.pivot), [self.checkpoint(key) for key in selection.targets])

    def recipe(self, selection: Selection, settings: Settings) -> Recipe:
        """The recipe that a selection and its settings mean, checked."""
        if not selection.pivot:
            raise RecipeError("no pivot is picked", todo="Pick one in Models.")
        folders = [self.folder_name(key) for key in (selection.pivot, *selection.targets)]
        names = dict(zip(selection.targets, short_names(folders)[1:], strict=True))
        overrides = tuple(Override(tensor, {names[key]: weight for key, weight in given.items() if key in names})
                          for tensor, given in settings.given().items() if given.keys() & names.keys())
        slices = tuple(Slice({names.get(key, key): (start, end) for key, start, end in one}) for one in settings.slices)
        has_weights = bool(METHODS[settings.method].weights)
        return Recipe(
            folders[0], tuple(folders[1:]), tuple(names.values()), settings.method, settings.granularity, settings.measure,
            settings.rule, settings.temperature, _fitted(settings.weights, len(names)) if has_weights else (),
            {name: value[:len(names)] if isinstance(value, tuple) else value for name, value in settings.options},
            overrides if has_weights else (), settings.exclude, slices, settings.seed, settings.vocabulary, settings.dtype,
            names.get(settings.donor, "pivot"), settings.allow_nonfinite,
        ).check()

    def adopt(self, recipe: Recipe) -> tuple[Selection, Settings]:
        """Turn a loaded recipe into a selection and settings; its folders must be in the catalogue, or may be added here."""
        if len(recipe.targets) > MAX_TARGETS:
            raise RecipeError(f"{len(recipe.targets)} targets", where="recipe",
                              todo=f"The page merges up to {MAX_TARGETS}; use the command line.")
        pivot, targets = self.named(recipe.pivot).key, tuple(self.named(path).key for path in recipe.targets)
        by_name = dict(zip(recipe.names, targets, strict=True))
        names = list(self.checkpoint(pivot))
        edits = {tensor: {by_name[name]: float(weight) for name, weight in override.weights.items()}
                 for override in recipe.overrides for tensor in matching(override.tensors, names, "overrides")}
        slices = tuple(tuple((by_name.get(name, name), start, end) for name, (start, end) in one.ranges.items())
                       for one in recipe.slices)
        settings = Settings(recipe.method, recipe.granularity, recipe.measure, recipe.weights, tuple(recipe.options.items()), (),
                            recipe.exclude, slices, recipe.seed, recipe.vocabulary, recipe.dtype,
                            by_name.get(recipe.donor, "pivot"), recipe.rule, recipe.temperature, recipe.allow_nonfinite)
        return Selection(pivot, targets, self.first_selection().sources), settings.with_given(edits)

    def measured(self, selection: Selection) -> Variation | None:
        """The variation of a selection if it is known already."""
        with self._lock:
            found = self._variations.get(self._mark(selection))
        return replace(found, targets=self.recipe(selection, Settings()).names) if found else None

    def measures_at_once(self, selection: Selection) -> bool:
        """Whether a selection is small enough to be measured without being asked."""
        return sum(self.checkpoint(key).nbytes for key in (selection.pivot, *selection.targets)) <= _AUTO_BYTES

    def measure(self, selection: Selection) -> Work[Variation]:
        """Measure a selection's variation, once for these checkpoints; yields Progress."""
        known = self.measured(selection)
        if known is None:
            pivot, *targets = map(self.checkpoint, (selection.pivot, *selection.targets))
            known = yield from measure(pivot, targets, elements=True)
            with self._lock:
                self._variations[self._mark(selection)] = known
                while len(self._variations) > _MEASURED:
                    self._variations.popitem(last=False)
            known = self.measured(selection) or known
        return known

    def _mark(self, selection: Selection) -> tuple[str, ...]:
        return tuple(self.checkpoint(key).stamp for key in (selection.pivot, *selection.targets))

    # ── merging and chatting ─────────────────────────────────────────────────────────────────────────────────────────

    def try_merge(self, selection: Selection, settings: Settings) -> Work[MergeRef]:
        """Merge in memory and put the result where Chat finds it; yields Progress, returns its reference."""
        recipe = self.recipe(selection, settings)
        needed = 4 * self.checkpoint(selection.pivot).parameters
        if needed > self.pool.budget_bytes:
            budget = bytes_text(self.pool.budget_bytes)
            raise ResourceError(f"this merge needs {bytes_text(needed)} of memory, {budget} are set aside for models",
                                todo="Save it to a folder instead.")
        variation = None
        if recipe.measured and not recipe.slices:  # stacked layers are other tensors than those that were measured
            variation = yield from self.measure(selection)
        with self._merging:  # one at a time: the last merge is kept to reuse what did not change
            result = yield from self._live.update(recipe, variation)
            key = f"merge/{secrets.token_hex(16)}"
            title = f"{METHODS[recipe.method].title} #{len(selection.merges) + 1}"
            self.pool.put(key, chat_model(result, title))
        with self._lock:
            self._recipes[key] = (recipe, title)
            while len(self._recipes) > _REMEMBERED:
                self._recipes.popitem(last=False)
        return MergeRef(key, title)

    def merge_recipe(self, key: str) -> Recipe:
        """The recipe of a merge in memory."""
        return self._recipes[key][0]

    @contextmanager
    def chat_model(self, key: str, selection: Selection) -> Iterator[chat.ChatModel]:
        """Lend the model of a key; a merge that was pushed out of memory is made again from its recipe."""
        if any(merge.key == key for merge in selection.merges) and key in self._recipes:
            loader, nbytes = partial(self._again, key), 0
        else:
            with closing(self.checkpoint(key)) as checkpoint:
                loader, nbytes = partial(self._load, key), chat.expected_bytes(checkpoint)
        with self.pool.lease(key, loader, nbytes) as model:
            yield model

    def _load(self, key: str) -> chat.ChatModel:
        with closing(self.checkpoint(key)) as checkpoint:
            return chat.load(checkpoint, self.title(key))

    def _again(self, key: str) -> chat.ChatModel:
        recipe, title = self._recipes[key]
        with self._merging:
            return chat_model(finish(self._live.update(recipe)), title)

    def live(self, key: str) -> Work[LiveResult]:
        """The tensors of a merge in memory, made again where they are gone; yields Progress."""
        with self._merging:
            return (yield from self._live.update(self._recipes[key][0]))

    def output_folder(self, name: str, goes_on: Callable[[Path], bool] = lambda folder: False) -> Path:
        """Where a saved merge of this name goes; RecipeError for a name that is no plain name, OutputError if it exists and
        is not one that `goes_on`."""
        if self.public:
            raise RecipeError("merges cannot be saved on a public page", todo="Copy the recipe and run it on your own machine.")
        if not isinstance(name, str) or not _OUTPUT_NAME.fullmatch(name.strip()):
            raise RecipeError("this is no folder name", where="Save as", todo="Use letters, digits, dots, dashes and underscores.")
        folder = self.outputs / name.strip()
        if os.path.lexists(folder) and not goes_on(folder):
            raise OutputError("exists already; nothing is ever overwritten", where=name, todo="Choose another name.")
        return folder

    def offer_output(self, folder: Path) -> Entry:
        """Put a saved merge, or what a fusion run made, into the catalogue."""
        return self._add(_found("outputs", self.outputs, folder))


def _found(prefix: str, root: Path, folder: Path) -> Entry:
    """The entry of a checkpoint below a folder of checkpoints."""
    name = Path(os.path.abspath(folder)).relative_to(os.path.abspath(root)).as_posix()
    return Entry(f"{prefix}/{name}", name.replace("/targets/", "/"), folder)


def _fitted(weights: tuple, count: int) -> tuple:
    """Weights for so many targets: what is missing weighs as much as the last, what is too much is left out."""
    return weights[:count] + weights[-1:] * (count - len(weights))


def default_budget() -> int:
    """Half of this machine's memory, in bytes, for loaded models."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError, AttributeError):
        return 4_000_000_000


def _ways(entry: Entry) -> list[str]:
    """How a model is written in recipes and errors."""
    shown = _shown(entry)
    resolved = "+".join(str(folder.resolve()) for folder in (entry.folder, entry.adapter) if folder)
    return [entry.ref, resolved, *([shown, f"./{shown}", written(shown)] if "/" in shown else [])]


def _shown(entry: Entry) -> str:
    return "+".join(shown_folder(folder) for folder in (entry.folder, entry.adapter) if folder)


def _places(folder: Path) -> tuple[str, str]:
    return os.path.abspath(folder), str(folder.resolve())


def _same(one: Entry, other: Entry) -> bool:
    """Whether two entries are the same folders."""
    return all((a and a.resolve()) == (b and b.resolve()) for a, b in ((one.folder, other.folder), (one.adapter, other.adapter)))


def shown_folder(folder: Path) -> str:
    """A folder as a recipe names it: relative to where the app runs when it lies below."""
    try:
        return folder.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(folder)
